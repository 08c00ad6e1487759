"""Tiny models of every family, and packed rows of theirs against separate ones."""

from __future__ import annotations

import random

import torch
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from cpo_kernels.models.prefix.probe import pack_groups, tree_inputs

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WINDOW = {"sliding_window": 5}
# One layer slides and one does not: Qwen counts the first full ones, the others list them.
QWEN = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gpt2": GPT2_SIZES | NO_DROPOUT,
    "llama": {},
    "mistral": WINDOW,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "phi3": WINDOW | NO_DROPOUT,
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "olmo2": {},
    "smollm3": MIXED | {"use_sliding_window": True, "no_rope_layer_interval": 2},
    "granite": {},
}


def model_class(family: str) -> type[PreTrainedModel]:
    """Return the class of a family's causal language models."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


# What transformers has attention for, which depends on its version: newer ones have no sdpa for scores with a cap.
SDPA = [name for name in FAMILIES if model_class(name)._supports_sdpa]
FLEX = [name for name in FAMILIES if model_class(name)._supports_flex_attn]
DENSE = [(name, "sdpa") for name in SDPA] + [(name, "eager") for name in FAMILIES]
SLIDING = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"]


def tiny(family: str, implementation: str, **config):
    """Make a random model of a family."""
    torch.manual_seed(0)
    built = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | config))
    return AutoModelForCausalLM.from_config(built, attn_implementation=implementation)


def groups(seed: int = 0, lengths: tuple[tuple[int, ...], ...] = ((9, 6, 1, 12), (3, 7), (1, 4, 4, 2), (6, 1, 1))):
    """Make prompts and candidates of these lengths: longer than the windows, and of one token."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(length)]

    return [text(p) for p, *_ in lengths], [[text(c) for c in own] for _, *own in lengths]


def all_rows(batch) -> list[int]:
    return [row for group in batch.rows for candidate in group for row in candidate]


def shared_logits(model, batch) -> torch.Tensor:
    """Compute logits (N, V) of all tokens of all candidates from packed rows."""
    inputs = tree_inputs(model, batch.tree.to(model.device))
    out = model(input_ids=batch.input_ids.to(model.device), use_cache=False, **inputs)
    return out.logits.flatten(0, -2)[all_rows(batch)]


def separate_logits(model, prompts, completions) -> torch.Tensor:
    """Compute logits (N, V) of all tokens of all candidates from one row a candidate, without any mask."""
    parts = []
    for prompt, own in zip(prompts, completions, strict=True):
        for candidate in own:
            ids = torch.tensor([[*prompt, *candidate[:-1]]], device=model.device)
            parts.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :])
    return torch.cat(parts)


def gradients(model, logits, completions) -> dict[str, torch.Tensor]:
    """Compute gradients of a loss that weighs every token differently."""
    targets = torch.tensor([token for own in completions for candidate in own for token in candidate])
    targets, weights = targets.to(logits.device), torch.linspace(-1.0, 2.0, len(targets), device=logits.device)
    model.zero_grad(set_to_none=True)
    (functional.cross_entropy(logits, targets, reduction="none") * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(value: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Check equality within 1e-5 of the largest entry, or of 1."""
    bound = 1e-5 * max(1.0, float(expected.detach().abs().max()))
    assert value.shape == expected.shape, name
    assert torch.isfinite(value).all(), name
    assert float((value - expected).detach().abs().max()) <= bound, name


def assert_shares(model, prompts, completions, **packing) -> None:
    batch = pack_groups(prompts, completions, **packing)
    shared, separate = shared_logits(model, batch), separate_logits(model, prompts, completions)
    assert_same(shared, separate)
    got, expected = gradients(model, shared, completions), gradients(model, separate, completions)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(got[name], expected[name], name)
