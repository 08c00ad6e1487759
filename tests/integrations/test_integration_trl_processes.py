"""TRL on the fused loss under DDP, on two processes of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from project import SUPPORT

pytest.importorskip("trl")

from trl_runs import preferences

pytestmark = pytest.mark.cpu
WORKER = SUPPORT / "trl_worker.py"


def test_two_processes_log_what_stock_logs(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parent}{os.pathsep}{WORKER.parents[1]}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    preferences(11).save_to_disk(str(tmp_path / "pairs"))
    preferences(11, negatives=(2, 3, 1)).save_to_disk(str(tmp_path / "lists"))
    command = [*launcher, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
