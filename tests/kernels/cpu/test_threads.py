"""The threads of the CPU kernels are torch's: one OpenMP runtime, one team of threads, one thread without a runtime."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import rows as cpu_rows

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not cpu_extension.available(), reason="needs the compiled CPU extension"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

ROWS, VOCAB = 64, 4096  # enough logits for several threads


def log_probabilities(threads: int) -> torch.Tensor:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(ROWS)
    return cpu_rows.row_forward(logits, targets, None, None, 1.0, 0.0, 1.0, threads=threads)[1]


PROCESS = """
import os
import torch
from build_tools.smoke_test import openmp_runtimes

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = threads()
torch.randn(1 << 20).exp_()
with_torch = threads()
from test_threads import log_probabilities
log_probabilities(3)
print(*sorted(openmp_runtimes()))
print(before, with_torch, threads())
"""


def test_one_openmp_runtime_and_no_threads_besides_those_of_torch():
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    runtimes, counts = result.stdout.splitlines()
    assert len(runtimes.split()) == 1 and "torch" in runtimes
    before, with_torch, with_ours = map(int, counts.split())
    assert with_torch >= before + 2, "torch made no threads, so that the test says nothing"
    assert with_ours == with_torch


def test_the_extension_links_no_openmp_runtime():
    library = Path(cpu_extension.extension().__file__).read_bytes()
    assert b"libgomp" not in library and b"libomp" not in library and b"libiomp" not in library


class Example(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return log_probabilities(torch.get_num_threads())


def test_workers_that_are_forked_after_the_threads_were_used_compute_too():
    expected = log_probabilities(2)
    loader = DataLoader(Example(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for found in loader:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_without_a_runtime_one_thread_does_all_of_it(tmp_path, monkeypatch):
    expected = log_probabilities(2)
    copy = shutil.copy(
        cpu_extension.extension().__file__, tmp_path
    )  # the same file would be the same module, with its runtime
    spec = importlib.util.spec_from_file_location("cpo_kernels._cpu", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(cpu_rows, "extension", lambda: module)
    torch.testing.assert_close(log_probabilities(2), expected, rtol=0, atol=0)
