"""Row kernels of the compiled CUDA backend: softmax statistics, log-probabilities, gradients of logits.

Every function here checks device, dtype, shape and strides before it takes an address. Values stay on the device and
are not checked: no logit is read for a target outside [0, V), its log-probability is NaN, and no gradient is written
for it. Nothing waits for the device, and every function can be captured into a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.checks import BIAS_DTYPES, DTYPE_CODES, check, front_halves
from cpo_kernels.kernels.transform import fold_transform

from . import extension

VECTOR_BYTES = 16
MAX_VOCAB = 2**31 - 2**16  # columns are counted in 32 bits, in tiles


def row_forward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run :func:`cpo_kernels.kernels.ops.row_forward` in one read of the logits; rows without a token are not read.

    Args:
        logits: (R, V) float32, bfloat16 or float16 on a GPU, of unit column stride and any row stride.
        targets: (N,) int64; one outside [0, V) other than -100 is not read and has log-probability NaN.
        row_starts: (R + 1,) int64 prefix count of the tokens of each row, or None for one token a row.
        bias: (V,) floating-point, or None.
        logit_scale: factor of the logits and the bias.
        softcap: bound of the scaled logits, 0.0 for none.
        temperature: divisor of the capped logits.
        threads: of a block, a multiple of 32; 0: the kernel's choice.

    Returns:
        stats (2, R) float32, maximum and log-sum-exp minus maximum, 0 for rows without a token; logps (N,) float32.

    Raises:
        ValueError: a tensor or number that does not fit this description; the message has the offending value.
        RuntimeError: what CUDA says where a launch fails.
    """
    rows = Rows(logits, targets, row_starts, bias, logit_scale, softcap, temperature)
    stats = torch.empty((2, logits.shape[0]), dtype=torch.float32, device=logits.device)
    logps = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    extension.load().row_forward(
        **extension.queue(logits.device),
        **rows.arguments,
        threads=threads,
        stats=stats.data_ptr(),
        logps=logps.data_ptr(),
    )
    return stats, logps


def row_backward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    threads: int = 0,
) -> Tensor:
    """Return the gradient of ``sum_n coef_n * logp_n`` by the raw logits, a new (R, V) tensor of their dtype.

    Rows whose tokens all have a coef of 0, and tokens of target -100 whatever their coef, give exact zeros and cost no
    read of the logits.

    Args:
        logits: as in :func:`row_forward`, like all arguments that are not listed here.
        stats: (2, R) float32, from :func:`row_forward`.
        coef: (N,) float32, the derivative of the loss with respect to each log-probability.

    Raises:
        ValueError: as :func:`row_forward`.
        RuntimeError: as :func:`row_forward`.
    """
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = Rows(logits, targets, row_starts, bias, logit_scale, softcap, temperature)
    _backward_into(out, logits, rows, stats, coef, threads)
    return out


def row_backward_(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
    *,
    threads: int = 0,
) -> None:
    """Write :func:`row_backward` over the logits; in a narrower ``grad_dtype``, over the front of each row.

    Raises:
        ValueError: as :func:`row_backward`, and for rows that overlap in memory, or another ``grad_dtype`` than that of
            the logits, or bfloat16 or float16 for float32 logits.
        RuntimeError: as :func:`row_forward`.
    """
    rows = Rows(logits, targets, row_starts, bias, logit_scale, softcap, temperature)
    _backward_into(_overwritten(logits, grad_dtype), logits, rows, stats, coef, threads)


def unit_takes(vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether :func:`unit_forward_` takes logits of V columns: the shared memory of a cluster must hold a row.

    A cluster is up to 8 thread blocks from sm_90 on, and one block on older GPUs.
    """
    longest = extension.load().unit_forward_bytes(device=extension.queue(device)["device"])
    return dtype in DTYPE_CODES and vocab * dtype.itemsize <= longest


def unit_forward_(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
    *,
    threads: int = 0,
    slice_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run :func:`row_forward` and write the unit gradients of rows over their logits, in one read and one write.

    The unit gradient of a row is ``(onehot - softmax) * slope``, with the slope of the head's transform, if all its
    tokens that count have one target (one outside [0, V) is no column of ``onehot``); exact zeros without a read, if
    none counts. Rows of several different targets keep their logits.

    Args:
        logits: as in :func:`row_forward`, like all arguments that are not listed here.
        grad_dtype: as in :func:`row_backward_`.
        slice_bytes: most bytes of a row in a block, while the cluster can have more blocks; 0: the kernel's choice.

    Returns:
        stats (2, R) and logps (N,), as :func:`row_forward`.

    Raises:
        ValueError: as :func:`row_backward_`, and for rows that :func:`unit_takes` refuses.
        RuntimeError: as :func:`row_forward`.
    """
    rows = Rows(logits, targets, row_starts, bias, logit_scale, softcap, temperature)
    out = _overwritten(logits, grad_dtype)
    stats = torch.empty((2, logits.shape[0]), dtype=torch.float32, device=logits.device)
    logps = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    extension.load().unit_forward(
        **extension.queue(logits.device),
        **rows.arguments,
        threads=threads,
        slice_bytes=slice_bytes,
        out_dtype=DTYPE_CODES[out.dtype],
        stats=stats.data_ptr(),
        logps=logps.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )
    return stats, logps


def unit_finish_(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
    *,
    threads: int = 0,
) -> Tensor:
    """Finish what :func:`unit_forward_` left of rows (R, V), and return by what each row is to be multiplied.

    Rows whose tokens all have a coef of 0 become exact zeros, whatever they hold, and have scale 0. Rows that hold
    their unit gradient are neither read nor written; their scale is the sum of their coefs, in the order of the tokens.
    The others get the gradient that :func:`row_backward_` writes, and scale 1.

    Args:
        logits: as :func:`unit_forward_` left them, like all arguments that are not listed here.
        stats: (2, R) float32, from :func:`unit_forward_`.
        coef: (N,) float32, as in :func:`row_backward`.

    Returns:
        scale (R,) float32.

    Raises:
        ValueError: as :func:`row_backward_`.
        RuntimeError: as :func:`row_forward`.
    """
    rows = Rows(logits, targets, row_starts, bias, logit_scale, softcap, temperature)
    scale = torch.empty((logits.shape[0],), dtype=torch.float32, device=logits.device)
    _backward_into(_overwritten(logits, grad_dtype), logits, rows, stats, coef, threads, scale)
    return scale


def check_targets(targets: Tensor, vocab: int) -> None:
    """Raise an error on the device, which later work meets, that names a target outside [0, V) other than -100.

    Args:
        targets: (N,) int64 on a GPU.
        vocab: V.

    Raises:
        RuntimeError: what CUDA says where a launch fails.
    """
    check("targets", targets, (None,), (torch.int64,), targets.device)
    targets = targets.contiguous()
    extension.load().check_targets(
        **extension.queue(targets.device), targets=targets.data_ptr(), count=targets.shape[0], vocab=vocab
    )


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor by a scalar in place, in float32 and rounded once; no traffic where the factor is 1.

    Args:
        tensor: on a GPU; float32, bfloat16 or float16, contiguous and at a multiple of 16 bytes, or PyTorch does it.
        factor: one element of any floating-point dtype, on the same device; the host does not read it.

    Raises:
        RuntimeError: what CUDA says where a launch fails.
    """
    vectors = tensor.is_contiguous() and tensor.data_ptr() % VECTOR_BYTES == 0
    if tensor.dtype not in DTYPE_CODES or not vectors or factor.device != tensor.device:
        tensor.mul_(factor)
        return
    factor = factor.to(torch.float32)
    extension.load().scale(
        **extension.queue(tensor.device),
        dtype=DTYPE_CODES[tensor.dtype],
        numbers=tensor.data_ptr(),
        count=tensor.numel(),
        factor=factor.data_ptr(),
    )


def _overwritten(logits: Tensor, grad_dtype: torch.dtype | None) -> Tensor:
    """Return the tensor of ``grad_dtype`` that lies over the logits."""
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have row stride {logits.stride(0)}: rows overlap and cannot be "
            f"overwritten; expected a row stride of at least {logits.shape[1]}"
        )
    return logits if grad_dtype is None or grad_dtype == logits.dtype else front_halves(logits, grad_dtype)


def _backward_into(
    out: Tensor, logits: Tensor, rows: Rows, stats: Tensor, coef: Tensor, threads: int, scale: Tensor | None = None
) -> None:
    """Write gradients, and where a ``scale`` (R,) is given, what unit gradients are to be multiplied by instead."""
    R, device = logits.shape[0], logits.device
    check("stats", stats, (2, R), (torch.float32,), device)
    check("coef", coef, (rows.arguments["tokens"],), (torch.float32,), device)
    stats, coef = stats.contiguous(), coef.contiguous()
    shared = rows.arguments["row_starts"] != 0
    token_grad = torch.empty(coef.shape, dtype=torch.float32, device=device) if shared else None
    extension.load().row_backward(
        **extension.queue(device),
        **rows.arguments,
        threads=threads,
        out_dtype=DTYPE_CODES[out.dtype],
        stats=stats.data_ptr(),
        coef=coef.data_ptr(),
        token_grad=0 if token_grad is None else token_grad.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        scale=0 if scale is None else scale.data_ptr(),
    )


class Rows:
    """The checked arguments that forward and backward share, and the tensors whose addresses are among them.

    The tensors may be released after the launch: only later work of the same stream gets their memory.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        row_starts: Tensor | None,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        temperature: float,
    ) -> None:
        check("logits", logits, (None, None), tuple(DTYPE_CODES), logits.device)
        (R, V), device = logits.shape, logits.device
        if not 0 < V <= MAX_VOCAB:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected 1 to {MAX_VOCAB} columns")
        if V > 1 and logits.stride(1) != 1:
            raise ValueError(f"logits have strides {logits.stride()}; expected a column stride of 1")
        check("targets", targets, (R if row_starts is None else None,), (torch.int64,), device)
        targets = targets.contiguous()
        if row_starts is not None:
            check("row_starts", row_starts, (R + 1,), (torch.int64,), device)
            row_starts = row_starts.contiguous()
        if bias is not None:
            check("bias", bias, (V,), BIAS_DTYPES, device)
            bias = bias.detach().to(torch.float32).contiguous()
        mult, cap, slope = fold_transform(logit_scale, softcap, temperature)
        self.tensors = (logits, targets, row_starts, bias)
        self.arguments: dict[str, Any] = {
            "dtype": DTYPE_CODES[logits.dtype],
            "logits": logits.data_ptr(),
            "rows": R,
            "vocab": V,
            "row_stride": logits.stride(0),
            "targets": targets.data_ptr(),
            "row_starts": 0 if row_starts is None else row_starts.data_ptr(),
            "tokens": targets.shape[0],
            "bias": 0 if bias is None else bias.data_ptr(),
            "mult": mult,
            "cap": cap,
            "slope": slope,
        }
