"""Training a Hugging Face causal language model with the fused objective."""

from cpo_kernels.negatives import Negative

from .batch import ContrastBatch
from .config import CPOConfig
from .data import TokenizedExamples, tokenize_examples
from .ensemble import EnsembleCallback, ensemble_checkpoints
from .evaluation import Report, evaluate
from .judges import ChatJudge, LikelihoodJudge
from .negatives import NegativeSampler
from .trainer import CPOTrainer
from .verdicts import judge_pairs, win_rate

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "ChatJudge",
    "ContrastBatch",
    "EnsembleCallback",
    "LikelihoodJudge",
    "Negative",
    "NegativeSampler",
    "Report",
    "TokenizedExamples",
    "ensemble_checkpoints",
    "evaluate",
    "judge_pairs",
    "tokenize_examples",
    "win_rate",
]
