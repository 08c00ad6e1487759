"""The softmax of a head's rows on the CPU, made while their product is in the cache: no logits are written.

What the gradient needs is written in their place, ``e^(y - reference)``, in the dtype of hidden. It is exact to that
dtype relative to itself, where a rounded logit would be exact to that dtype relative to its own, larger, size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.checks import CPU, DTYPE_CODES, check, share_memory
from cpo_kernels.kernels.transform import fold_transform, transform_logits

from .extension import extension, isa_or_default
from .gemm import gemm, gemm_supported, workspace_for
from .rows import float_bias

# float16 does not hold the range of the powers.
DTYPES = (torch.float32, torch.bfloat16)


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Tell whether the functions of this module take these matrices, and are the better choice on this machine."""
    return hidden.dtype in DTYPES and weight.dtype == hidden.dtype and gemm_supported(hidden.dtype, hidden.dtype)


def floats_per_row(vocab: int) -> int:
    """Count the numbers that a row takes besides ``out``: partial sums, and logits to choose a reference from."""
    return -(-vocab // extension().softmax_sum_columns) + extension().softmax_sample_columns


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    out: Tensor | None = None,
    memory: Tensor | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute statistics and log-probabilities, exact to float32 sums of the products.

    Args:
        hidden: (R, H) float32 or bfloat16 with any strides.
        weight: (V, H) likewise, of the same dtype.
        targets: (N,) int64, in [0, V) or -100.
        row_starts: (R + 1,) int64, the tokens of row r being ``row_starts[r]:row_starts[r + 1]``; None for N == R.
        bias: (V,) floating-point, or None.
        logit_scale: as for :func:`cpo_kernels.kernels.cpu.rows.row_forward`, like the next two.
        softcap: c, or 0 for none.
        temperature: above 0.
        out: (R, V) like hidden, with unit column stride, or None. A row whose tokens all have one target becomes its
            gradient for a coefficient that :func:`linear_scale` says, one of several targets what that makes it of,
            and one without a token zeros.
        memory: float32 for :func:`floats_per_row` numbers of each row; None: allocated here.
        isa: instruction set, by default that of :func:`cpo_kernels.kernels.cpu.extension.isa`.
        threads: by default ``torch.get_num_threads()``; the results are bitwise the same for any number.

    Returns:
        stats (2, R) float32: a reference near the row's maximum, and log-sum-exp minus reference; logps (N,) float32, 0
        where there is no token.

    Raises:
        ValueError: a tensor or value that does not fit this description.
    """
    check("hidden", hidden, (None, None), DTYPES)
    check("weight", weight, (None, hidden.shape[1]), (hidden.dtype,))
    (rows, hidden_size), vocab = hidden.shape, weight.shape[0]
    if vocab == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected at least one row")
    check("targets", targets, (rows if row_starts is None else None,), (torch.int64,))
    targets = targets.contiguous()
    if row_starts is not None:
        check("row_starts", row_starts, (rows + 1,), (torch.int64,))
        row_starts = row_starts.contiguous()
    if out is not None:
        check("out", out, (rows, vocab), (hidden.dtype,))
        if (vocab > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < vocab):
            raise ValueError(f"out has strides {out.stride()}; expected a column stride of 1 and rows of their own")
        if share_memory(out, hidden) or share_memory(out, weight):
            raise ValueError("out shares memory with hidden or weight; expected an out of its own")
    bias_float = float_bias(bias, vocab)
    transform = fold_transform(logit_scale, softcap, temperature)
    stats = torch.empty((2, rows), dtype=torch.float32, device=CPU)
    logps, target_y = (torch.empty(targets.shape, dtype=torch.float32, device=CPU) for _ in range(2))
    floats = rows * floats_per_row(vocab)
    memory = torch.empty(floats, dtype=torch.float32, device=CPU) if memory is None else memory
    check("memory", memory, (None,), (torch.float32,))
    if memory.numel() < floats:
        raise ValueError(f"memory has {memory.numel()} numbers; expected at least {floats}")
    memory = memory.contiguous()
    sample, sums = memory, memory[rows * extension().softmax_sample_columns :]
    code = DTYPE_CODES[hidden.dtype]
    isa, threads = isa_or_default(isa), torch.get_num_threads() if threads is None else threads
    sizes = {"m": rows, "n": vocab, "k": hidden_size, "a_dtype": code, "b_dtype": code, "out_dtype": code}
    workspace, threads = workspace_for(isa=isa, threads=threads, softmax=True, **sizes)

    arguments: dict[str, Any] = transform._asdict() | {
        "isa": isa,
        "rows": rows,
        "vocab": vocab,
        "hidden_size": hidden_size,
        "dtype": code,
        "hidden": hidden.data_ptr(),
        "hidden_row_stride": hidden.stride(0),
        "hidden_col_stride": hidden.stride(1),
        "weight": weight.data_ptr(),
        "weight_row_stride": weight.stride(0),
        "weight_col_stride": weight.stride(1),
        "targets": targets.data_ptr(),
        "row_starts": 0 if row_starts is None else row_starts.data_ptr(),
        "tokens": targets.shape[0],
        "bias": 0 if bias_float is None else bias_float.data_ptr(),
        "out": 0 if out is None else out.data_ptr(),
        "out_stride": vocab if out is None else out.stride(0),
        "reference": stats[0].data_ptr(),
        "logsum": stats[1].data_ptr(),
        "logps": logps.data_ptr(),
        "sums": sums.data_ptr(),
        "target_y": target_y.data_ptr(),
        "threads": threads,
        "workspace": workspace.data_ptr(),
    }
    if extension().softmax_forward(**arguments, sample=sample.data_ptr()):
        # The largest logit of a row is beyond what a float holds relative to those of the sample.
        head = bias_float, logit_scale, softcap, temperature
        stats[0] = largest(hidden, weight, *head, memory=memory[:floats].view(rows, -1), isa=isa, threads=threads)
        extension().softmax_forward(**arguments, sample=0)
    return stats, logps


def largest(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *transform: float, memory: Tensor, isa: str, threads: int
) -> Tensor:
    """Return the largest y of each row (R,), from logits of some columns at a time in ``memory`` (R, columns)."""
    most, least = (
        torch.full(hidden.shape[:1], end, dtype=torch.float32, device=CPU) for end in (-torch.inf, torch.inf)
    )
    for start in range(0, weight.shape[0], memory.shape[1]):
        part = slice(start, start + memory.shape[1])
        logits = memory[:, : weight[part].shape[0]]
        gemm(hidden, weight[part].t(), logits, isa=isa, threads=threads)
        if bias is not None:
            logits += bias[part]
        most, least = torch.maximum(most, logits.amax(1)), torch.minimum(least, logits.amin(1))
    # What follows the bias rises throughout, or falls where the scale is negative.
    return torch.maximum(transform_logits(most, None, *transform), transform_logits(least, None, *transform))


def linear_scale(
    out: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    logps: Tensor,
    coef: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    in_place: bool = False,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Return what each row (R,) of ``out`` is to be multiplied by to be the gradient of ``sum_n coef_n * logp_n``.

    A row of several targets is turned into its gradient, and the number is 1.

    Args:
        out: what :func:`linear_forward` made of it, like all arguments that are not listed here.
        stats: (2, R) float32, from there.
        logps: (N,) float32, from there.
        coef: (N,) float32.
        in_place: turn every row into its gradient.

    Raises:
        ValueError: a tensor or value that does not fit this description.
    """
    check("out", out, (None, None), DTYPES)
    rows, vocab = out.shape
    check("targets", targets, (rows if row_starts is None else None,), (torch.int64,))
    check("stats", stats, (2, rows), (torch.float32,))
    check("logps", logps, tuple(targets.shape), (torch.float32,))
    check("coef", coef, tuple(targets.shape), (torch.float32,))
    if row_starts is not None:
        check("row_starts", row_starts, (rows + 1,), (torch.int64,))
        row_starts = row_starts.contiguous()
    targets, stats, logps, coef = (tensor.contiguous() for tensor in (targets, stats, logps, coef))
    scale, coef_sum = (torch.empty(rows, dtype=torch.float32, device=CPU) for _ in range(2))
    token_coef = torch.empty(targets.shape, dtype=torch.float32, device=CPU)
    extension().softmax_scale(
        isa=isa_or_default(isa),
        rows=rows,
        vocab=vocab,
        dtype=DTYPE_CODES[out.dtype],
        targets=targets.data_ptr(),
        row_starts=0 if row_starts is None else row_starts.data_ptr(),
        tokens=targets.shape[0],
        **fold_transform(logit_scale, softcap, temperature)._asdict(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        reference=stats[0].data_ptr(),
        logsum=stats[1].data_ptr(),
        logps=logps.data_ptr(),
        coef=coef.data_ptr(),
        coef_sum=coef_sum.data_ptr(),
        token_coef=token_coef.data_ptr(),
        scale=scale.data_ptr(),
        in_place=in_place,
        threads=torch.get_num_threads() if threads is None else threads,
    )
    return scale
