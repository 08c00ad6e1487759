"""What to train: the objective, its negatives and its memory, on top of the arguments of ``transformers.Trainer``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from cpo_kernels.objective import LOSS_TYPES, Objective

REFERENCES = ("frozen", "none")


@dataclass
class CPOConfig(TrainingArguments):
    """Arguments of :class:`~cpo_kernels.trainer.CPOTrainer`: ``L = alpha * CPO + (1 - alpha) * MLE``.

    CPO is the objective of arXiv 2502.16433: the ground truth against synthetic negatives, as log-likelihood ratios
    to a frozen copy of the model. With ``reference="none"`` and one negative it is that of arXiv 2401.08417; with
    ``margin`` and ``length_normalized`` as well, SimPO (arXiv 2405.14734).

    Raises:
        ValueError: a value outside its range, or values that contradict each other; the message names both.
    """

    alpha: float = field(default=0.5, metadata={"help": "Weight of the contrast; 1 - alpha is that of the MLE."})
    beta: float = field(default=0.1, metadata={"help": "Factor of the log-likelihood ratios in the contrast."})
    margin: float = field(default=0.0, metadata={"help": "Added to the score of every negative."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability of a flipped pair; one negative only."})
    loss_type: str = field(default="plackett_luce", metadata={"help": f"One of {', '.join(LOSS_TYPES)}."})
    length_normalized: bool = field(
        default=False, metadata={"help": "Contrast the mean instead of the sum of the token log-probabilities."}
    )
    reference: str = field(
        default="frozen", metadata={"help": "frozen: a copy of the model as it was at the start; none: no reference."}
    )
    num_batch_negatives: int = field(
        default=1, metadata={"help": "Completions of other training examples contrasted with each ground truth."}
    )
    num_truncation_negatives: int = field(
        default=1, metadata={"help": "Truncations of the ground truth contrasted with it; no extra forward pass."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt and completion together, at most."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of the prompt, at most; its end is kept. Default: half of max_length."}
    )
    max_logits_bytes: int | None = field(
        default=None, metadata={"help": "Budget for the logits held at once. Default: the backend's."}
    )
    candidate_eps: float | None = field(
        default=None,
        metadata={"help": "Leave candidates that the contrast has settled out of the gradient: see cpo_kernels.head."},
    )
    grad_filter_eps: float | None = field(
        default=None,
        metadata={"help": "Leave vocabulary columns without a gradient above this out of it: see cpo_kernels.head."},
    )
    backend: str = field(default="auto", metadata={"help": "Backend of the kernels; see cpo_kernels.backends."})

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    # A non-finite loss must show in the logs, not be replaced by an average.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and Inf out of the logged loss."})
    # Examples carry text and indices that no model's forward takes.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_objective()
        self._check_negatives()
        self._check_lengths()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: examples are text, which no model's forward takes")

    @property
    def prompt_budget(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length

    @property
    def contrasts(self) -> bool:
        """Whether the loss has a contrastive part."""
        return self.alpha > 0

    @property
    def objective(self) -> dict[str, Any]:
        """The objective's keywords of :func:`cpo_kernels.linear_cpo_loss`."""
        return {
            "beta": self.beta,
            "margin": self.margin,
            "label_smoothing": self.label_smoothing,
            "loss_type": self.loss_type,
            "length_normalized": self.length_normalized,
            "contrast_weight": self.alpha,
            "mle_weight": 1 - self.alpha,
        }

    @property
    def num_negatives(self) -> int:
        """Negatives of each group, at most (a short completion has fewer truncations)."""
        return self.num_batch_negatives + self.num_truncation_negatives

    def _check_objective(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        Objective(**self.objective)  # raises for the rest
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} smooths cross entropy, which this trainer does "
                "not compute from logits; label_smoothing is that of the contrast"
            )
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {REFERENCES}, got {self.reference!r}")

    def _check_negatives(self) -> None:
        for name in ("num_batch_negatives", "num_truncation_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.contrasts and self.num_negatives == 0:
            raise ValueError(
                f"alpha={self.alpha} contrasts the ground truth with negatives, but num_batch_negatives and "
                "num_truncation_negatives are both 0; set one of them, or alpha=0 for plain MLE"
            )
        pairs_only = Objective(**self.objective).pairs_only
        if pairs_only and self.num_negatives > 1:
            raise ValueError(
                f"{pairs_only} is defined for one negative, got num_batch_negatives={self.num_batch_negatives} and "
                f"num_truncation_negatives={self.num_truncation_negatives}"
            )

    def _check_lengths(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if not 0 < self.prompt_budget < self.max_length:
            raise ValueError(
                f"max_prompt_length must be in [1, max_length) = [1, {self.max_length}), got {self.max_prompt_length}"
            )
