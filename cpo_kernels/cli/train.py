"""``cpo-kernels train``: a model from a configuration file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from cpo_kernels.negatives.redaction import without_secrets
from cpo_kernels.trainer import CPOTrainer
from cpo_kernels.trainer.ensemble import EnsembleCallback
from cpo_kernels.trainer.files import checkpoints, write_whole
from cpo_kernels.trainer.loading import load_examples
from cpo_kernels.trainer.resuming import on_main_process

from .errors import InputError, input_errors
from .finished import SETTINGS, begin, finish, finished_run, run_of
from .inputs import Inputs
from .metrics import metrics_table, show_lines
from .parsing import Settings, parse


def run(arguments: Sequence[str]) -> None:
    """Train the model that ``arguments`` describe, save it, and print metrics; leave a finished run unchanged."""
    settings = parse(arguments)
    if _asked(settings) == "auto":
        is_main = settings.training.process_index == 0
        with input_errors():
            done = on_main_process(lambda: finished_run(settings), is_main)
        if done is not None:
            if is_main:
                print(done)
            return
    asked_for = run_of(settings)  # before the trainer fills in values that depend on the machine
    trainer = make_trainer(settings)
    checkpoint = find_checkpoint(settings, trainer)
    directory = Path(str(settings.training.output_dir))
    if trainer.is_world_process_zero():
        begin(directory, trainer.train_dataset)
        _save_settings(settings)
        if checkpoint is not None:
            print(f"going on from {checkpoint}")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_state()
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        finish(directory, trainer.state, asked_for)
        print(metrics_table(metrics))
        print(f"saved to {directory}")
    if settings.training.push_to_hub:
        trainer.push_to_hub()


def make_trainer(settings: Settings) -> CPOTrainer:
    """Make the trainer with its model and data, whose errors are raised before the first step."""
    inputs = Inputs(settings)
    examples, held_out = _train_examples(inputs), inputs.eval_examples()
    given = settings.given.get("eval_strategy", "no")
    if given != "no" and held_out is None:
        raise InputError(
            f"eval_strategy={str(given)!r} needs held-out examples; give eval_data, eval_split or eval_fraction"
        )
    model = inputs.adapted_model()
    with input_errors(TypeError, RuntimeError):
        trainer = CPOTrainer(
            model,
            settings.training,
            train_dataset=examples,
            eval_dataset=held_out,
            processing_class=inputs.tokenizer,
            callbacks=_callbacks(settings),
        )
    show_lines(trainer)
    return trainer


def _callbacks(settings: Settings) -> list[TrainerCallback]:
    other = settings.run.ensemble_with
    return [] if other is None else [EnsembleCallback(other, settings.run.ensemble_alpha)]


def _train_examples(inputs: Inputs) -> Sequence[Any]:
    path = inputs.run.negatives_file
    if path is None:
        return inputs.train_examples()
    if not Path(path).is_file():
        raise InputError(f"there is no negatives_file {path}; `cpo-kernels negatives` with the same options writes it")
    # max_examples counts rows of data, each of which may be several examples; a dry run takes few in any case.
    with input_errors():
        count = inputs.run.max_examples if inputs.run.tiny else None
        return load_examples(path, max_examples=count, disable_tqdm=inputs.settings.training.hides_progress)


def _asked(settings: Settings) -> str:
    return settings.training.resume_from_checkpoint or settings.run.resume


def find_checkpoint(settings: Settings, trainer: CPOTrainer) -> str | None:
    """Return the checkpoint to resume from: the newest whole one, the named one, or None."""
    asked = _asked(settings)
    if asked == "none" or (asked == "auto" and not checkpoints(str(settings.training.output_dir))):
        return None
    with input_errors():
        return trainer.find_checkpoint(True if asked == "auto" else asked, say=_warn)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _save_settings(settings: Settings) -> None:
    """Save the settings, without secrets, with the model, in a file that ``cpo-kernels train`` reads."""
    path = Path(str(settings.training.output_dir), SETTINGS)
    write_whole(path, yaml.safe_dump(without_secrets(settings.given), sort_keys=True))
