"""Training a Hugging Face causal language model with the fused objective."""

from .config import CPOConfig
from .data import ContrastBatch, NegativeSampler, TokenizedExamples, tokenize_examples
from .trainer import CPOTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "ContrastBatch",
    "NegativeSampler",
    "TokenizedExamples",
    "tokenize_examples",
]
