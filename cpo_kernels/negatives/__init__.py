"""Synthetic negatives: wrong completions made without human labels, each kind usable from a plain loop.

:func:`batch_negatives`, :func:`truncation_negatives`, :func:`mean_field_negatives` and :func:`autoregressive_negatives`
return one shape: ``negatives[example][number]``, the token ids of each negative, which :func:`write_negatives` takes.
:func:`is_wrong` is the rule by which all of them leave out what is the ground truth.
"""

from .autoregressive import Sampling, autoregressive_negatives
from .batch import batch_negatives
from .completions import Completion, CompletionsEndpoint
from .files import write_negatives
from .kinds import KINDS, Kind, Negative
from .mean_field import MeanField, finish, mean_field_negatives, mean_field_samples
from .ranking import SentenceEmbedder, mean_pool, similarity_ranks
from .seeds import token_seeds
from .truncation import truncate, truncation_negatives
from .wrong import is_wrong

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
    "mean_field_samples",
    "mean_pool",
    "similarity_ranks",
    "token_seeds",
    "truncate",
    "truncation_negatives",
    "write_negatives",
]
