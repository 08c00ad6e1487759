"""Row kernels of the compiled CPU backend: softmax statistics, log-probabilities, gradients of logits.

Every function here checks device, dtype, shape and strides before it takes an address, so that a wrong call is a
``ValueError`` and never a read out of bounds. Values (targets, row_starts) are checked by the extension before it
touches a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpo_kernels.kernels.checks import BIAS_DTYPES, CPU, DTYPE_CODES, check, front_halves, share_memory
from cpo_kernels.kernels.transform import fold_transform

from .extension import extension, isa_or_default


def row_forward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``cpo_kernels::row_forward`` on CPU tensors.

    Args:
        logits: (R, V) float32, bfloat16 or float16 with unit column stride and any row stride.
        targets: (N,) int64, in [0, V) or -100.
        row_starts: (R + 1,) int64, the tokens of row r being ``row_starts[r]:row_starts[r + 1]``; None for N == R.
        bias: (V,) floating-point, or None.
        logit_scale: multiplies the biased logits.
        softcap: c of ``c * tanh(logit / c)``, applied next; 0 for none.
        temperature: divides the result.
        isa: instruction set, by default that of :func:`cpo_kernels.kernels.cpu.extension.isa`.
        threads: by default ``torch.get_num_threads()``; the results are bitwise the same for any number.

    Returns:
        stats (2, R) float32: row maximum, and log-sum-exp minus maximum; logps (N,) float32, 0 where there is no token.

    Raises:
        ValueError: a tensor or value that does not fit this description; the message has the offending value.
    """
    batch = _row_batch(logits, targets, row_starts, bias, logit_scale, softcap, temperature, isa, threads)
    stats = torch.empty((2, logits.shape[0]), dtype=torch.float32, device=CPU)
    logps = torch.empty(targets.shape, dtype=torch.float32, device=CPU)
    extension().row_forward(**batch.arguments, stats=stats.data_ptr(), logps=logps.data_ptr())
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
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Run ``cpo_kernels::row_backward`` on CPU tensors: the gradient of ``sum_n coef_n * logp_n``, like ``logits``.

    Args:
        logits: as in :func:`row_forward`, like all arguments that are not listed here.
        stats: (2, R) float32, from :func:`row_forward` with the same arguments.
        coef: (N,) float32.

    Raises:
        ValueError: as :func:`row_forward`.
    """
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    head = (bias, logit_scale, softcap, temperature)
    _backward_into(out, logits, targets, row_starts, stats, coef, *head, isa=isa, threads=threads)
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
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Run :func:`row_backward`, written over the logits.

    ``grad_dtype`` is that of the logits, which None stands for, or bfloat16 or float16 for float32 logits. Then the
    gradient takes the front half of the memory of each row: it is ``logits.view(grad_dtype)[:, :V]``, and what the back
    halves hold is undefined. Each number is rounded once from the float32 gradient; to bfloat16 with AVX512_BF16,
    float32 subnormals count as zero.

    Raises:
        ValueError: as :func:`row_backward`, and for rows that overlap in memory or another ``grad_dtype``.
    """
    head = (bias, logit_scale, softcap, temperature)
    out = logits
    if grad_dtype is not None and grad_dtype != logits.dtype:
        out = front_halves(logits, grad_dtype)
    _backward_into(out, logits, targets, row_starts, stats, coef, *head, isa=isa, threads=threads)


def _backward_into(
    out: Tensor,
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
    isa: str | None,
    threads: int | None,
) -> None:
    batch = _row_batch(logits, targets, row_starts, bias, logit_scale, softcap, temperature, isa, threads)
    rows, tokens = logits.shape[0], targets.shape[0]
    if rows > 1 and logits.stride(0) < logits.shape[1] and share_memory(out, logits):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have row stride {logits.stride(0)}: rows overlap and cannot be "
            f"overwritten; expected a row stride of at least {logits.shape[1]}"
        )
    check("stats", stats, (2, rows), (torch.float32,))
    check("coef", coef, (tokens,), (torch.float32,))
    stats, coef = stats.contiguous(), coef.contiguous()
    coef_sum = torch.empty(rows, dtype=torch.float32, device=CPU)
    token_grad = torch.empty(tokens, dtype=torch.float32, device=CPU)
    extension().row_backward(
        **batch.arguments,
        out_dtype=DTYPE_CODES[out.dtype],
        stats=stats.data_ptr(),
        coef=coef.data_ptr(),
        coef_sum=coef_sum.data_ptr(),
        token_grad=token_grad.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )


def column_stats(grad: Tensor, *, isa: str | None = None, threads: int | None = None) -> Tensor:
    """Return the largest absolute value and the absolute sum of each column: (R, V) -> (2, V) float32.

    A NaN in a column is at least in its sum.

    Args:
        grad: float32, bfloat16 or float16 with unit column stride and any row stride.
        isa: instruction set, by default that of :func:`cpo_kernels.kernels.cpu.extension.isa`.
        threads: by default ``torch.get_num_threads()``; the result is bitwise the same for any number.
    """
    stats = grad.new_empty((2, grad.shape[1]), dtype=torch.float32)
    extension().column_stats(**_gradient(grad, isa, threads), stats=stats.data_ptr())
    return stats


def take_columns(
    grad: Tensor, rows: Tensor, columns: Tensor, *, isa: str | None = None, threads: int | None = None
) -> Tensor:
    """Return some columns of some rows, and behind them the sum of each row's other columns: a new (k, c + 1) tensor.

    Args:
        grad: (R, V) as for :func:`column_stats`.
        rows: (k,) int64.
        columns: (c,) int64.
        isa: instruction set, by default that of :func:`cpo_kernels.kernels.cpu.extension.isa`.
        threads: by default ``torch.get_num_threads()``.

    Raises:
        ValueError: a row or column outside of ``grad``.
    """
    check("rows", rows, (None,), (torch.int64,))
    check("columns", columns, (None,), (torch.int64,))
    rows, columns = rows.contiguous(), columns.contiguous()
    out = grad.new_empty((rows.numel(), columns.numel() + 1))
    extension().take_columns(
        **_gradient(grad, isa, threads),
        row_indices=rows.data_ptr(),
        num_rows=rows.numel(),
        columns=columns.data_ptr(),
        count=columns.numel(),
        out=out.data_ptr(),
    )
    return out


def _gradient(grad: Tensor, isa_name: str | None, threads: int | None) -> dict[str, str | int]:
    """Check a gradient of logits and return it as arguments of the extension."""
    check("grad", grad, (None, None), tuple(DTYPE_CODES))
    rows, vocab = grad.shape
    if vocab > 1 and grad.stride(1) != 1:
        raise ValueError(f"grad has strides {grad.stride()}; expected a column stride of 1")
    return {
        "isa": isa_or_default(isa_name),
        "dtype": DTYPE_CODES[grad.dtype],
        "grad": grad.data_ptr(),
        "rows": rows,
        "vocab": vocab,
        "row_stride": grad.stride(0),
        "threads": torch.get_num_threads() if threads is None else threads,
    }


class _RowBatch:
    """The checked arguments that forward and backward share, and the tensors whose addresses are among them."""

    def __init__(self, arguments: dict[str, str | int | float], tensors: tuple[Tensor | None, ...]) -> None:
        self.arguments = arguments
        self.tensors = tensors  # kept alive until the kernel has returned


def float_bias(bias: Tensor | None, vocab: int) -> Tensor | None:
    """Return a bias (V,) in float32, as the kernels take it; raises ``ValueError`` for another shape or dtype."""
    if bias is None:
        return None
    check("bias", bias, (vocab,), BIAS_DTYPES)
    return bias.detach().to(torch.float32).contiguous()


def _row_batch(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    isa_name: str | None,
    threads: int | None,
) -> _RowBatch:
    check("logits", logits, (None, None), tuple(DTYPE_CODES))
    rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected at least one column")
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}; expected a column stride of 1")
    check("targets", targets, (rows if row_starts is None else None,), (torch.int64,))
    if row_starts is not None:
        check("row_starts", row_starts, (rows + 1,), (torch.int64,))
        row_starts = row_starts.contiguous()
    bias = float_bias(bias, vocab)
    targets = targets.contiguous()
    mult, cap, slope = fold_transform(logit_scale, softcap, temperature)
    arguments: dict[str, str | int | float] = {
        "isa": isa_or_default(isa_name),
        "dtype": DTYPE_CODES[logits.dtype],
        "logits": logits.data_ptr(),
        "rows": rows,
        "vocab": vocab,
        "row_stride": logits.stride(0),
        "targets": targets.data_ptr(),
        "row_starts": 0 if row_starts is None else row_starts.data_ptr(),
        "tokens": targets.shape[0],
        "bias": 0 if bias is None else bias.data_ptr(),
        "mult": mult,
        "cap": cap,
        "slope": slope,
        "threads": torch.get_num_threads() if threads is None else threads,
    }
    return _RowBatch(arguments, (logits, targets, row_starts, bias))
