"""Fused sequence-level losses: Contrastive Preference Optimization without storing logits over the vocabulary."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

try:
    from . import backends
    from .engine.entropy import LogpsAndEntropy, linear_token_entropy
    from .engine.plan import Plan
    from .engine.statistics import TokenStatistics, linear_token_statistics
    from .engine.vocab_parallel import VocabShard
    from .functional import (
        contrastive_loss,
        cpo_loss,
        linear_cpo_loss,
        linear_sequence_logps,
        linear_sequence_loss,
        linear_token_logps,
        plan,
        sequence_logps,
        token_logps,
    )
    from .layout import CandidateLayout
    from .modules import CPOLoss, LinearCPOLoss
    from .objective import CPOOutput
except (ImportError, OSError) as error:
    if sys.modules.get("torch") is not None:
        raise
    # Importing goes on, so that `cpo-kernels info` can name what is missing.
    _MISSING: Exception | None = error
else:
    _MISSING = None

if TYPE_CHECKING:
    from .models import attach_linear_loss
    from .trainer import CPOConfig, CPOTrainer

__version__ = "0.1.0"

__all__ = [
    "CPOConfig",
    "CPOLoss",
    "CPOOutput",
    "CPOTrainer",
    "CandidateLayout",
    "LinearCPOLoss",
    "LogpsAndEntropy",
    "Plan",
    "TokenStatistics",
    "VocabShard",
    "attach_linear_loss",
    "backends",
    "contrastive_loss",
    "cpo_loss",
    "linear_cpo_loss",
    "linear_sequence_logps",
    "linear_sequence_loss",
    "linear_token_entropy",
    "linear_token_logps",
    "linear_token_statistics",
    "plan",
    "sequence_logps",
    "token_logps",
]

# Imported on first use: these need transformers, which the losses do not.
_LAZY = {"CPOConfig": "trainer", "CPOTrainer": "trainer", "attach_linear_loss": "models"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if _MISSING is not None and name in __all__:
        raise ImportError(f"cpo_kernels needs torch, which cannot be imported ({_MISSING}); pip install torch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
