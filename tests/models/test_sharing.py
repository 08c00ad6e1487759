"""Packed rows against separate rows: hidden states, logits and gradients of every family."""

from __future__ import annotations

import itertools

import pytest
import torch
from sharing_models import (
    DENSE,
    FAMILIES,
    FLEX,
    SDPA,
    all_rows,
    assert_same,
    assert_shares,
    gradients,
    groups,
    separate_logits,
    shared_logits,
    tiny,
)
from tiny_models import gpt2

from cpo_kernels import CandidateLayout
from cpo_kernels.models import LogpsRequest, attach_linear_loss
from cpo_kernels.models.prefix.probe import check_prefix_sharing, pack_groups, tree_inputs

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("family", "implementation"), DENSE)
def test_logits_and_gradients_are_those_of_separate_rows(family, implementation):
    model = tiny(family, implementation)
    assert_shares(model, *groups())
    # Everything in one row, and one group a row with much padding.
    assert_shares(model, *groups(1), max_row_tokens=200)
    assert_shares(model, *groups(2, ((20, 9, 9), (1, 2, 1))), max_row_tokens=1)


@pytest.mark.parametrize(("family", "implementation"), DENSE)
def test_every_family_passes_the_probe(family, implementation):
    check_prefix_sharing(tiny(family, implementation))


@pytest.mark.parametrize("family", FLEX)
def test_flex_attention_gives_the_logits_of_separate_rows(family):
    # Uncompiled, and forward only: on the CPU flex attention has no backward.
    model = tiny(family, "flex_attention")
    prompts, completions = groups()
    batch = pack_groups(prompts, completions, max_row_tokens=40)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert_same(shared_logits(model, batch), separate_logits(model, prompts, completions))


def test_families_without_an_implementation_are_few():
    assert {name for name in FAMILIES if name not in SDPA} <= {"gemma2"}
    assert {name for name in FAMILIES if name not in FLEX} <= {"gpt2"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("family", "implementation"), [("gpt2", "sdpa"), ("qwen3", "sdpa"), ("gemma2", "eager")])
def test_gradient_checkpointing_changes_nothing(family, implementation, reentrant):
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    model = tiny(family, implementation).train()
    expected = gradients(model, shared_logits(model, batch), completions)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model, shared_logits(model, batch), completions)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(got[name], expected[name], name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_close_to_float32_as_separate_rows_are(implementation, autocast):
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    model = tiny("gemma3_text", implementation)
    exact = separate_logits(model, prompts, completions)
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shared, separate = shared_logits(model, batch), separate_logits(model, prompts, completions)
    assert (shared - exact).norm() <= 1.5 * (separate - exact).norm()
    shared.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_row_may_be_longer_than_the_positions_of_the_model():
    prompts, completions = groups(lengths=((6, 5, 5, 5),))
    model = gpt2(n_positions=10)
    assert pack_groups(prompts, completions).input_ids.shape == (1, 18)
    batch = pack_groups(prompts, completions)
    out = model(input_ids=batch.input_ids % 20, **tree_inputs(model, batch.tree))
    assert torch.isfinite(out.logits).all()
    check_prefix_sharing(model)


def flat_layout(batch_rows, completions) -> tuple[torch.Tensor, CandidateLayout]:
    """Targets and the layout of all candidates, from the row of each of their tokens."""
    segments = [candidate for own in completions for candidate in own]
    cu_tokens = list(itertools.accumulate(map(len, segments), initial=0))
    cu_groups = list(itertools.accumulate(map(len, completions), initial=0))
    targets = torch.tensor([token for segment in segments for token in segment])
    return targets, CandidateLayout(cu_tokens, cu_groups, rows=torch.tensor(batch_rows))


@pytest.mark.parametrize("wrap", [False, True])
def test_an_attached_model_takes_a_prefix_tree(wrap):
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    model = attach_linear_loss(tiny("qwen3", "sdpa"))
    if wrap:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    targets, layout = flat_layout(all_rows(batch), completions)
    out = model(input_ids=batch.input_ids, prefix_tree=batch.tree, linear_loss=LogpsRequest(targets, layout))
    logits = separate_logits(model, prompts, completions)
    token_logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.stack([part.sum() for part in token_logps.split([len(c) for own in completions for c in own])])
    assert_same(out.logps, expected)
    packed = model(input_ids=batch.input_ids, prefix_tree=batch.tree).logits.flatten(0, -2)[all_rows(batch)]
    assert_same(packed, logits)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_a_prefix_tree_takes_the_place_of_mask_and_positions(name):
    batch = pack_groups(*groups())
    model = attach_linear_loss(tiny("llama", "sdpa"))
    with pytest.raises(ValueError, match=f"prefix_tree brings its own .*; got {name} too"):
        model(input_ids=batch.input_ids, prefix_tree=batch.tree, **{name: batch.tree.positions})
