"""One of the two processes of test_integration_zero3.py: gradients under DeepSpeed ZeRO-3 against one process."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import tiny_models
import torch
from deepspeed.utils import safe_get_full_grad
from sharded_cases import ADAPTERS, RANKS, answers, losses
from torch import nn

from cpo_kernels import attach_linear_loss

# It would be compiled: messages through shared memory, in place of gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MODELS = {"llama": tiny_models.llama, "gpt2, tied": tiny_models.gpt2, "LoRA on the head": ADAPTERS["head"]}
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}  # 0: no parameter is too small to be sharded
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": STAGE_3,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def compare(make: Any, attach_first: bool, rank: int) -> dict[str, Any]:
    """Return (ours, wanted) by name: loss, log-likelihoods of two requests, and every gradient, averaged."""
    model, alone = make(), attach_linear_loss(make())
    if attach_first:
        attach_linear_loss(model)
    engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=CONFIG)[0]
    attach_linear_loss(model)
    assert all(p.numel() == 0 for p in model.parameters())
    with torch.no_grad():
        pairs = {name: (value, answers(alone, [rank])[name]) for name, value in answers(engine, [rank]).items()}
    loss = losses(engine, rank)
    engine.backward(loss)
    wanted = torch.stack([losses(alone, k) for k in range(RANKS)])
    wanted.mean().backward()
    pairs["loss"] = loss.detach(), wanted[rank].detach()
    ours = dict(model.named_parameters())
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            pairs[name] = safe_get_full_grad(ours[name]), parameter.grad
    return pairs


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, results = torch.distributed.get_rank(), {}
    for name, make in MODELS.items():
        for attach_first in (True, False):
            try:
                results[name, attach_first] = compare(make, attach_first, rank)
            except Exception:
                results[name, attach_first] = traceback.format_exc()
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
