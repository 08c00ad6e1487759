"""How the fused linear forward is launched: its grid, its block sizes, and how often it is compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from random import Random

import pytest
import torch
from devices import DEVICE
from project import ROOT

pytest.importorskip("triton")

from cpo_kernels.kernels.device import multiprocessors_and_cache
from cpo_kernels.kernels.triton import tuning
from cpo_kernels.kernels.triton.splits import FLOPS_PER_BYTE, Grid, plan_grid


@pytest.mark.cpu
def test_grid_of_a_large_problem_fills_the_device():
    """R = 8192, H = 4096, V = 128256 in 16 bits on an H100: whole rounds of its 132 multiprocessors, in its cache."""
    grid = plan_grid(8192, 128256, 2 * 4096, 128, 256, 0, 132, 50 * 2**20)
    assert grid.row_tiles == 64 and 0 <= grid.splits * grid.split_tiles - 501 < grid.split_tiles
    rounds = -(-grid.row_tiles * grid.splits // 132)
    assert rounds * grid.split_tiles <= 1.05 * 64 * 501 / 132
    assert 2 * grid.group_tiles * 128 * 8192 <= 50 * 2**20
    assert LARGE.walk(grid).weight_reads < 3.3


@dataclass(frozen=True)
class Walk:
    """What the programs of a grid do, counted one by one."""

    rounds: int  # tiles that the busiest multiprocessor multiplies
    weight_reads: float  # how often the weight comes from memory
    vectors: float  # read from memory, words and hidden ones; partial results are counted in vectors too


@dataclass(frozen=True)
class Launch:
    """A product of ``row_tiles`` by ``vocab_tiles`` tiles on a device; the model of its time, by counting.

    Programs start in their order, as many as there are multiprocessors, and keep step: a wave. Programs of a wave that
    need the same words, or the same hidden vectors, read them together. Hidden vectors stay in the cache over a wave
    and into the next one if those of a wave fill at most half of it, and are read anew for every tile otherwise.
    """

    row_tiles: int
    vocab_tiles: int
    block_r: int
    block_v: int
    hidden_size: int
    element_size: int
    multiprocessors: int
    cache_bytes: int

    @classmethod
    def draw(cls, random: Random) -> Launch:
        """Sizes as they come, each as likely in proportion: R of 1 to 32768, V of 8 to 256 thousand."""
        rows, vocab = int(2 ** random.uniform(0, 15)), int(2 ** random.uniform(13, 18))
        element_size = random.choice([2, 4])
        blocks = [(128, 256), (128, 128), (128, 64), (64, 64)] if element_size == 2 else [(64, 64), (64, 32), (32, 32)]
        block_r, block_v = random.choice(blocks)
        return cls(
            *(-(-rows // block_r), -(-vocab // block_v), block_r, block_v),
            *(random.choice([512, 768, 1024, 2048, 4096, 5120, 8192]), element_size),
            *random.choice(DEVICES),
        )

    def planned(self) -> Grid:
        sizes = self.row_tiles * self.block_r, self.vocab_tiles * self.block_v, self.hidden_size * self.element_size
        device = self.multiprocessors, self.cache_bytes
        return plan_grid(*sizes, self.block_r, self.block_v, 0, *device, self.element_size)

    def walk(self, grid: Grid) -> Walk:
        rows, splits = [], []
        for group in torch.arange(self.row_tiles, device="cpu").split(grid.group_tiles):
            rows.append(group.repeat(grid.splits))
            splits.append(torch.arange(grid.splits, device="cpu").repeat_interleave(len(group)))
        programs = self.row_tiles * grid.splits
        wave = torch.arange(programs, device="cpu") // self.multiprocessors
        waves = int(wave[-1]) + 1
        words = torch.zeros(waves, grid.splits, dtype=torch.bool, device="cpu")
        hidden = torch.zeros(waves + 1, self.row_tiles, dtype=torch.bool, device="cpu")  # none before the first wave
        words[wave, torch.cat(splits)] = True
        hidden[wave + 1, torch.cat(rows)] = True
        together = hidden[1:].sum(1)
        vector = self.hidden_size * self.element_size
        cached = 2 * together * self.block_r * vector <= self.cache_bytes
        tiles = torch.where(cached, (hidden[1:] & ~hidden[:-1]).sum(1), together * grid.split_tiles).sum()
        reads = float(words.sum()) / grid.splits
        partials = programs * self.block_r * 16 / vector
        vectors = reads * self.vocab_tiles * self.block_v + float(tiles) * self.block_r + partials
        return Walk(waves * grid.split_tiles, reads, vectors)

    def products(self, rounds: int) -> int:
        """Products of two vectors, those of idle multiprocessors among them."""
        return rounds * self.multiprocessors * self.block_r * self.block_v

    def time(self, grid: Grid) -> float:
        """The longer of products and traffic, in products of two vectors."""
        walk = self.walk(grid)
        per_vector = FLOPS_PER_BYTE[self.element_size] * self.element_size / 2
        return max(self.products(walk.rounds), walk.vectors * per_vector)

    def least_time(self) -> float:
        """That of the best grid, of all groups and of splits up to the number of multiprocessors.

        Of numbers of splits that leave the busiest program the same tiles, the smallest is tried, which reads least. Of
        group sizes that make as many groups, the most even one. What would take longer for its products alone is left
        out.
        """
        shares = {-(-self.vocab_tiles // s) for s in range(1, min(self.vocab_tiles, self.multiprocessors) + 1)}
        grids = [(share, -(-self.vocab_tiles // share)) for share in shares]
        rounds = {s: -(-self.row_tiles * s // self.multiprocessors) * share for share, s in grids}
        least = math.inf
        for share, splits in sorted(grids, key=lambda grid: rounds[grid[1]]):
            if self.products(rounds[splits]) >= least:
                break
            for size in {-(-self.row_tiles // groups) for groups in range(1, self.row_tiles + 1)}:
                least = min(least, self.time(Grid(self.row_tiles, splits, size, share)))
        return least


MIB = 2**20
# Multiprocessors and bytes of L2 cache: H100, A100, B200, RTX 3090, 4090 and 5090, MI300X, and parts of an H100.
DEVICES = [
    *((132, 50 * MIB), (108, 40 * MIB), (148, 126 * MIB), (82, 6 * MIB), (128, 72 * MIB), (170, 96 * MIB)),
    *((304, 4 * MIB), (16, 12 * MIB), (60, 25 * MIB)),
]
LARGE = Launch(64, 501, 128, 256, 4096, 2, 132, 50 * MIB)


@pytest.mark.cpu
def test_grids_take_hardly_longer_than_the_best_of_all():
    random = Random(0)
    for _ in range(240):
        launch = Launch.draw(random)
        assert launch.time(launch.planned()) <= 1.05 * launch.least_time(), launch


@pytest.mark.cpu
def test_walks_are_as_counted_by_hand():
    """72 splits without groups read the weight in each of 35 waves; 6 splits of 22 row tiles once for each of 3 groups.

    In groups of 22 row tiles, 72 splits read it little more often than that, in rounds as few as without.
    """
    apart, few, both = (LARGE.walk(Grid(64, *rest)) for rest in ((72, 1, 7), (6, 22, 84), (72, 22, 7)))
    assert (apart.rounds, apart.weight_reads) == (35 * 7, 35)
    assert (few.rounds, few.weight_reads) == (3 * 84, 3)
    assert both.rounds == 35 * 7 and both.weight_reads < 3.2
    assert few.vectors == 3 * 501 * 256 + 64 * 128 + 6 * 64 * 128 * 16 / 8192


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


# Compiles in a process without the interpreter, for calls that differ in lengths, alignment and numbers of samples.
COMPILED = """
import torch
from benchmarks.kernels import aot
from cpo_kernels.kernels.triton import splits
from cpo_kernels.kernels.triton.linear import linear_forward

if __name__ == "__main__":
    config = {"BLOCK_R": 16, "BLOCK_V": 32, "BLOCK_H": 16, "SPLITS": 2, "num_warps": 4, "num_stages": 2}

    def launches():
        for rows, first, samples in ((1, 0, 1), (16, 1, 3), (17, 0, 16), (4096, 3, 1)):
            hidden, weight = torch.empty(rows, 64).half(), torch.empty(96, 64).half()
            targets, starts = torch.zeros(2 * rows + first, dtype=torch.int64), torch.arange(rows + 1 + first)
            vectors = targets[first:], starts[first:], None
            for seeds in (torch.zeros(1, samples), torch.zeros(rows, samples), torch.zeros(rows)):
                linear_forward(hidden, weight, *vectors, 1.0, 0.0, 1.0, seed=seeds.long(), entropy=True, config=config)

    def combinations():
        for rows in [*range(1, 300), *range(300, 20001, 97)]:
            grid = splits.plan_grid(rows, 128256, 8192, 128, 256, 0, 132, 50 * 2**20)
            partials = splits.new_partials(grid.splits, rows, 2, torch.device("meta"), entropy=True)
            result = torch.empty(2, rows), torch.empty(rows), torch.empty(rows, 2).long(), torch.empty(rows)
            targets = torch.zeros(rows, dtype=torch.int64)
            splits.combine_splits(splits.LinearForward(*result), partials, targets, None, 128256)

    for work in (launches, combinations):
        compiled = aot.compile_launches(work, aot.TARGETS["sm_90"])
        print(len(compiled), len({id(kernel) for kernel in compiled}))
"""


@pytest.mark.cpu
def test_lengths_and_alignment_do_not_compile_anew(tmp_path):
    """One kernel for the splits and one that combines them; of the latter one for all R of 1 to 20000."""
    root = ROOT
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["24", "2", "503", "1"], "launches and kernels"
