"""One of the processes of test_sharded.py: runs every case and an ensemble; process 0 saves what came of them."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import tiny_models
import torch
from sharded_cases import (
    CASES,
    RANKS,
    around_forward,
    gathered_around_forward,
    run_distributed,
    tensor_parallel,
)
from torch import distributed

from cpo_kernels.cli.processes import leave_process_group
from cpo_kernels.trainer.ensemble import EnsembleCallback


def main(folder: str) -> None:
    def average(value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total / RANKS

    results: dict[str, object] = {}
    for name, case in CASES.items():
        try:
            results[name] = run_distributed(case, distributed.get_rank(), average)
        except Exception:
            results[name] = traceback.format_exc()
    rank = distributed.get_rank()
    for name, grad in around_forward(rank).items():
        of_all = [torch.empty_like(grad) for _ in range(RANKS)]
        distributed.all_gather(of_all, grad)
        results[f"gradients {name} forward"] = of_all
    results["gathered around forward"] = gathered_around_forward(rank)
    for attach_first in (True, False):
        results[f"tensor parallel, {attach_first}"] = tensor_parallel(attach_first)
    first = rank == 0
    callback = EnsembleCallback(CASES["root, tied"].make(), 0.3)
    arguments, state = SimpleNamespace(output_dir=folder), SimpleNamespace(is_world_process_zero=first)
    moved = CASES["root, tied"].distribute(tiny_models.gpt2(seed=1))
    callback.on_train_begin(arguments, state, None, model=moved)
    callback.on_train_end(arguments, state, None, model=moved)
    if first:
        torch.save(results, Path(folder) / "run.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    main(sys.argv[1])
    leave_process_group()
