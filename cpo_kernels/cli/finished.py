"""Finished runs: the same command, given again, must neither train another step nor change the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME

from cpo_kernels.trainer.files import RECORD, WEIGHTS, checkpoints, condition, read_record, whole_file, write_record
from cpo_kernels.trainer.run_record import differences, example_hashes, plain_settings, settings_of

from .errors import InputError
from .options import CourseOptions, DataOptions, EvaluationOptions, ModelOptions, NegativesOptions
from .parsing import Settings

SETTINGS = "cpo_kernels.yaml"
EXAMPLES = "trained_examples.npy"
# Options that do not change training. All others count, so that a new option counts.
_IGNORED_GROUPS: tuple[Any, ...] = (NegativesOptions, EvaluationOptions)
_IGNORED = {"resume", "trust_remote_code", "eval_data", "eval_split", "max_eval_examples"}
_COUNTED = {"negatives_file"}


def run_of(settings: Settings) -> dict[str, Any]:
    """Return the settings and options that change what the command trains, as plain values without secrets."""
    ignored = _IGNORED | {item.name for group in _IGNORED_GROUPS for item in dataclasses.fields(group)}
    groups: Iterable[Any] = (ModelOptions, DataOptions, CourseOptions, NegativesOptions)
    names = [item.name for group in groups for item in dataclasses.fields(group)]
    kept = [name for name in names if name in _COUNTED or name not in ignored]
    options = plain_settings({name: getattr(settings.run, name) for name in kept})
    return {"settings": settings_of(settings.training), "options": options}


def finished_run(settings: Settings) -> str | None:
    """Say in a sentence that the run has finished; None where there is something to train.

    Raises:
        ValueError: the run has finished with other settings, or is to go on and has no checkpoint; the message says
            so, and what to do.
    """
    directory = Path(str(settings.training.output_dir))
    record, state = _finished_state(directory)
    if state is None or not any(any(directory.glob(pattern)) for pattern in WEIGHTS):
        return None
    damaged = [] if record is None else condition(directory).damaged
    if damaged:
        print(f"the model in {directory} is not whole and is made again: {'; '.join(damaged)}")
        return None
    steps, total = state["global_step"], state["max_steps"]
    if _is_longer(settings, state):
        if not checkpoints(directory):
            raise InputError(
                f"training in {directory} has finished after {steps} steps and left no checkpoint to take more from; "
                "give another output_dir, or --resume none to begin anew"
            )
        return None
    changed = [] if record is None else differences(record.get("run", {}), run_of(settings))[0]
    if changed:
        raise InputError(
            f"training in {directory} has finished, with other settings: {'; '.join(changed)}. "
            "Give another output_dir, or --resume none to begin anew"
        )
    return (
        f"training in {directory} has finished after {steps} of {total} steps: nothing is changed. "
        "A larger max_steps or num_train_epochs goes on from its last checkpoint, --resume none begins anew"
    )


def _finished_state(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the record of a finished run, and its steps; a run finished by an older version has no record."""
    try:
        record = read_record(directory)
        if record is not None:
            return record, record["state"]
        state = json.loads((directory / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return None, state if state["global_step"] >= state["max_steps"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _is_longer(settings: Settings, state: dict[str, Any]) -> bool:
    """Tell whether the settings ask for more than was trained: more steps or, if unset, more epochs."""
    training = settings.training
    if training.max_steps > 0:
        return training.max_steps > state["global_step"]
    return training.num_train_epochs > (state.get("epoch") or 0) + 1e-6


def begin(directory: Path, examples: Any) -> None:
    """Mark ``output_dir`` as in training, and save the sorted hashes (E,) of the training examples."""
    for name in (RECORD, TRAINER_STATE_NAME):
        (directory / name).unlink(missing_ok=True)
    with whole_file(directory / EXAMPLES) as partial, partial.open("wb") as file:
        np.save(file, np.unique(example_hashes(examples)))


def finish(directory: Path, state: Any, run: dict[str, Any]) -> None:
    """Mark ``output_dir`` as finished: write the record of its weights and of the run.

    Args:
        directory: ``output_dir``.
        state: the state of Trainer at the end.
        run: the result of :func:`run_of` at the beginning.
    """
    weights = {path for pattern in WEIGHTS for path in directory.glob(pattern) if path.is_file()}
    own = [path for path in weights if path.parent == directory]
    reached = {"global_step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch}
    write_record(directory, own, state=reached, run=run)


def trained_on(name: str, examples: Any) -> int | None:
    """Count the examples on which a model was trained; None where the command did not record them.

    Args:
        name: directory of the model, ``output_dir`` or a checkpoint in it.
        examples: tokenized examples.
    """
    for directory in (Path(name), Path(name).parent):
        path = directory / EXAMPLES
        if path.is_file():
            try:
                known = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be read ({error}); delete the file to evaluate without it") from error
            return int(np.isin(example_hashes(examples), known).sum())
    return None
