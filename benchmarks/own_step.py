"""A training step of CPOTrainer by its own methods, without an optimizer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpo_kernels import CPOTrainer


@dataclass
class OwnStep:
    """Draws or writes the negatives, packs the batch, scores it with the reference; forward and backward.

    Attributes:
        trainer: with its model in training mode.
        groups: the first so many examples are those of every step.
        making: seconds of each call until the batch was there.
        positions: that the body ran on in the last call, padding included.
        tokens: N of the last call.
    """

    trainer: CPOTrainer
    groups: int
    making: list[float] = field(default_factory=list)
    positions: int = 0
    tokens: int = 0

    def __call__(self) -> Tensor:
        """The loss, detached; its gradients are added to those that are there."""
        begun, trainer = time.perf_counter(), self.trainer
        trainer.state.global_step += 1  # new negatives
        examples = iter([{"index": torch.arange(self.groups)}])
        (inputs,), tokens = trainer.get_batch_samples(examples, 1, trainer.args.device)
        self.making.append(time.perf_counter() - begun)
        self.positions, self.tokens = inputs["input_ids"].numel(), inputs["targets"].numel()
        inputs = trainer._prepare_inputs(inputs)
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens)
        loss.backward()
        return loss.detach()
