"""What is on disk once a run was killed: files that are whole, and the checkpoint that it can go on from."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cpo_kernels.negatives.files import whole_file, write_whole

__all__ = ["last_complete_checkpoint", "whole_file", "write_whole"]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Find the checkpoint of the most steps that was written to its end; None if there is none.

    The trainer's state is the last file of a checkpoint: a run that was killed while it saved has left a directory
    without it, or with half of it, which cannot be resumed from.
    """
    checkpoints = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and _is_complete(path):
            checkpoints.append((int(step), str(path)))
    return max(checkpoints)[1] if checkpoints else None


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
