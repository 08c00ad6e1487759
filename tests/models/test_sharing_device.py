"""Packed rows on a GPU: the flash kernel's causal mask where prompts are alike, and flex attention with gradients."""

from __future__ import annotations

import pytest
import torch
from sharing_models import all_rows, assert_shares, groups, tiny

from cpo_kernels.models.prefix.probe import check_prefix_sharing, pack_groups, tree_inputs

pytestmark = pytest.mark.cuda

# Prompts alike, so that no mask is read, and ragged ones.
LENGTHS = {"alike": ((8, 6, 6, 6), (8, 5, 3, 6)), "ragged": ((9, 6, 1, 12), (3, 7), (1, 4, 4, 2), (6, 1, 1))}


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_logits_and_gradients_are_those_of_separate_rows_on_a_gpu(family, implementation, name):
    # Heads of 16: flex attention has no smaller ones.
    model = tiny(family, implementation, head_dim=16, hidden_size=32).cuda()
    assert_shares(model, *groups(lengths=LENGTHS[name]))
    check_prefix_sharing(model)


@pytest.mark.parametrize("name", LENGTHS)
def test_bfloat16_on_a_gpu_is_as_close_to_float32_as_the_dense_mask_is(name):
    model = tiny("llama", "sdpa", head_dim=16, hidden_size=32).cuda()
    batch = pack_groups(*groups(lengths=LENGTHS[name]))
    ids, rows = batch.input_ids.cuda(), all_rows(batch)

    def states(inputs):
        return model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state.flatten(0, -2)[rows].float()

    inputs = tree_inputs(model, batch.tree.to("cuda"))
    dense = inputs | {"attention_mask": inputs["attention_mask"].as_subclass(torch.Tensor)}
    exact = states(dense)
    model.bfloat16()
    assert (states(inputs) - exact).norm() <= 1.5 * (states(dense) - exact).norm()
