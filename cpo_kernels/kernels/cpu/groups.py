"""Groups of candidates on the compiled CPU backend: the contrast of a chunk, and the loss with its metrics.

Checks and addresses as in :mod:`cpo_kernels.kernels.cpu.rows`; the arguments are those of
:mod:`cpo_kernels.kernels.triton.contrast` and :mod:`cpo_kernels.kernels.triton.summary`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.checks import CPU, check
from cpo_kernels.loss_table import KERNEL_CODES

from .extension import extension

# The loops are over pairs of candidates, one after the other; torch's operators, on all threads, are faster for more.
MAX_CANDIDATES = 256


def contrast(
    logps: Tensor,
    token_starts: Tensor,
    segment_starts: Tensor | None,
    lengths: Tensor,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    *,
    contrast_weight: float,
    mle_weight: float,
    num_groups: float,
    num_target_tokens: float | Tensor,
    gain: float,
    max_candidates: int,
    **objective: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the segment sums (S,) of some whole groups, and ``gain * dloss / dlogp`` (n,) of all of their slots.

    ``token_starts`` and ``segment_starts`` may be slices of longer prefix counts: they count from their first element.

    Args:
        logps: (n,) float32 token log-probabilities in segment order; 0 in slots without a token.
        token_starts: (S + 1,) int64 prefix count of the slots of each segment.
        segment_starts: (G + 1,) int64 prefix count of the segments of each group; None: ``max_candidates`` each.
        lengths: (S,) int64 tokens present in each segment; 0 makes the candidate absent.
        ref_logps: (S,) float32 sums, or None.
        ranks: (S,) integers or None for (0, 1, ..., 1) in each group.
        contrast_weight: a number of :class:`cpo_kernels.options.Objective`, as ``mle_weight`` and ``objective``: beta,
            margin, label_smoothing, loss_type and length_normalized.
        mle_weight: see there.
        num_groups: denominator of the contrast.
        num_target_tokens: denominator of the negative log-likelihood; a number or a () float64 tensor.
        gain: factor on every coefficient.
        max_candidates: segments of the largest group, at most 256.
        **objective: see ``contrast_weight``.

    Returns:
        Both float32, accumulated in float64. A coefficient is 0 in absent candidates, and NaN in all others of a group
        with a score that is NaN or +inf, unless ``contrast_weight`` is 0.

    Raises:
        ValueError: a tensor or number that does not fit this description; the message has the offending value.
    """
    logps = logps.contiguous()
    check("logps", logps, (None,), (torch.float32,))
    groups = _Groups(segment_starts, lengths, ref_logps, ranks, max_candidates, **objective)
    starts = token_starts.contiguous()
    check("token_starts", starts, (lengths.numel() + 1,), (torch.int64,))
    sums = torch.empty(lengths.shape, dtype=torch.float32, device=CPU)
    coef = torch.empty(logps.shape, dtype=torch.float32, device=CPU)
    extension().contrast(
        **groups.arguments,
        logps=logps.data_ptr(),
        token_starts=starts.data_ptr(),
        slots=logps.numel(),
        contrast_scale=gain * contrast_weight / num_groups,
        mle_scale=gain * mle_weight / float(num_target_tokens),
        sums=sums.data_ptr(),
        coef=coef.data_ptr(),
    )
    return sums, coef


def summarize(
    sums: Tensor,
    segment_starts: Tensor | None,
    lengths: Tensor,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    *,
    contrast_weight: float,
    mle_weight: float,
    num_groups: float,
    num_target_tokens: float | Tensor | None,
    max_candidates: int,
    shape: tuple[int, ...] | None = None,
    **objective: Any,
) -> tuple[Tensor, ...]:
    """Compute the loss and its metrics, as :func:`cpo_kernels.objective.summarize` does.

    Args:
        sums: (S,) float32 sums of token log-probabilities.
        segment_starts: as for :func:`contrast`, like all arguments that are not listed here.
        lengths: see there.
        ref_logps: see there.
        ranks: see there.
        contrast_weight: see there.
        mle_weight: see there.
        num_groups: see there.
        num_target_tokens: None: the tokens of the candidates of rank 0.
        max_candidates: see there.
        shape: of log-likelihoods and rewards, of S numbers; None: (S,).
        **objective: see there.

    Returns:
        Loss, contrastive loss, negative log-likelihood, accuracy, margin and 0 (what is dropped without filters),
        scalars; log-likelihoods and rewards. Each has memory of its own, so that users may change it in place; all are
        float32.

    Raises:
        ValueError: as :func:`contrast`.
    """
    sums, groups = sums.contiguous(), _Groups(segment_starts, lengths, ref_logps, ranks, max_candidates, **objective)
    check("sums", sums, tuple(lengths.shape), (torch.float32,))
    logps, rewards = (torch.empty(shape or lengths.shape, dtype=torch.float32, device=CPU) for _ in range(2))
    numbers = torch.empty(5, dtype=torch.float32, device=CPU)
    extension().summarize(
        **groups.arguments,
        sums=sums.data_ptr(),
        contrast_weight=contrast_weight,
        mle_weight=mle_weight,
        num_groups=num_groups,
        num_target_tokens=0.0 if num_target_tokens is None else float(num_target_tokens),
        logps=logps.data_ptr(),
        rewards=rewards.data_ptr(),
        numbers=numbers.data_ptr(),
    )
    scalars = (torch.tensor(number, dtype=torch.float32, device=CPU) for number in (*numbers.tolist(), 0.0))
    return (*scalars, logps, rewards)


def count_targets(
    segment_starts: Tensor | None, lengths: Tensor, ranks: Tensor | None, *, max_candidates: int, contrasts: bool
) -> int | None:
    """Count the tokens of the candidates of rank 0; the arguments are those of :func:`contrast`.

    Returns:
        None if :func:`cpo_kernels.objective.check_problem` would refuse a group: a present candidate has a rank below
        0, or a group has no present candidate of rank 0 or, if it ``contrasts``, none behind.

    Raises:
        ValueError: as :func:`contrast`.
    """
    groups = _Segments(segment_starts, lengths, ranks, max_candidates)
    counted: int = extension().count_targets(**groups.arguments, contrasts=contrasts)
    return None if counted < 0 else counted


class _Segments:
    """The checked segments of some groups, as arguments, and the tensors whose addresses are among them."""

    def __init__(
        self, segment_starts: Tensor | None, lengths: Tensor, ranks: Tensor | None, max_candidates: int
    ) -> None:
        count = lengths.numel()
        self.tensors = {"segment_starts": segment_starts, "lengths": lengths}
        self.tensors["ranks"] = None if ranks is None else ranks.to(torch.int64)
        for name, tensor in self.tensors.items():
            if tensor is not None:
                check(name, tensor, (None if name == "segment_starts" else count,), (torch.int64,))
                self.tensors[name] = tensor.contiguous()
        self.arguments: dict[str, Any] = {
            **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in self.tensors.items()},
            "segments": count,
            "groups": count // max_candidates if segment_starts is None else segment_starts.numel() - 1,
            "max_candidates": max_candidates,
        }


class _Groups(_Segments):
    """The same with a reference and the numbers of the objective."""

    def __init__(
        self,
        segment_starts: Tensor | None,
        lengths: Tensor,
        ref_logps: Tensor | None,
        ranks: Tensor | None,
        max_candidates: int,
        *,
        beta: float,
        margin: float,
        label_smoothing: float,
        loss_type: str,
        length_normalized: bool,
    ) -> None:
        if not 1 <= max_candidates <= MAX_CANDIDATES:
            raise ValueError(f"max_candidates must be at least 1 and at most {MAX_CANDIDATES}, got {max_candidates}")
        if loss_type not in KERNEL_CODES:
            raise ValueError(f"loss_type must be one of {tuple(KERNEL_CODES)}, got {loss_type!r}")
        super().__init__(segment_starts, lengths, ranks, max_candidates)
        if ref_logps is not None:
            check("ref_logps", ref_logps, tuple(lengths.shape), (torch.float32,))
        self.ref_logps = None if ref_logps is None else ref_logps.contiguous()
        self.arguments |= {
            "ref_logps": 0 if self.ref_logps is None else self.ref_logps.data_ptr(),
            "loss": KERNEL_CODES[loss_type],
            "beta": beta,
            "label_smoothing": label_smoothing,
            "margin": margin,
            "length_normalized": length_normalized,
        }
