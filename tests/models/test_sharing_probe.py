"""The probe: which models share prefixes, and why others cannot."""

from __future__ import annotations

import pytest
import torch
from sharing_models import (
    FAMILIES,
    SIZES,
    SLIDING,
    all_rows,
    groups,
    shared_logits,
    tiny,
)
from tiny_models import llama
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from cpo_kernels.models.prefix import masks, probe
from cpo_kernels.models.prefix.probe import PrefixTree, check_prefix_sharing, pack_groups, tree_inputs

pytestmark = pytest.mark.cpu


def no_windows(config):
    """One mask for all layers, as if no layer had a window."""
    return dict.fromkeys(config.layer_types) if hasattr(config, "layer_types") else {None: None}


def by_index(tree: PrefixTree) -> PrefixTree:
    """A window of indices: right in a row without branches."""
    return PrefixTree(tree.groups, tree.branches, torch.arange(tree.groups.shape[1]).expand_as(tree.positions))


@pytest.mark.parametrize("window", [5, 4096])
@pytest.mark.parametrize("family", SLIDING)
def test_the_probe_detects_one_mask_for_a_model_with_windows(family, window, monkeypatch):
    model = tiny(family, "eager", sliding_window=window)
    check_prefix_sharing(model)
    monkeypatch.setattr(masks, "layer_windows", no_windows)
    with pytest.raises(RuntimeError, match=r"hidden states differ .* expected at most 0.001 in torch.float32"):
        check_prefix_sharing(model)
    assert model.config.sliding_window == window


@pytest.mark.parametrize("window", [5, 4096])
@pytest.mark.parametrize("family", SLIDING)
def test_the_probe_detects_windows_of_indices(family, window, monkeypatch):
    model = tiny(family, "eager", sliding_window=window)

    def wrong(model, tree):
        return tree_inputs(model, by_index(tree)) | {"position_ids": tree.positions}

    monkeypatch.setattr(probe, "tree_inputs", wrong)
    with pytest.raises(RuntimeError, match="hidden states differ"):
        check_prefix_sharing(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_detects_positions_that_are_not_restarted(family, monkeypatch):
    model = tiny(family, "eager")

    def wrong(model, tree):
        return tree_inputs(model, tree) | {"position_ids": by_index(tree).positions}

    monkeypatch.setattr(probe, "tree_inputs", wrong)
    with pytest.raises(RuntimeError, match=r"hidden states differ|failed on packed rows"):
        check_prefix_sharing(model)


class ShiftedModel(LlamaModel):
    """Nothing tells that it also reads the token before, whatever the mask."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        embeds = self.embed_tokens(input_ids)
        embeds = embeds + 0.1 * functional.pad(embeds[:, :-1], (0, 0, 1, 0))
        keywords = {"attention_mask": attention_mask, "position_ids": position_ids} | kwargs
        return super().forward(inputs_embeds=embeds, **keywords)


def test_a_model_nobody_listed_is_refused_where_it_differs_and_taken_where_not():
    check_prefix_sharing(tiny("stablelm", "sdpa"))
    model = llama()
    model.model = ShiftedModel(model.config)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM cannot share prefixes: on a probe"):
        check_prefix_sharing(model)


HYBRID = {"num_attention_heads": 2, "num_hidden_layers": 2}
REFUSED = {
    "mamba": ({}, "carry a state"),
    "rwkv": ({"attention_hidden_size": 16}, "carry a state"),
    "jamba": (HYBRID, "carry a state"),
    "falcon_h1": ({}, "carry a state"),
    "recurrent_gemma": ({}, "(carry a state|layers of type recurrent)"),
    "qwen3_next": ({}, "carry a state"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "bloom": ({"n_head": 2, "n_layer": 2}, "takes no position_ids"),
    "mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 2}, "takes no position_ids"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "layers of type local"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_share_prefixes_are_refused_with_the_reason(family):
    config, reason = REFUSED[family]
    with pytest.raises(RuntimeError, match=f"cannot share prefixes: .*{reason}"):
        check_prefix_sharing(tiny(family, "eager", **config))


def test_alibi_and_flash_attention_are_refused():
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    falcon = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, alibi=True))
    with pytest.raises(RuntimeError, match="ALiBi"):
        check_prefix_sharing(falcon)
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RuntimeError, match="'flash_attention_2' takes no such mask; expected one of sdpa, eager, flex"):
        check_prefix_sharing(model)
    with pytest.raises(RuntimeError, match="'flash_attention_2' takes no mask"):
        tree_inputs(model, pack_groups([[1]], [[[1, 2]]]).tree)


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny("gemma3_text", "sdpa", sliding_window=4096).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_prefix_sharing(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.sliding_window == 4096
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_needs_parameters():
    with torch.device("meta"):
        model = tiny("llama", "sdpa")
    check_prefix_sharing(model)


def test_adapters_of_the_weights_share_and_virtual_tokens_do_not():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    check_prefix_sharing(lora)
    prefix = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(RuntimeError, match="virtual tokens"):
        check_prefix_sharing(peft.get_peft_model(llama(), prefix))


def test_the_default_device_does_not_matter():
    prompts, completions = groups()
    model = tiny("qwen3", "sdpa")
    expected = shared_logits(model, pack_groups(prompts, completions))
    with torch.device("meta"):
        batch = pack_groups(prompts, completions)
        inputs = tree_inputs(model, batch.tree)
        check_prefix_sharing(model)
    logits = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits
    assert torch.equal(logits.flatten(0, -2)[all_rows(batch)], expected)
