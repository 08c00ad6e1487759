"""Synthetic negatives: wrong completions made without human labels, each kind usable from a plain loop."""

from .batch import batch_negatives
from .mean_field import MeanField, finish, is_wrong, mean_field_negatives, token_seeds
from .truncation import truncate, truncation_negatives

__all__ = [
    "MeanField",
    "batch_negatives",
    "finish",
    "is_wrong",
    "mean_field_negatives",
    "token_seeds",
    "truncate",
    "truncation_negatives",
]
