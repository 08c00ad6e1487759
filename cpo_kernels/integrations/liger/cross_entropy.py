"""Liger's fused linear cross-entropy, with its signature and return values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpo_kernels.engine.inputs import autocast
from cpo_kernels.integrations.cross_entropy import TokenLoss, cross_entropy, predicted_words
from cpo_kernels.integrations.targets import without_ignored
from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.options import suggests_arguments


@dataclass
class CrossEntropyOutput:
    """What is asked for besides the loss, by Liger's names.

    Attributes:
        loss: a scalar, or (N,) with ``reduction="none"``.
        z_loss: the part of the loss that is the z-loss, without gradient, in the dtype of the input; or None.
        token_accuracy: share of tokens whose target has the largest logit, or 1 and 0 for each token with
            ``reduction="none"``; or None.
        predicted_tokens: (N,) int64, the word of the largest logit, -1 where there is no token; or None.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


@suggests_arguments
class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """The cross-entropy of tokens under ``_input @ lin_weight.T``, whose logits are never stored whole.

    Args:
        ce_weight: (V,) floating point, weights of the words as in ``F.cross_entropy``, or None.
        ignore_index: the target that says that there is no token.
        lse_square_scale: weight of the z-loss, the squared log-sum-exp.
        label_smoothing: the probability that is spread over all words.
        reduction: ``"mean"`` over tokens, ``"sum"`` or ``"none"``.
        softcap: bound of the logits, or None.
        return_z_loss: whether to return a :class:`CrossEntropyOutput` with the z-loss.
        accum_dtype: no effect: gradients are summed in float32 or better.
        use_token_scaling: whether each token's loss is multiplied by its probability, without gradient.
        return_token_accuracy: whether to return a :class:`CrossEntropyOutput` with the accuracy: one more product.
        return_predicted_tokens: whether to return one with the predicted tokens: one more product.

    Raises:
        ValueError: an option that is out of its range.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be above 0 or None, got {softcap}")
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy, self.return_predicted_tokens = return_token_accuracy, return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """Return the loss, or a :class:`CrossEntropyOutput` if more is asked for; 0 where no token is left.

        Args:
            lin_weight: (V, H).
            _input: (N, H).
            target: (N,) integers, aligned with _input.
            bias: (V,) or None.

        Raises:
            ValueError: shapes that do not fit, or a -100 that is not the ``ignore_index``.
        """
        if _input.dim() != 2 or target.shape != _input.shape[:1] or len(target) == 0:
            raise ValueError(
                f"_input must be (N, H) with N >= 1 and target (N,), got {tuple(_input.shape)} and "
                f"{tuple(target.shape)}"
            )
        check_class_weights(self.ce_weight, len(lin_weight))
        targets = without_ignored(target, self.ignore_index)
        hidden, weight, bias = autocast(_input, lin_weight, bias)
        kind = TokenLoss(
            label_smoothing=self.label_smoothing,
            z_weight=self.lse_square_scale,
            class_weights=self.ce_weight,
            of_probability=self.use_token_scaling,
            softcap=self.softcap,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            loss, z_loss = cross_entropy(hidden, weight, targets, bias, kind, self.reduction)
            if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
                return loss
            out = CrossEntropyOutput(loss, z_loss.to(_input.dtype) if self.return_z_loss else None)
            if not (self.return_token_accuracy or self.return_predicted_tokens):
                return out
            absent = targets == IGNORE_INDEX
            words = predicted_words(hidden, weight, bias, self.softcap).masked_fill(absent, -1)
        if self.return_token_accuracy:
            right = (words == targets).to(loss.dtype)
            out.token_accuracy = right if self.reduction == "none" else right.sum() / (~absent).sum()
        if self.return_predicted_tokens:
            out.predicted_tokens = words
        return out


def check_class_weights(weights: Tensor | None, vocab: int) -> None:
    """Raise ``ValueError`` for weights of the words that are not floating point (V,)."""
    if weights is not None and (weights.shape != (vocab,) or not weights.is_floating_point()):
        raise ValueError(f"ce_weight must be floating point ({vocab},), got {weights.dtype} {tuple(weights.shape)}")
