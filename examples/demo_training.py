"""The demo's runs: a small GPT-2, a trainer for it, and what is seen along the way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_head import LOGITS_BYTES, OBJECTIVE
from demo_scores import KINDS, Scores
from demo_text import MAX_LENGTH, MAX_PROMPT_LENGTH, Corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer import TokenizedExamples

BATCH_SIZE = 16
NEGATIVES = 2  # K of each continuation
console = Console()


def negatives(**counts: int) -> dict[str, Any]:
    """Options of a run with so many negatives of the kinds named, and none of the others."""
    options = {f"num_{kind}_negatives": counts.get(kind, 0) for kind in KINDS}
    return options | {"alpha": OBJECTIVE["contrast_weight"] if counts else 0.0}


# What the model from scratch is continued with; the first is the dearest and decides how many steps there is time for.
CONTINUATIONS = {
    "all kinds": negatives(**dict.fromkeys(KINDS, 1)),
    "MLE": negatives(),
    **{kind.replace("_", "-"): negatives(**{kind: NEGATIVES}) for kind in KINDS},
}


@dataclass
class Curve:
    """One run.

    Attributes:
        steps, scores: held-out scores along it.
        seconds: of every step, from the end of the one before: drawing and writing negatives, reference, forward,
            backward and optimizer, but no scores.
        shared: of every forward pass with gradients, whether prompts and their candidates ran as one row.
    """

    steps: list[int] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from the end of the one before or from the last :meth:`begin`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def begin(self) -> None:
        self.begun = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        self.begin()


class Watch(TrainerCallback):
    """A progress bar, held-out scores every so many steps, seconds of a step without them, and an end by the clock."""

    def __init__(
        self, title: str, total: int, every: int, evaluate: Callable[[Any], Scores], deadline: float, first: Scores
    ) -> None:
        self.title, self.total, self.every, self.evaluate, self.deadline = title, total, every, evaluate, deadline
        self.clock = Clock()
        self.curve = Curve(steps=[0], scores=[first], seconds=self.clock.seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        columns = [TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.progress = Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)
        self.task = self.progress.add_task(self.title, total=self.total, loss="")
        self.progress.start()
        self.hook = kwargs["model"].register_forward_pre_hook(self.on_forward, with_kwargs=True)
        self.clock.begin()

    def on_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.curve.shared.append(kwargs.get("prefix_tree") is not None)

    def record(self, state: Any, model: Any) -> None:
        self.curve.steps.append(state.global_step)
        self.curve.scores.append(self.evaluate(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.on_step_end()
        self.progress.update(self.task, completed=state.global_step)
        if state.global_step % self.every == 0:
            self.record(state, kwargs["model"])
        control.should_training_stop |= time.monotonic() > self.deadline
        self.clock.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()
        if self.curve.steps[-1] != state.global_step:
            self.record(state, kwargs["model"])
        self.progress.update(self.task, total=state.global_step)
        self.progress.stop()


def make_model(corpus: Corpus) -> GPT2LMHeadModel:
    """A small GPT-2 with random weights."""
    sizes = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": MAX_LENGTH}
    special = {"bos_token_id": corpus.eos, "eos_token_id": corpus.eos, "pad_token_id": corpus.eos}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(corpus.tokenizer), **sizes, **special))


def make_trainer(model: nn.Module, corpus: Corpus, data: TokenizedExamples, out: Path, **arguments: Any) -> CPOTrainer:
    """A trainer of ``model`` with some arguments of :class:`cpo_kernels.CPOConfig` beside the demo's own."""
    config = CPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=BATCH_SIZE,
        lr_scheduler_type="constant_with_warmup",
        train_sampling_strategy="group_by_length",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        max_logits_bytes=LOGITS_BYTES,
        beta=OBJECTIVE["beta"],
        **arguments,
    )
    trainer = CPOTrainer(model, config, train_dataset=data, processing_class=corpus.tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run(
    trainer: CPOTrainer, title: str, evaluate: Callable[[Any], Scores], deadline: float, first: Scores, records: int
) -> Curve:
    """Train until ``max_steps`` or the deadline.

    Args:
        trainer: of the run.
        title: its name in the progress bar.
        evaluate: gives the held-out scores of a model.
        deadline: by ``time.monotonic()``; the run ends with the step during which it passes.
        first: the scores at the start.
        records: how often they are taken along the way.
    """
    steps = trainer.args.max_steps
    watch = Watch(title, steps, -(-steps // records), evaluate, deadline, first)
    trainer.add_callback(watch)
    trainer.train()
    return watch.curve


def seconds_of_a_step(corpus: Corpus, data: TokenizedExamples, out: Path, **arguments: Any) -> float:
    """The least that a step of an untrained model takes, of three."""
    clock = Clock()
    trainer = make_trainer(make_model(corpus), corpus, data, out, max_steps=3, **arguments)
    trainer.add_callback(clock)
    trainer.train()
    return min(clock.seconds)
