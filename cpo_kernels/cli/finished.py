"""Whether a run has finished already: its command, given again, must not train another step or touch its model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME

from cpo_kernels.trainer.files import RECORD, WEIGHTS, checkpoints, condition, read_record, whole_file, write_record
from cpo_kernels.trainer.run_record import EPOCHS, STEPS, differences, example_hashes, plain_settings, settings_of

from .errors import InputError
from .options import CourseOptions, DataOptions, EvaluationOptions, ModelOptions, NegativesOptions
from .parsing import Settings

SETTINGS = "cpo_kernels.yaml"
EXAMPLES = "trained_examples.npy"
# Options that change nothing about what is trained. All others count, so that a new one does.
_IGNORED_GROUPS: tuple[Any, ...] = (NegativesOptions, EvaluationOptions)
_IGNORED = {"resume", "trust_remote_code", "eval_data", "eval_split", "max_eval_examples"}
_COUNTED = {"negatives_file"}


def run_options(settings: Settings) -> dict[str, Any]:
    """Returns the options that change what the command trains, as plain values without secrets."""
    ignored = _IGNORED | {item.name for group in _IGNORED_GROUPS for item in dataclasses.fields(group)}
    groups: Iterable[Any] = (ModelOptions, DataOptions, CourseOptions, NegativesOptions)
    names = [item.name for group in groups for item in dataclasses.fields(group)]
    kept = [name for name in names if name in _COUNTED or name not in ignored]
    return plain_settings({name: getattr(settings.run, name) for name in kept})


def finished_run(settings: Settings) -> str | None:
    """Says that the run has finished, in a sentence; None where there is something to train.

    Raises:
        ValueError: it has finished with other settings, or is to go on and there is no checkpoint; the message says
            which, and what to do.
    """
    directory = Path(str(settings.training.output_dir))
    state = _state(directory)
    if state is None or not any(any(directory.glob(pattern)) for pattern in WEIGHTS):
        return None
    try:
        record = read_record(directory)
    except ValueError:
        record = None
    steps, total = state["global_step"], state["max_steps"]
    if record is None:  # Written by an older version: it is finished if all steps were taken.
        before: dict[str, Any] = {"settings": {"max_steps": -1, "num_train_epochs": state.get("num_train_epochs", 0)}}
        if steps < total:
            return None
    elif damaged := condition(directory).damaged:
        print(f"the model in {directory} is not whole and is made again: {'; '.join(damaged)}")
        return None
    else:
        before = record["run"]
    now = {"settings": settings_of(settings.training), "options": run_options(settings)}
    if _is_longer(settings, before["settings"], total):
        if not checkpoints(directory):
            raise InputError(
                f"training in {directory} has finished after {steps} steps and left no checkpoint to take more from; "
                "give another output_dir, or --resume none to begin anew"
            )
        return None
    changed = differences(before, now)[0] if record is not None else []
    if changed:
        raise InputError(
            f"training in {directory} has finished, with other settings: {'; '.join(changed)}. "
            "Give another output_dir, or --resume none to begin anew"
        )
    return (
        f"training in {directory} has finished after {steps} of {total} steps: nothing is changed. "
        "A larger max_steps or num_train_epochs goes on from its last checkpoint, --resume none begins anew"
    )


def _state(directory: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((directory / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return state if {"global_step", "max_steps"} <= state.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_longer(settings: Settings, before: dict[str, Any], total: int) -> bool:
    training = settings.training
    if training.max_steps > 0:
        return training.max_steps > total
    if before.get(STEPS.partition(".")[2], -1) > 0:
        return False  # How many steps the epochs are is known once the data is read; the difference is told.
    return training.num_train_epochs > before.get(EPOCHS.partition(".")[2], training.num_train_epochs)


def begin(directory: Path, examples: Any) -> None:
    """Leaves word in ``output_dir`` that training is under way, and on which examples, (E,) sorted hashes of them."""
    for name in (RECORD, TRAINER_STATE_NAME):
        (directory / name).unlink(missing_ok=True)
    with whole_file(directory / EXAMPLES) as partial, partial.open("wb") as file:
        np.save(file, np.unique(example_hashes(examples)))


def finish(directory: Path, step: int, run: dict[str, Any], settings: Settings) -> None:
    """Leaves word in ``output_dir`` that training has finished: the record of its weights and of what was trained."""
    weights = {path for pattern in WEIGHTS for path in directory.glob(pattern) if path.is_file()}
    own = [path for path in weights if path.parent == directory]
    write_record(directory, own, step=step, run=run | {"options": run_options(settings)})


def trained_on(name: str, examples: Any) -> int | None:
    """Counts the examples that a model was trained on; None where the command did not train it, or long ago.

    Args:
        name: where the model is, ``output_dir`` or a checkpoint in it.
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
