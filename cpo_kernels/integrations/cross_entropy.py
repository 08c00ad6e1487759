"""Cross-entropies of tokens with label smoothing, class weights and a z-loss, which fused libraries have in common.

They are functions of three numbers a token: its log-probability, whose gradient is the engine's; its logit, a dot
product; and a sum of its logits over the vocabulary, which is linear in the hidden states. The logits are not stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from cpo_kernels.functional import linear_sequence_loss, linear_token_logps
from cpo_kernels.kernels.numerics import IGNORE_INDEX, accumulate_dtype
from cpo_kernels.kernels.transform import transform_logits

from .logit_sums import column_sums
from .target_logits import target_logits

# Logits held at once where they are made outside the engine: 64 MiB.
LOGITS = 2**24
# Tokens of a group of the engine, at most: groups are the parts that chunks are made of.
GROUP = 64

Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class TokenLoss:
    """What the loss of a token is; the formulas are those of ``F.cross_entropy`` and of PaLM (arXiv 2204.02311).

    Attributes:
        label_smoothing: the probability that is spread over all words.
        z_weight: weight of the squared log-sum-exp.
        class_weights: (V,) weights of the words, or None.
        of_probability: whether a token's loss is multiplied by its probability, without gradient.
        softcap: bound of the logits, or None.
    """

    label_smoothing: float = 0.0
    z_weight: float = 0.0
    class_weights: Tensor | None = None
    of_probability: bool = False
    softcap: float | None = None

    @property
    def takes_logits(self) -> bool:
        """Whether a token's logit has a part in its loss."""
        return bool(self.label_smoothing or self.z_weight)


class Losses(NamedTuple):
    """The losses of a call: scalars, or (N,) without a reduction.

    Attributes:
        loss: differentiable.
        z_loss: its part that is the z-loss, without gradient.
    """

    loss: Tensor
    z_loss: Tensor


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, kind: TokenLoss, reduction: str
) -> Losses:
    """Compute the cross-entropy of tokens; 0 where there is no token, and where no token is left.

    Args:
        hidden: (N, H).
        weight: (V, H).
        targets: (N,) int64, -100 for no token.
        bias: (V,) or None.
        kind: what the loss of a token is.
        reduction: ``"mean"`` over tokens (with class weights, weighted by them), ``"sum"`` or ``"none"``.
    """
    absent = targets == IGNORE_INDEX
    tokens, mean = (~absent).sum(), reduction == "mean"
    smoothing, vocab, dtype = kind.label_smoothing, len(weight), accumulate_dtype(hidden.dtype)
    of_tokens, total = (~absent).to(dtype), tokens.clamp(min=1)
    all_words: float | Tensor = vocab
    if kind.class_weights is not None:
        of_words = kind.class_weights.to(dtype)
        of_tokens = of_words[targets.masked_fill(absent, 0)].masked_fill(absent, 0.0)
        total, all_words = of_tokens.sum().where(tokens > 0, 1.0), of_words.sum()

    def z_losses(logps: Tensor, logits: Tensor) -> Tensor:
        losses = kind.z_weight * (logits - logps).square()
        losses = losses / tokens.clamp(min=1) if mean else losses
        return losses * logps.detach().exp() if kind.of_probability else losses

    def formula(part: slice, logps: Tensor, *more: Tensor) -> Tensor:
        losses = -(1 - smoothing) * of_tokens[part] * logps
        if smoothing:
            logits, sums = more
            losses = losses + smoothing / vocab * (all_words * (logits - logps) - sums)
        losses = losses / total if mean else losses
        losses = losses * logps.detach().exp() if kind.of_probability else losses
        return losses + z_losses(logps, more[0]) if kind.z_weight else losses

    more = tuple(more_of_tokens(hidden, weight, targets, bias, kind))
    head = head_options(hidden, bias, kind.softcap, exact=kind.takes_logits)
    if reduction == "none" or torch.compiler.is_compiling():
        logps = linear_token_logps(hidden, weight, targets, **head)
        loss = formula(slice(None), logps, *more)
        loss = loss if reduction == "none" else loss.sum()
    else:
        loss, logps = sum_in_one_pass(hidden, weight, targets, formula, more, **head)
    z_loss = torch.zeros_like(logps.detach())
    if kind.z_weight:
        z_loss = z_losses(logps.detach(), more[0].detach())
    return Losses(loss, z_loss if reduction == "none" else z_loss.sum())


def sum_in_one_pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, formula: Formula, more: tuple[Tensor, ...], **head: Any
) -> tuple[Tensor, Tensor]:
    """Sum the losses of tokens, whose gradients are built together with their log-probabilities.

    Args:
        hidden: (N, H).
        weight: (V, H).
        targets: (N,) int64, -100 for no token.
        formula: ``formula(part, logps, *more)`` returns losses (n,) of the tokens ``part``, a slice, from what is given
            of them.
        more: (N,) each, what the losses depend on besides the log-probabilities; gradients flow to them too.
        **head: options of the head.

    Returns:
        The sum, differentiable, and the log-probabilities (N,), which are not.
    """
    size = group_size(len(targets))
    values, seen = [x.detach() for x in more], list[Tensor]()

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        part, logps = slice(groups.start * size, groups.stop * size), logps.flatten()
        seen.append(logps.detach())
        return formula(part, logps, *(x[part] for x in values)).sum()

    grouped = hidden.unflatten(0, (-1, size, 1)), weight, targets.unflatten(0, (-1, size, 1))
    loss, logps = linear_sequence_loss(*grouped, loss_fn, **head), torch.cat(seen)
    tracked = [x for x in more if x.requires_grad]
    if tracked:
        # The engine's gradient is that of the log-probabilities; that of the rest is linear in it.
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in more]
            slopes = torch.autograd.grad(
                formula(slice(None), logps, *leaves).sum(), [x for x in leaves if x.requires_grad]
            )
            beside = torch.stack([(slope * x).sum() for slope, x in zip(slopes, tracked, strict=True)]).sum()
            loss = loss + (beside - beside.detach())
    return loss, logps


def group_size(tokens: int) -> int:
    """Return how many tokens a group of the engine has."""
    return math.gcd(tokens, GROUP)


def head_options(hidden: Tensor, bias: Tensor | None, softcap: float | None, *, exact: bool) -> dict[str, Any]:
    """Return the options of the head; ``exact`` keeps logits of half precision in float32.

    A log-sum-exp that is a logit less a log-probability needs both of the same logits.
    """
    half = exact and hidden.dtype in (torch.bfloat16, torch.float16)
    return {"bias": bias, "softcap": softcap, "logits_dtype": torch.float32 if half else None}


def more_of_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, kind: TokenLoss
) -> list[Tensor]:
    """Return what the loss depends on besides log-probabilities: logits (N,), then sums of logits (N,)."""
    if not kind.takes_logits:
        return []
    more = [target_logits(hidden, weight, targets, bias, kind.softcap)]
    if kind.label_smoothing:
        absent = targets == IGNORE_INDEX
        # Rows without a token may hold anything, and 0 times that need not be 0.
        rows = hidden.masked_fill(absent[:, None], 0.0).to(accumulate_dtype(hidden.dtype))
        weights = None if kind.class_weights is None else kind.class_weights.to(rows.dtype)
        of_rows = summed_over_words if kind.softcap is None else capped_over_words
        more.append(of_rows(rows, weight, bias, weights, kind.softcap).masked_fill(absent, 0.0))
    return more


def summed_over_words(
    rows: Tensor, weight: Tensor, bias: Tensor | None, of_words: Tensor | None, softcap: float | None
) -> Tensor:
    """Sum the logits of each row (n, H), times the numbers ``of_words`` (V,) if given, over all words: (n,)."""
    assert softcap is None, "a bounded logit is not linear in the hidden states"
    sums = rows @ column_sums(weight, of_words)
    if bias is None:
        return sums
    shifts = bias.to(rows.dtype)
    return sums + (shifts if of_words is None else shifts * of_words).sum()


def capped_over_words(
    rows: Tensor, weight: Tensor, bias: Tensor | None, of_words: Tensor | None, softcap: float | None
) -> Tensor:
    """Compute what :func:`summed_over_words` computes, of logits with a softcap: in parts of the vocabulary.

    The parts are computed a second time for their gradient.
    """

    def of_part(rows: Tensor, part: Tensor, shift: Tensor | None, shares: Tensor | None) -> Tensor:
        logits = transform_logits(linear(rows, part.to(rows.dtype)), shift, softcap=softcap)
        return logits.sum(-1) if shares is None else logits @ shares

    words = max(1, LOGITS // len(rows))
    parts = weight.split(words)
    shifts = [None] * len(parts) if bias is None else bias.to(rows.dtype).split(words)
    shares = [None] * len(parts) if of_words is None else of_words.split(words)
    sums = [checkpoint(of_part, rows, *given, use_reentrant=False) for given in zip(parts, shifts, shares, strict=True)]
    return torch.stack(sums).sum(0)


@torch.no_grad()
def predicted_words(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Return the word (N,) of the largest logit of each row (N, H), the first of equal ones: one more product."""
    dtype = accumulate_dtype(hidden.dtype)
    blocks = hidden.split(max(1, LOGITS // len(weight)))
    return torch.cat(
        [transform_logits(linear(rows, weight).to(dtype), bias, softcap=softcap).argmax(-1) for rows in blocks]
    )
