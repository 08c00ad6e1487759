"""Fused sequence-level losses over the language-model head, as functions and layers; no logits are stored."""

from __future__ import annotations

from . import backends, layers
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

__all__ = [
    "CPOLoss",
    "CPOOutput",
    "CandidateLayout",
    "LinearCPOLoss",
    "LogpsAndEntropy",
    "Plan",
    "TokenStatistics",
    "VocabShard",
    "backends",
    "contrastive_loss",
    "cpo_loss",
    "layers",
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
