"""The fused loss inside a Hugging Face causal language model."""

from .attach import (
    CPORequest,
    LinearLossOutput,
    LogpsRequest,
    SequenceLossRequest,
    StatisticsRequest,
    attach_linear_loss,
)
from .prefix.probe import PrefixTree, SharedBatch, check_prefix_sharing, pack_groups

__all__ = [
    "CPORequest",
    "LinearLossOutput",
    "LogpsRequest",
    "PrefixTree",
    "SequenceLossRequest",
    "SharedBatch",
    "StatisticsRequest",
    "attach_linear_loss",
    "check_prefix_sharing",
    "pack_groups",
]
