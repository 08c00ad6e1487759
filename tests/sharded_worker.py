"""One of the processes of test_sharded.py: runs every case, and process 0 saves what came of it."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
from sharded_cases import CASES, RANKS, run_distributed
from torch import distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")

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
    if distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "run.pt")
    distributed.destroy_process_group()
