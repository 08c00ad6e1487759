"""The models that a run asks for log-likelihoods and tokens, and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cpo_kernels.models.head import evaluating

from .reference import Reference


@dataclass
class Sources:
    """The model that is trained and its reference.

    Args:
        policy: returns the model that is trained.
        reference: its frozen reference, if there is one.
        head: options of the head: backend and budget.
        autocast: the context of forward passes.
        device: of the models.
        synced_gpus: whether all processes have to take as many forward passes, as sharded parameters need it.
    """

    policy: Callable[[], nn.Module]
    reference: Reference | None
    head: dict[str, Any]
    autocast: Callable[[], AbstractContextManager]
    device: torch.device
    synced_gpus: bool = False

    @contextmanager
    def asking(self, who: str = "model") -> Iterator[nn.Module]:
        """The model, or the reference where there is one, in evaluation mode and without gradients."""
        of_reference = self.reference if who == "reference" else None
        source = evaluating(self.policy()) if of_reference is None else of_reference.active()
        with source as model, self.autocast():
            yield model
