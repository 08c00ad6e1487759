"""TRL on the fused loss under DDP, on two processes of the CPU."""

from __future__ import annotations

import pytest
from processes import run_script
from project import SUPPORT

pytest.importorskip("trl")

from trl_runs import preferences

pytestmark = pytest.mark.cpu


def test_two_processes_log_what_stock_logs(tmp_path):
    preferences(11).save_to_disk(str(tmp_path / "pairs"))
    preferences(11, negatives=(2, 3, 1)).save_to_disk(str(tmp_path / "lists"))
    run_script(SUPPORT / "trl_worker.py", str(tmp_path), processes=2)  # which compares the logs, and fails
