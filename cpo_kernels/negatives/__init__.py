"""Synthetic negatives: wrong completions made without human labels."""

from .batch import batch_negatives
from .truncation import truncate, truncation_negatives

__all__ = ["batch_negatives", "truncate", "truncation_negatives"]
