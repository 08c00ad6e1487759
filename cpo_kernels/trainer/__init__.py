"""Training a Hugging Face causal language model with the fused objective."""

from .batch import ContrastBatch, Negative
from .config import CPOConfig
from .data import TokenizedExamples, tokenize_examples
from .evaluation import Report, evaluate
from .judges import ChatJudge, LikelihoodJudge
from .sampler import NegativeSampler
from .trainer import CPOTrainer
from .verdicts import judge_pairs, win_rate

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "ChatJudge",
    "ContrastBatch",
    "LikelihoodJudge",
    "Negative",
    "NegativeSampler",
    "Report",
    "TokenizedExamples",
    "evaluate",
    "judge_pairs",
    "tokenize_examples",
    "win_rate",
]
