"""The functions of Cut Cross-Entropy with its names, signatures and return values, on our kernels.

``linear_cross_entropy`` and ``LinearCrossEntropy`` of ``cut_cross_entropy`` 25.6 (its repository; the release of 25.1
has fewer arguments), on the CPU too: change the import. The package itself is not needed.

The differences: gradients are exact unless ``filter_eps`` is a number; a target of -100 where the ``ignore_index`` is
another raises ``ValueError``; and the options of its kernels (``impl``, ``accum_e_fp32``, ``accum_c_fp32``) are taken
and change nothing but what they say of the filter: gradients are always summed in float32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cpo_kernels.engine.inputs import autocast
from cpo_kernels.engine.vocab_parallel import VocabShard
from cpo_kernels.functional import linear_token_logps
from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.options import suggests_arguments

from .cross_entropy import group_size, head_options, sum_in_one_pass
from .target_logits import target_logits
from .targets import without_ignored

# The one of its implementations that takes the filter it is given, and the others.
FILTERED = "cce"
IMPLEMENTATIONS = (
    *(FILTERED, "torch_compile", "cce_exact", "cce_kahan_full"),
    *("cce_kahan_full_c", "cce_kahan_full_e", "cce_kahan_full_c_full_e"),
)


@suggests_arguments
@dataclass
class VocabParallelOptions:
    """Which vocabulary entries this process holds, by Cut Cross-Entropy's names.

    The first call with it is a collective one, which finds the shards of all processes; later ones reuse them.

    Attributes:
        start: the first entry.
        stop: the end of the entries, exclusive.
        group: the processes that hold the head together; None: all.
        reduce_e_grad: whether the gradient of ``e`` is summed over the processes.
    """

    start: int
    stop: int
    group: Any = None
    reduce_e_grad: bool = True

    @classmethod
    def from_vocab(cls, vocab_size: int, group: Any = None, reduce_e_grad: bool = True) -> VocabParallelOptions:
        """Split a vocabulary as evenly as possible over the processes, the larger parts first."""
        rank, processes = distributed.get_rank(group), distributed.get_world_size(group)
        least, more = divmod(vocab_size, processes)
        start = rank * least + min(rank, more)
        return cls(start, start + least + (rank < more), group, reduce_e_grad)


def shard_of(options: Any, c: Tensor) -> VocabShard | None:
    """Return the shard that options describe, ours, Cut Cross-Entropy's own, or already a :class:`VocabShard`."""
    if options is None or isinstance(options, VocabShard):
        return options
    if c.shape[0] != options.stop - options.start:
        raise ValueError(
            f"c must have the {options.stop - options.start} rows {options.start} to {options.stop} of "
            f"vocab_parallel_options, got {tuple(c.shape)}"
        )
    described = (options.start, options.stop, options.group, options.reduce_e_grad)
    kept = getattr(options, "_shard_of", None)
    if kept is None or kept[0] != described:
        found = VocabShard.of(c, options.group, start=options.start, reduce_grad_hidden=options.reduce_e_grad)
        kept = options._shard_of = (described, found)
    return kept[1]


@suggests_arguments
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Any = "cce",
    vocab_parallel_options: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the cross-entropy of tokens under ``e @ c.T``, whose logits are never stored whole; differentiable.

    Args:
        e: (..., T, H), hidden states.
        c: (V, H), the head.
        targets: (..., T) integers.
        bias: (V,) or None.
        ignore_index: the target that says that there is no token.
        softcap: bound of the logits, or None.
        reduction: ``"mean"`` over tokens (NaN if there is none), ``"sum"``, or ``"none"``: 0 where there is no token.
        shift: how many positions later the target of a row stands: 0 for aligned ones, True or 1 for next tokens.
        return_lse: whether to return the log-sum-exps too, (..., T - shift), differentiable, 0 where there is no token.
            Logits of half precision are then kept in float32.
        filter_eps: a number: vocabulary columns in which no probability of a chunk of rows is above it enter the
            gradients as one column, their sum, where the loss is reduced, no log-sum-exp is returned and the head is
            whole. ``"auto"``, Cut Cross-Entropy's ``"high"`` and None: exact gradients.
        accum_e_fp32: no effect.
        accum_c_fp32: no effect.
        filter_e_grad: False: exact gradients, of ``c`` too.
        filter_c_grad: False: exact gradients, of ``e`` too.
        impl: the name of one of Cut Cross-Entropy's implementations, or of its enumeration; those without a filter
            have exact gradients.
        vocab_parallel_options: :class:`VocabParallelOptions`, those of Cut Cross-Entropy, or a
            :class:`cpo_kernels.VocabShard`, for a head that is split over processes along the vocabulary.

    Returns:
        The loss, float32 (float64 for float64): a scalar, or (..., T - shift); with ``return_lse``, a pair.

    Raises:
        ValueError: shapes or options that do not fit, a target out of range, or a -100 that is not ``ignore_index``.
    """
    if not (bias is None or isinstance(bias, Tensor)):
        raise ValueError(f"bias must be a tensor or None, got {bias!r}: ignore_index is the argument after it")
    if e.dim() < 2 or targets.shape != e.shape[:-1]:
        raise ValueError(f"e must be (..., T, H) and targets (..., T), got {tuple(e.shape)} and {tuple(targets.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= int(shift) < targets.shape[-1]:
        raise ValueError(f"shift must be in [0, {targets.shape[-1]}), got {shift}")
    exact = not (filter_e_grad and filter_c_grad) or named(impl) != FILTERED
    shard = shard_of(vocab_parallel_options, c)
    eps = None if exact or shard is not None else threshold(filter_eps)
    aligned = shifted(without_ignored(targets, ignore_index), int(shift))
    e, c, bias = autocast(e, c, bias)
    rows, words = e.flatten(0, -2), aligned.flatten()
    tokens = (words != IGNORE_INDEX).sum()
    head = {**head_options(e, bias, softcap, exact=return_lse), "vocab_shard": shard}
    with torch.autocast(e.device.type, enabled=False):
        if reduction != "none" and not return_lse and not torch.compiler.is_compiling():
            divisor = tokens if reduction == "mean" else 1
            head |= filtered(eps, len(words), reduction)
            return sum_in_one_pass(rows, c, words, lambda part, logps: -logps / divisor, (), **head)[0]
        logps = linear_token_logps(rows, c, words, **head)
        width = aligned.shape[-1] - int(shift)
        if reduction == "none":
            loss = -logps.view(aligned.shape)[..., :width]
        else:
            loss = -logps.sum() / (tokens if reduction == "mean" else 1)
        if not return_lse:
            return loss
        lse = target_logits(rows, c, words, bias, softcap, shard) - logps
        return loss, lse.view(aligned.shape)[..., :width]


def named(impl: Any) -> str:
    """Return the name of an implementation, in lower case; raise ``ValueError`` for one that does not exist."""
    name = impl if isinstance(impl, str) else getattr(impl, "name", str(impl)).lower()
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    return name


def threshold(eps: float | str | None) -> float | None:
    """Return the threshold of a filter, None for exact gradients; raise ``ValueError`` for another word."""
    if isinstance(eps, str) and eps not in ("auto", "high"):
        raise ValueError(f"filter_eps must be a number, 'auto' or None, got {eps!r}")
    return None if isinstance(eps, str) else eps


def filtered(eps: float | None, rows: int, reduction: str) -> dict[str, float]:
    """Return the filter of the head for a threshold of probabilities.

    The head's is in units of 1 over its number of groups, where a token's coefficient is 1 over that of tokens, or 1.
    """
    if eps is None:
        return {}
    groups = rows // group_size(rows)
    return {"grad_filter_eps": eps * groups / (rows if reduction == "mean" else 1)}


def shifted(targets: Tensor, shift: int) -> Tensor:
    """Return targets (..., T) aligned with the rows that predict them, ``shift`` positions before; -100 at the end."""
    if shift == 0:
        return targets
    end = targets.new_full((*targets.shape[:-1], shift), IGNORE_INDEX)
    return torch.cat([targets[..., shift:], end], -1)


@suggests_arguments
class LinearCrossEntropy(nn.Module):
    """:func:`linear_cross_entropy` as a module; the options are its arguments."""

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: Any = "cce",
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index, self.softcap, self.reduction = ignore_index, softcap, reduction
        self.shift, self.filter_eps, self.return_lse = shift, filter_eps, return_lse
        self.accum_e_fp32, self.accum_c_fp32 = accum_e_fp32, accum_c_fp32
        self.filter_e_grad, self.filter_c_grad, self.impl = filter_e_grad, filter_c_grad, impl

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return what :func:`linear_cross_entropy` of the module's options returns."""
        return linear_cross_entropy(
            *(e, c, targets, bias, self.ignore_index, self.softcap, self.reduction, self.shift, self.return_lse),
            *(self.filter_eps, self.accum_e_fp32, self.accum_c_fp32, self.filter_e_grad, self.filter_c_grad),
            self.impl,
        )
