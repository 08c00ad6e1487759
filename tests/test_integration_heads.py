"""The example of a vocabulary-parallel head and the bench of heads, as their users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    """Standard output of a Python command in the root of the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_trains_as_one_process_does():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    out = run(*launcher, "examples/plugging_in/vocab_parallel.py")
    assert "holds entries 0 to 504 of 1009" in out and "holds entries 505 to 1008 of 1009" in out
    first, last = (float(out.split("loss ")[1].split()[i]) for i in (0, 2))
    assert last < 0.8 * first
    assert float(out.rsplit(" ", 1)[1]) < 1e-5


def test_the_bench_of_heads(tmp_path):
    sizes = ("--groups", "2", "--tokens", "4", "--hidden", "32", "--vocab", "997", "--rounds", "1", "--threads", "1")
    run("-m", "benchmarks.bench_heads", *sizes, "--out", str(tmp_path / "heads.md"))
    table = (tmp_path / "heads.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    assert [(row[0], row[1]) for row in cells] == [
        ("trained", "3.00"),
        ("frozen", "2.00"),
        ("LoRA, rank 16", "2.33"),
        ("tied", "3.00"),
    ]
    assert all(float(row[3]) < 1e-5 for row in cells)
