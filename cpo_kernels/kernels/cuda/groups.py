"""Groups of candidates on the compiled CUDA backend: the contrast in one launch, and the whole objective in one.

Checks and addresses as in :mod:`cpo_kernels.kernels.cuda.rows`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.checks import check, share_memory
from cpo_kernels.loss_table import KERNEL_CODES

from . import extension
from .rows import Rows

MAX_CANDIDATES = 1024  # of a group, as in csrc/cuda/launch.h


def contrast(
    logps: Tensor,
    token_starts: Tensor,
    segment_starts: Tensor | None,
    lengths: Tensor,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    *,
    beta: float,
    margin: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    contrast_weight: float,
    mle_weight: float,
    num_groups: float,
    num_target_tokens: float | Tensor,
    gain: float,
    max_candidates: int,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the segment sums of some whole groups and their tokens' coefficients, in one launch.

    ``token_starts`` and ``segment_starts`` may be slices of longer prefix counts: they count from their first element.

    Args:
        logps: (n,) float32 token log-probabilities in segment order; 0 in slots without a token.
        token_starts: (S + 1,) int64 prefix count of the slots of each segment.
        segment_starts: (G + 1,) int64 prefix count of the segments of each group; None: ``max_candidates`` each.
        lengths: (S,) int64 tokens present in each segment; 0 makes the candidate absent.
        ref_logps: (S,) float32 sums, or None.
        ranks: (S,) integers or None for (0, 1, ..., 1) in each group.
        beta: as the other options a number of :class:`cpo_kernels.options.Objective`.
        num_groups: denominator of the contrast.
        num_target_tokens: denominator of the negative log-likelihood; a number or a () float64 tensor on the device.
        gain: factor on every coefficient.
        max_candidates: segments of the largest group, at most 1024.
        threads: of a block, a multiple of 32; 0: the kernel's choice.

    Returns:
        sums (S,) float32, accumulated in float64, and ``gain * dloss / dlogp`` (n,) float32 for every slot of a
        segment: 0 in absent candidates, and NaN in all others of a group whose scores are not finite.

    Raises:
        ValueError: a tensor or number that does not fit this description; the message has the offending value.
        RuntimeError: what CUDA says where the launch fails.
    """
    groups = _Groups(
        (logps, token_starts, segment_starts, lengths, ref_logps, ranks),
        beta=beta,
        margin=margin,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        length_normalized=length_normalized,
        contrast_weight=contrast_weight,
        mle_weight=mle_weight,
        num_groups=num_groups,
        num_target_tokens=num_target_tokens,
        gain=gain,
        max_candidates=max_candidates,
    )
    if lengths.numel():
        extension.load().contrast(**extension.queue(logps.device), **groups.arguments, threads=threads)
    return groups.sums, groups.coef


def cpo_loss(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    token_starts: Tensor,
    segment_starts: Tensor | None,
    lengths: Tensor,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    threads: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run ``row_forward``, :func:`contrast` and ``row_backward`` of whole groups in one cooperative launch.

    A coefficient depends on the log-probabilities of its whole group. So where a gradient is asked for, the logits are
    read twice and the gradient is written once.

    Args:
        logits: (R, V), a row for each slot of the segments, in their order; otherwise as for ``row_forward``.
        targets: (R,) int64.
        grad: (R, V) of the dtype of the logits and unit column stride, or the logits themselves; receives
            ``gain * dloss / dlogits``. None: the gradient is not computed, and the logits are read once.
        token_starts: as in :func:`contrast`, like all arguments that are not listed here.
        bias: as in ``cuda_rows.row_forward``, like the numbers after it.
        threads: of a block, a multiple of 32; 0: the kernel's choice.
        **options: as in :func:`contrast`.

    Returns:
        sums (S,) and logps (R,), float32.

    Raises:
        ValueError: as ``cuda_rows.row_forward`` and :func:`contrast`, and for a ``grad`` that does not fit.
        RuntimeError: what CUDA says where the launch fails.
    """
    rows = Rows(logits, targets, None, bias, logit_scale, softcap, temperature)
    R, device = logits.shape[0], logits.device
    logps = torch.empty((R,), dtype=torch.float32, device=device)
    stats = torch.empty((2, R), dtype=torch.float32, device=device)
    groups = _Groups((logps, token_starts, segment_starts, lengths, ref_logps, ranks), **options)
    if grad is not None:
        check("grad", grad, tuple(logits.shape), (logits.dtype,), device)
        same = grad.data_ptr() == logits.data_ptr() and grad.stride() == logits.stride()
        if (logits.shape[1] > 1 and grad.stride(1) != 1) or (R > 1 and grad.stride(0) < logits.shape[1]):
            raise ValueError(f"grad has strides {grad.stride()}; expected a column stride of 1 and rows apart")
        if share_memory(grad, logits) and not same:
            raise ValueError("grad shares memory with logits; expected the logits themselves or a tensor apart")
    if lengths.numel():
        extension.load().cpo_loss(
            **extension.queue(device),
            **rows.arguments,
            **groups.arguments,
            threads=threads,
            stats=stats.data_ptr(),
            grad=0 if grad is None else grad.data_ptr(),
            grad_stride=0 if grad is None else grad.stride(0),
        )
    return groups.sums, logps


class _Groups:
    """The checked arguments of the contrast, the tensors whose addresses are among them, and its results."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
        *,
        beta: float,
        margin: float,
        label_smoothing: float,
        loss_type: str,
        length_normalized: bool,
        contrast_weight: float,
        mle_weight: float,
        num_groups: float,
        num_target_tokens: float | Tensor,
        gain: float,
        max_candidates: int,
    ) -> None:
        if not 1 <= max_candidates <= MAX_CANDIDATES:
            raise ValueError(f"max_candidates must be at least 1 and at most {MAX_CANDIDATES}, got {max_candidates}")
        if loss_type not in KERNEL_CODES:
            raise ValueError(f"loss_type must be one of {tuple(KERNEL_CODES)}, got {loss_type!r}")
        counted = num_target_tokens if isinstance(num_target_tokens, Tensor) else None
        mle_divisor = 1.0 if isinstance(num_target_tokens, Tensor) else num_target_tokens
        self.tensors = self.checked(tensors, counted)
        logps, segment_starts, lengths = (self.tensors[name] for name in ("logps", "segment_starts", "lengths"))
        assert logps is not None and lengths is not None
        self.sums, self.coef = torch.empty_like(lengths, dtype=torch.float32), torch.empty_like(logps)
        S = lengths.numel()
        self.arguments: dict[str, Any] = {
            **{name: 0 if x is None else x.data_ptr() for name, x in self.tensors.items()},
            "segments": S,
            "slots": logps.numel(),
            "sums": self.sums.data_ptr(),
            "coef": self.coef.data_ptr(),
            "groups": S // max_candidates if segment_starts is None else segment_starts.numel() - 1,
            "max_candidates": max_candidates,
            "length_normalized": length_normalized,
            "loss": KERNEL_CODES[loss_type],
            "beta": beta,
            "label_smoothing": label_smoothing,
            "margin": margin,
            "contrast_scale": gain * contrast_weight / num_groups,
            "mle_scale": gain * mle_weight / mle_divisor,
        }

    @staticmethod
    def checked(
        tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None], counted: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Check the tensors, and return them by name, contiguous and of the dtypes that the kernel reads."""
        logps, token_starts, segment_starts, lengths, ref_logps, ranks = tensors
        S, device = lengths.numel(), logps.device
        ranks = None if ranks is None else ranks.to(torch.int64)
        expected: dict[str, tuple[Tensor | None, tuple[int | None, ...], torch.dtype]] = {
            "logps": (logps, (None,), torch.float32),
            "token_starts": (token_starts, (S + 1,), torch.int64),
            "segment_starts": (segment_starts, (None,), torch.int64),
            "lengths": (lengths, (S,), torch.int64),
            "ref_logps": (ref_logps, (S,), torch.float32),
            "ranks": (ranks, (S,), torch.int64),
            "num_target_tokens": (counted, (), torch.float64),
        }
        for name, (tensor, shape, dtype) in expected.items():
            if tensor is not None:
                check(name, tensor, shape, (dtype,), device)
        return {name: None if x is None else x.contiguous() for name, (x, _, _) in expected.items()}
