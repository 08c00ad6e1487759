"""The fused loss under DeepSpeed ZeRO-3, in two gloo processes; skipped where DeepSpeed, no dependency, is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from project import SUPPORT

pytestmark = pytest.mark.cpu
pytest.importorskip("deepspeed", reason="needs DeepSpeed, which the project does not depend on")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero3")
    worker = SUPPORT / "zero3_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2, tied", "LoRA on the head"])
def test_gradients_equal_those_of_one_process(model, attach_first, runs):
    for run in runs:
        pairs = run[model, attach_first]
        assert not isinstance(pairs, str), pairs
        assert len(pairs) > 3
        for name, (ours, wanted) in pairs.items():
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
