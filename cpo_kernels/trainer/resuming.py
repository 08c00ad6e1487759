"""The choice of the checkpoint to resume from: the newest whole one of the same run that holds all it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME

from .config import CPOConfig
from .files import RECORD, Needs, checkpoints, condition, lacking, read_record
from .run_record import differences

T = TypeVar("T")
HINT = ", without which the run does not go on bit for bit; allow_partial_resume goes on without"


@dataclass
class Found:
    """The checkpoint found to resume from.

    Attributes:
        path: the checkpoint; None where there is none.
        notes: sentences for the log about checkpoints passed over, and about unknown differences.
        unfinished: whether no checkpoint that was passed over had ever been written completely, so that beginning anew
            loses nothing.
    """

    path: str | None = None
    notes: list[str] = field(default_factory=list)
    unfinished: bool = True


def find_checkpoint(asked: str | bool, config: CPOConfig, needs: Needs, run: dict[str, Any]) -> Found:
    """Find the checkpoint to resume from.

    Args:
        asked: a checkpoint, or True for the newest in ``config.output_dir`` that is whole and lacks nothing.
        config: configuration of the resumed run; ``allow_partial_resume`` and ``allow_changed_resume`` permit what is
            otherwise an error.
        needs: the parts of a checkpoint that the run needs.
        run: the record of the resumed run.

    Raises:
        ValueError: a named checkpoint that does not exist, is damaged, or lacks something; a run that differs from the
            one that wrote the checkpoint. The message lists the faults.
    """
    found = _newest(config, needs) if asked is True else _named(str(asked), config, needs)
    if found.path is not None:
        _compare(found, config, run)
    return found


def _newest(config: CPOConfig, needs: Needs) -> Found:
    found = Found()
    for path in checkpoints(str(config.output_dir)):
        damaged, missing = _examine(path, needs)
        if damaged or (missing and not config.allow_partial_resume):
            reasons = damaged or [f"it has no {missing}{HINT}"]
            found.notes.append(f"{path} is passed over: {'; '.join(reasons)}")
            found.unfinished = found.unfinished and _never_finished(path)
            continue
        found.path = str(path)
        found.notes += _partial(found.path, missing)
        return found
    return found


def _named(asked: str, config: CPOConfig, needs: Needs) -> Found:
    path = Path(asked)
    if _never_finished(path):
        raise ValueError(f"{asked} is not a checkpoint: it has no {TRAINER_STATE_NAME}")
    damaged, missing = _examine(path, needs)
    if damaged:
        raise ValueError(f"{asked} is damaged: {'; '.join(damaged)}; go on from another checkpoint, or begin anew")
    if missing and not config.allow_partial_resume:
        raise ValueError(f"{asked} has no {missing}{HINT}")
    return Found(asked, _partial(asked, missing))


def _examine(path: Path, needs: Needs) -> tuple[list[str], str]:
    """Return the damaged files of a checkpoint as sentences, and the names of what it lacks as one text."""
    found = condition(path)
    return found.damaged, ", no ".join([*lacking(path, needs), *found.missing])


def _partial(path: str, missing: str) -> list[str]:
    return [f"{path} has no {missing}: the run does not go on bit for bit"] if missing else []


def _never_finished(path: Path) -> bool:
    """Tell whether a directory has neither Trainer's state, which is written last, nor the record."""
    return not (path / TRAINER_STATE_NAME).is_file() and not (path / RECORD).is_file()


def _compare(found: Found, config: CPOConfig, run: dict[str, Any]) -> None:
    before = (read_record(str(found.path)) or {}).get("run")
    if before is None:
        found.notes.append(
            f"{found.path} has no record of its files, settings and data: an older version wrote it, or the run was "
            "killed just then. Whether they are the same is not known"
        )
        return
    changed, lengths = differences(before, run, str(found.path))
    if changed and not config.allow_changed_resume:
        raise ValueError(
            f"this run is not the one that wrote {found.path}: {'; '.join(changed)}. Undo this, begin anew, or confirm "
            "with allow_changed_resume"
        )
    found.notes += [f"the run goes on from {found.path} changed as allowed: {text}" for text in changed]
    found.notes += [f"{text}; the learning rate follows the new length from here on" for text in lengths]


def nothing_found(output_dir: str | None, found: Found) -> str:
    """Say that there is no checkpoint to resume from, and which ones were passed over."""
    reasons = "".join(f"; {note}" for note in found.notes)
    return f"no complete checkpoint in {output_dir} to resume from{reasons}. Name a checkpoint, or begin anew"


def on_main_process(function: Callable[[], T], is_main: bool) -> T:
    """Call a function in one process, and return its result, or raise its ``ValueError``, in all of them."""
    outcome: list[Any] = [None, None]
    if is_main:
        try:
            outcome = [function(), None]
        except (ValueError, OSError) as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
