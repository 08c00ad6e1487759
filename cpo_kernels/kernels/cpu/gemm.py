"""Matrix products of the compiled CPU backend, and where they are the better choice over torch's.

Checks and addresses as in :mod:`cpo_kernels.kernels.cpu.rows`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels import plain
from cpo_kernels.kernels.checks import DTYPE_CODES, check, share_memory
from cpo_kernels.kernels.scratch import pages

from . import extension as cpu_extension
from .extension import extension, isa_or_default


@cache  # asking the processor takes longer than a small product
def gemm_supported(dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Tell whether :func:`gemm` is the better choice over ``torch.mm`` on this machine, for inputs of ``dtype``.

    It is with AVX2 and AVX-512, except for half precision where the machine has AMX: torch uses its tile registers.
    """
    if not cpu_extension.available() or dtype not in DTYPE_CODES or out_dtype not in DTYPE_CODES:
        return False
    module = extension()
    in_tiles = dtype != torch.float32 and module.has_amx_bf16()
    return module.gemm_available(cpu_extension.isa()) and not in_tiles


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    low: Tensor | None = None,
    accumulate: bool = False,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Compute ``out[:] = a @ b``, or ``out += a @ b``, with float32 accumulators whatever the dtypes.

    Where both inputs are bfloat16 and the machine has AVX512_BF16, products are of bfloat16 pairs (subnormal inputs
    count as zero); otherwise half precision is widened to float32 first. The result is bitwise the same for any number
    of threads. The workspace is some MiB a thread, more where half-precision results are summed over blocks of k.

    Args:
        a: (M, K) float32, bfloat16 or float16, with any strides; a row-major one is read where it
            lies, any other is packed.
        b: (K, N) likewise, not necessarily of the dtype of ``a``.
        out: (M, N) float32, bfloat16 or float16 with unit column stride, sharing no memory with ``a`` and ``b``.
        low: like ``out``, both bfloat16 with the same strides, or None. What rounding to ``out`` leaves over: the sum
            is ``out + low``, 16 bits more than ``out`` alone.
        accumulate: add to ``out``, which must be float32, or to ``out + low``, instead of overwriting it.
        isa: instruction set, by default that of :func:`cpo_kernels.kernels.cpu.extension.isa`.
        threads: by default ``torch.get_num_threads()``.

    Raises:
        ValueError: a tensor that does not fit this description, or an instruction set without a matrix product.
    """
    dtypes = tuple(DTYPE_CODES)
    check("a", a, (None, None), dtypes)
    (m, k), n = a.shape, b.shape[-1] if b.dim() else 0
    check("b", b, (k, None), dtypes)
    if low is None:
        check("out", out, (m, n), (torch.float32,) if accumulate else dtypes)
    else:
        check("out", out, (m, n), (torch.bfloat16,))
        check("low", low, (m, n), (torch.bfloat16,))
        if low.stride() != out.stride():
            raise ValueError(f"low has strides {low.stride()}; expected those of out, {out.stride()}")
    if (n > 1 and out.stride(1) != 1) or (m > 1 and out.stride(0) < n):
        raise ValueError(f"out has strides {out.stride()}; expected a column stride of 1 and rows that do not overlap")
    for name, operand in (("a", a), ("b", b)):
        if share_memory(operand, out) or (low is not None and share_memory(operand, low)):
            raise ValueError(f"{name} and out share memory; expected an out of its own")
    if low is not None and share_memory(out, low):
        raise ValueError("out and low share memory; expected two tensors")
    size: dict[str, str | int] = {
        "isa": isa_or_default(isa),
        "m": m,
        "n": n,
        "k": k,
        "a_dtype": DTYPE_CODES[a.dtype],
        "b_dtype": DTYPE_CODES[b.dtype],
        "out_dtype": DTYPE_CODES[out.dtype],
    }
    workspace, threads = workspace_for(threads=torch.get_num_threads() if threads is None else threads, **size)
    extension().gemm(
        **size,
        threads=threads,
        a=a.data_ptr(),
        a_row_stride=a.stride(0),
        a_col_stride=a.stride(1),
        b=b.data_ptr(),
        b_row_stride=b.stride(0),
        b_col_stride=b.stride(1),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        low=0 if low is None else low.data_ptr(),
        accumulate=accumulate,
        workspace=workspace.data_ptr(),
    )


def workspace_for(*, threads: int, **size: str | int) -> tuple[Tensor, int]:
    """Return memory for a product of this size, and its threads: fewer than ``threads`` where a limit asks for it."""
    limit = getattr(_kept, "limit", None)
    while limit is not None and threads > 1 and _workspace_bytes(threads=threads, **size) > limit:
        threads = threads * 3 // 4
    return _workspace(_workspace_bytes(threads=threads, **size)), threads


@lru_cache(maxsize=256)
def _workspace_bytes(**size: str | int) -> int:
    size_in_bytes: int = extension().gemm_workspace_bytes(**size)
    return size_in_bytes


@lru_cache(maxsize=256)
def _most_workspace_bytes(**size: str | int) -> int:
    size_in_bytes: int = extension().most_workspace_bytes(**size)
    return size_in_bytes


_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """Return at least ``size`` bytes, kept for this thread's next product: fresh pages would cost it page faults."""
    if getattr(_kept, "workspace", None) is None or _kept.workspace.nbytes < size:
        _kept.workspace = None  # one that has become too small returns to the system first
        _kept.workspace = pages(size, huge=True)
    workspace: Tensor = _kept.workspace
    return workspace


def limited(product_: Callable[..., None], workspace: int) -> Callable[..., None]:
    """Return a product by :func:`gemm` that takes at most so many bytes of workspace, on fewer threads if need be."""

    def run_(*arguments: Any) -> None:
        _kept.limit = workspace
        try:
            product_(*arguments)
        finally:
            _kept.limit = None

    return run_


def gemm_workspace(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype, threads: int | None = None) -> int:
    """Return the most bytes that :func:`gemm` takes, and keeps, for the products of a call of these sizes.

    It holds for any block of its rows, and for any tile of its vocabulary; on torch's threads where none are given.
    """
    if not gemm_supported(dtype, dtype):
        return 0
    size = {"rows": -(-rows // 64) * 64, "vocab": vocab, "hidden": hidden_size, "dtype": DTYPE_CODES[dtype]}
    return _most_workspace_bytes(isa=cpu_extension.isa(), threads=threads or torch.get_num_threads(), **size)


def peak_flops(dtype: torch.dtype, seconds: float) -> float:
    """Measure the most floating-point operations a second that torch's threads reach in products of ``dtype``.

    Multiply-adds on registers alone, two operations each, by the widest instructions of this machine; 0 without any.
    """
    size = {"dtype": DTYPE_CODES[dtype], "threads": torch.get_num_threads(), "seconds": seconds}
    rate: float = extension().peak_multiply_adds(**size)
    return 2 * rate


def fastest_gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write or add ``a @ b`` to ``out``: by :func:`gemm` where it measured faster than torch's product."""
    if gemm_supported(a.dtype, out.dtype) and gemm_supported(b.dtype, out.dtype):
        gemm(a, b, out, accumulate=accumulate)
    else:
        plain.gemm_(a, b, out, accumulate)


def fastest_gemm_pair_(a: Tensor, b: Tensor, high: Tensor, low: Tensor, accumulate: bool) -> None:
    """Write or add ``a @ b`` to the sum ``high + low``: by :func:`gemm` for bfloat16 pairs where it is faster."""
    if high.dtype == torch.bfloat16 and gemm_supported(a.dtype, high.dtype) and gemm_supported(b.dtype, high.dtype):
        gemm(a, b, high, low=low, accumulate=accumulate)
    else:
        plain.gemm_pair_(a, b, high, low, accumulate)
