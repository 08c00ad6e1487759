"""Models with a head of their own, a contrast as their input, and the same loss from dense logits."""

from __future__ import annotations

import tiny_models
import torch
import transformers
from torch import nn

from cpo_kernels import CandidateLayout
from cpo_kernels.models import CPORequest

V = tiny_models.VOCAB


SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


ROPE = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}


# Before torch 2.9 the grouped product that experts run by is one of GPUs alone.
WITHOUT_GROUPED_PRODUCTS = {} if hasattr(torch.nn.functional, "grouped_mm") else {"experts_implementation": "eager"}


def from_config(kind: str, **config) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **config)
    return transformers.AutoModelForCausalLM.from_config(made, **WITHOUT_GROUPED_PRODUCTS)


def projected():
    """Make an OPT, whose body ends with a projection to the width of the embeddings."""
    sizes = {"vocab_size": V, "hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 32, "num_hidden_layers": 2}
    return from_config("opt", **sizes, num_attention_heads=2, max_position_embeddings=64, dropout=0.0)


def softcapped():
    return from_config("gemma2", **ROPE, head_dim=8, final_logit_softcapping=1.5, pad_token_id=0)


def biased():
    model = from_config("gptj", vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    nn.init.normal_(model.lm_head.bias)
    return model


FAMILIES = {
    "gpt2, tied head": tiny_models.gpt2,
    "llama": tiny_models.llama,
    "gemma2, softcap": softcapped,
    "cohere, logit_scale": lambda: from_config("cohere", **ROPE, logit_scale=0.25),
    "granite, logits_scaling": lambda: from_config("granite", **ROPE, logits_scaling=4.0),
    "gptj, bias": biased,
    "opt, projection": projected,
}


def contrast_inputs() -> tuple[torch.Tensor, torch.Tensor, CandidateLayout, torch.Tensor]:
    """Make two sequences of 7 tokens; groups of 2 and 3 candidates, the last of which shares rows with another."""
    torch.manual_seed(1)
    ids = torch.randint(3, V, (2, 7))
    rows = torch.tensor([1, 2, 3, 9, 10, 2, 3, 4, 10, 11, 2, 3])
    targets = torch.randint(0, V, rows.shape)
    layout = CandidateLayout([0, 3, 5, 8, 10, 12], [0, 2, 5], rows=rows)
    return ids, targets, layout, torch.tensor([-9.0, -5.0, -8.0, -7.0, -6.0])


def dense_logps(model, ids, targets, layout) -> torch.Tensor:
    logps = model(ids).logits.flatten(0, 1).log_softmax(-1)[layout.rows, targets]
    return torch.stack([part.sum() for part in logps.split(torch.tensor(layout.cu_tokens).diff().tolist())])


def dense_loss(model, ids, targets, layout, ref_logps) -> torch.Tensor:
    """Compute 0.75 * CPO + 0.25 * MLE with beta = 0.3, by the formula of the paper."""
    logps = dense_logps(model, ids, targets, layout)
    scores = 0.3 * (logps - ref_logps)
    contrast = -(scores[:2].log_softmax(0)[0] + scores[2:].log_softmax(0)[0]) / 2
    return 0.75 * contrast - 0.25 * (logps[0] + logps[2]) / 6


def request_for(targets, layout, ref_logps) -> CPORequest:
    return CPORequest(targets, layout, ref_logps=ref_logps, beta=0.3, contrast_weight=0.75, mle_weight=0.25)
