"""How the fused linear forward is launched: its grid, its block sizes, and how often it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from devices import DEVICE
from project import ROOT

pytest.importorskip("triton")

from cpo_kernels.kernels.device import multiprocessors_and_cache
from cpo_kernels.kernels.triton import tuning
from cpo_kernels.kernels.triton.splits import plan_grid


@pytest.mark.cpu
def test_grid_of_a_large_problem_fills_the_device():
    """N = 8192, H = 4096, V = 128256 in 16 bits on an H100: whole rounds of its 132 multiprocessors, in its cache."""
    grid = plan_grid(8192, 128256, 2 * 4096, 128, 256, 0, 132, 50 * 2**20)
    assert grid.row_tiles == 64 and 0 <= grid.splits * grid.split_tiles - 501 < grid.split_tiles
    rounds = -(-grid.row_tiles * grid.splits // 132)
    assert rounds * grid.split_tiles <= 1.05 * 64 * 501 / 132
    assert 2 * grid.group_tiles * 128 * 8192 <= 50 * 2**20


@pytest.mark.cpu
def test_grid_of_few_rows_shares_out_the_vocabulary():
    grid = plan_grid(1, 128256, 2 * 4096, 128, 256, 0, 132, 50 * 2**20)
    assert grid.row_tiles == 1 and grid.splits == 126 and grid.split_tiles == 4


@pytest.mark.cpu
@pytest.mark.parametrize("sizes", [(1, 1), (1000, 7), (130, 50257), (5000, 300)])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_no_split_is_empty(sizes, count):
    grid = plan_grid(*sizes, 128, 128, 64, count, 132, 2**20)
    tiles = -(-sizes[1] // 64)
    assert (grid.splits - 1) * grid.split_tiles < tiles <= grid.splits * grid.split_tiles
    assert 1 <= grid.group_tiles <= grid.row_tiles


def test_facts_of_the_device():
    multiprocessors, cache_bytes = multiprocessors_and_cache(DEVICE)
    assert multiprocessors >= 1 and (cache_bytes > 0) == (DEVICE.type == "cuda")


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", ["linear_forward", "linear_sample"])
def test_table_has_the_sizes_of_a_launch(kernel):
    entries = [entry for entry in tuning.entries() if entry["kernel"] == kernel]
    needed = {"BLOCK_R", "BLOCK_V", "BLOCK_H", "num_warps", "num_stages"}
    assert entries and all(needed <= e["config"].keys() <= needed | {"TMA", "SPLITS"} for e in entries)


@pytest.mark.cpu
@pytest.mark.parametrize("kernel", ["linear_forward", "linear_sample"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_launches_without_descriptors_take_other_sizes(monkeypatch, arch, kernel):
    monkeypatch.setattr(tuning, "architecture", lambda device: arch)
    sizes = tuning.config(kernel, torch.device("cpu"), 101, torch.bfloat16, 4100, descriptors=False)
    assert tuning.config(kernel, torch.device("cpu"), 101, torch.bfloat16, 4096)["TMA"] == 1
    assert sizes.keys() == {"BLOCK_R", "BLOCK_V", "BLOCK_H", "num_warps", "num_stages"}


# Compiles in a process without the interpreter, for calls that differ in lengths and alignment.
COMPILED = """
import torch
from benchmarks.kernels import aot
from cpo_kernels.kernels.triton.linear import linear_forward

if __name__ == "__main__":
    config = {"BLOCK_R": 16, "BLOCK_V": 32, "BLOCK_H": 16, "SPLITS": 2, "num_warps": 4, "num_stages": 2}

    def launches():
        for rows, first in ((1, 0), (16, 1), (17, 0), (4096, 3)):
            hidden, weight = torch.empty(rows, 64).half(), torch.empty(96, 64).half()
            targets, starts = torch.zeros(2 * rows + first, dtype=torch.int64), torch.arange(rows + 1 + first)
            seed = torch.zeros(1, dtype=torch.int64)
            vectors = targets[first:], starts[first:], None
            linear_forward(hidden, weight, *vectors, 1.0, 0.0, 1.0, seed=seed, entropy=True, config=config)

    compiled = aot.compile_launches(launches, aot.TARGETS["sm_90"])
    print(len(compiled), len({id(kernel) for kernel in compiled}))
"""


@pytest.mark.cpu
def test_lengths_and_alignment_do_not_compile_anew(tmp_path):
    root = ROOT
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "2"], "launches, kernels: one for the splits and one that combines them"
