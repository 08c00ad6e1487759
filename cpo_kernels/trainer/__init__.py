"""Training a Hugging Face causal language model with the fused objective."""

from .batch import ContrastBatch, Negative
from .config import CPOConfig
from .data import TokenizedExamples, tokenize_examples
from .sampler import NegativeSampler
from .trainer import CPOTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "ContrastBatch",
    "Negative",
    "NegativeSampler",
    "TokenizedExamples",
    "tokenize_examples",
]
