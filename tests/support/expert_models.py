"""Tiny mixtures of experts that add a load-balancing loss, and what they add to their loss by their own forward."""

from __future__ import annotations

import torch
from attach_cases import ROPE, V, from_config
from torch import Tensor

EXPERTS = ROPE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
EXPERTS |= {"output_router_logits": True, "router_aux_loss_coef": 0.3}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "gpt_oss": {"head_dim": 8},
    # By another name in its configuration.
    "jetmoe": {"kv_channels": 8, "aux_loss_coef": 0.2},
}


def experts(family: str = "mixtral", **options):
    """Make a model with ``output_router_logits`` in its configuration, unless an option sets it."""
    return from_config(family, **EXPERTS | FAMILIES[family] | options)


def router_loss(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute what the model adds to its loss, a differentiable scalar, from two of its losses with labels."""
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return model(**inputs, output_router_logits=True).loss - model(**inputs, output_router_logits=False).loss


def padded(lengths: tuple[int, ...] = (7, 4)) -> tuple[Tensor, Tensor]:
    """Make token ids and their mask, (B, max(lengths)) each."""
    torch.manual_seed(1)
    ids = torch.randint(3, V, (len(lengths), max(lengths)))
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
