"""Train base models, the judge and arms, with :class:`cpo_kernels.CPOTrainer`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measures import nll_per_token
from protocol import Arm, Options, Protocol, Regime
from tasks import Task
from text import Text
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer import TokenizedExamples

BASE_RATE = 3e-3


def make_model(task: Task, seed: int, width: int | None = None, layers: int | None = None) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights and without dropout, of the task's size."""
    torch.manual_seed(seed)
    width = width or task.width
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=task.vocab_size,
            n_positions=task.max_length,
            n_embd=width,
            n_layer=layers or task.layers,
            n_head=width // 16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=task.eos,
            eos_token_id=task.eos,
            pad_token_id=task.eos,
        )
    )


class ValidationLoss(TrainerCallback):
    """The loss per token on validation examples, ten times along a run, as ``[step, loss]``."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.every = task, max(1, steps // 10)
        self.losses: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if state.global_step % self.every == 0:
            held_out, model = self.task.examples("validation", 0), kwargs["model"]
            nll = nll_per_token(model, held_out.prompts, held_out.completions, self.task.eos)
            self.losses.append([state.global_step, nll])
            model.train()


def train(
    model: GPT2LMHeadModel,
    task: Task,
    data: TokenizedExamples,
    out: Path,
    arm: Arm | None = None,
    callback: TrainerCallback | None = None,
    **options: Any,
) -> float:
    """Train a model in place, with next-token likelihood if no arm is given.

    Returns:
        Seconds of the processor, on one thread: drawing and writing negatives, reference, forward, backward, optimizer.
    """
    fields = {"objective": "mle"} if arm is None else dict(arm.options)
    config = CPOConfig(
        output_dir=str(out),
        max_length=task.max_length,
        max_prompt_length=task.max_length - 1,
        lr_scheduler_type="linear",
        autoregressive_every=5,
        autoregressive_batch_size=1024,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **(fields | options),
    )
    per_text = arm is not None and arm.per_text
    trainer = CPOTrainer(
        model,
        config,
        train_dataset=data,
        loss_fn=(lambda logps, groups: -logps[:, 0].sum()) if per_text else None,
        callbacks=None if callback is None else [callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    begun = time.process_time()
    trainer.train()
    return time.process_time() - begun


def train_base(
    task: Task, regime: Regime, seed: int, protocol: Protocol, out: Path
) -> tuple[GPT2LMHeadModel, list[list[float]]]:
    """Train a base model, and return it with its loss on the validation part along the way."""
    model, watch = make_model(task, seed), ValidationLoss(task, regime.base_steps)
    options = {"seed": seed, "per_device_train_batch_size": protocol.base_batch_size, "learning_rate": BASE_RATE}
    options |= {"max_steps": regime.base_steps, "warmup_steps": 20}
    train(model, task, task.examples(regime.base_data, seed), out, callback=watch, **options)
    return model, watch.losses


def train_judge(task: Text, protocol: Protocol, out: Path) -> tuple[GPT2LMHeadModel, list[list[float]]]:
    """Train the judge of the text, and return it with its loss on the validation part along the way."""
    model = make_model(task, 0, task.judge_width, task.judge_layers)
    watch = ValidationLoss(task, protocol.judge_steps)
    options = {"seed": 0, "per_device_train_batch_size": protocol.base_batch_size // 2, "learning_rate": BASE_RATE}
    options |= {"max_steps": protocol.judge_steps, "warmup_steps": 20}
    train(model, task, task.examples("judge", 0), out, callback=watch, **options)
    return model, watch.losses


def train_arm(
    model: GPT2LMHeadModel,
    task: Task,
    regime: Regime,
    arm: Arm,
    setting: Options,
    seed: int,
    protocol: Protocol,
    out: Path,
) -> float:
    """Continue a base model in place, as an arm does with a setting, and return the seconds of the processor."""
    steps = regime.steps * arm.times
    options: dict[str, Any] = {
        "seed": seed,
        "per_device_train_batch_size": protocol.batch_size,
        "max_steps": steps,
        "warmup_steps": math.ceil(steps / 10),
        **setting,
    }
    return train(model, task, task.examples(regime.data, seed), out, arm, **options)
