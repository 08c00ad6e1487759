"""``cpo-kernels train``: a model from a configuration file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from cpo_kernels.trainer import CPOTrainer
from cpo_kernels.trainer.ensemble import EnsembleCallback
from cpo_kernels.trainer.files import last_complete_checkpoint, write_whole
from cpo_kernels.trainer.loading import load_examples

from .errors import InputError, input_errors
from .inputs import Inputs
from .options import RESUME
from .parsing import Settings, parse

SETTINGS = "cpo_kernels.yaml"
SECRETS = ("token", "key")


def run(arguments: Sequence[str]) -> None:
    """Train what ``arguments`` say and save it; prints the metrics."""
    settings = parse(arguments)
    trainer = make_trainer(settings)
    checkpoint = find_checkpoint(settings)
    if trainer.is_world_process_zero():
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
        _print_metrics(metrics)
        print(f"saved to {settings.training.output_dir}")
    if settings.training.push_to_hub:
        trainer.push_to_hub()


def make_trainer(settings: Settings) -> CPOTrainer:
    """Make the trainer with its model and data; what is wrong with them is told before the first step."""
    inputs = Inputs(settings)
    examples, held_out = _train_examples(inputs), inputs.eval_examples()
    given = settings.given.get("eval_strategy", "no")
    if given != "no" and held_out is None:
        raise InputError(
            f"eval_strategy={str(given)!r} needs held-out examples; give eval_data, eval_split or eval_fraction"
        )
    model = inputs.adapted_model()
    with input_errors(TypeError, RuntimeError):
        return CPOTrainer(
            model,
            settings.training,
            train_dataset=examples,
            eval_dataset=held_out,
            processing_class=inputs.tokenizer,
            callbacks=_callbacks(settings),
        )


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
        return load_examples(path, max_examples=inputs.run.max_examples if inputs.run.tiny else None)


def find_checkpoint(settings: Settings) -> str | None:
    """Find what to go on from: the last checkpoint that was written to its end, the one that is named, or nothing."""
    training = settings.training
    asked = training.resume_from_checkpoint or settings.run.resume
    if asked not in RESUME:
        if not Path(asked, TRAINER_STATE_NAME).is_file():
            raise InputError(f"resume: {asked} is not a checkpoint: it has no {TRAINER_STATE_NAME}")
        return asked
    # Without the optimizer's state there is nothing to go on with.
    if asked == "none" or training.save_only_model:
        return None
    return last_complete_checkpoint(str(training.output_dir))


def _save_settings(settings: Settings) -> None:
    """Keep what was asked for beside what came of it, which may be published; `cpo-kernels train` takes the file."""
    path = Path(str(settings.training.output_dir), SETTINGS)
    write_whole(path, yaml.safe_dump(_without_secrets(settings.given), sort_keys=True))


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what must not be shown of a configuration: tokens and keys, also within mappings."""
    return {
        name: _without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if not str(name).endswith(SECRETS)
    }


def _print_metrics(metrics: dict[str, Any]) -> None:
    width = max(map(len, metrics))
    for name, value in sorted(metrics.items()):
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
