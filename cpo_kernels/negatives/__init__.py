"""Synthetic negatives: wrong completions made without human labels, each kind usable from a plain loop."""

from .autoregressive import Sampling, autoregressive_negatives
from .batch import batch_negatives
from .completions import Completion, CompletionsEndpoint
from .files import write_negatives
from .kinds import KINDS, Kind, Negative
from .mean_field import MeanField, finish, is_wrong, mean_field_negatives
from .ranking import SentenceEmbedder, mean_pool, similarity_ranks
from .seeds import token_seeds
from .truncation import truncate, truncation_negatives

__all__ = [
    "KINDS",
    "Completion",
    "CompletionsEndpoint",
    "Kind",
    "MeanField",
    "Negative",
    "Sampling",
    "SentenceEmbedder",
    "autoregressive_negatives",
    "batch_negatives",
    "finish",
    "is_wrong",
    "mean_field_negatives",
    "mean_pool",
    "similarity_ranks",
    "token_seeds",
    "truncate",
    "truncation_negatives",
    "write_negatives",
]
