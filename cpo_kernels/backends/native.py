"""The compiled CPU backend: the only place where a tensor becomes an address.

Every function here checks device, dtype, shape and strides before it takes an address, so that a wrong call is a
``ValueError`` and never a read out of bounds. Values (targets, row_starts) are checked by the extension before it
touches a row.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch  # must come before _cpu: it loads the OpenMP runtime, and the extension then shares torch's thread pool
from torch import Tensor

from cpo_kernels import reference

from .transform import fold_transform

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISA_VARIABLE = "CPO_KERNELS_CPU_ISA"
CPU = torch.device("cpu")


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and why it cannot be used."""
    try:
        from cpo_kernels import _cpu
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded ({error}); run `pip install .` where g++ is installed"
    return _cpu, None


def available() -> bool:
    """Whether the compiled extension can be used here."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why the compiled extension cannot be used, or None if it can."""
    return _load()[1]


def _extension() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


@cache
def isa() -> str:
    """The instruction set in use: the best one this machine runs, or the one that CPO_KERNELS_CPU_ISA names.

    Raises:
        RuntimeError: the extension is not available.
        ValueError: the environment names an instruction set that is unknown, or that this machine does not run.
    """
    supported: list[str] = _extension().supported_isas()
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        return supported[-1]
    if forced not in supported:
        raise ValueError(f"{ISA_VARIABLE} is {forced!r}; this machine runs {', '.join(supported)}")
    return forced


def _isa_or_default(name: str | None) -> str:
    return name or isa()


@dataclass(frozen=True)
class BuildInfo:
    """How the extension was compiled, and what of it this machine runs; instruction sets from slowest to fastest."""

    compiler: str
    openmp: bool
    compiled_isas: list[str]
    supported_isas: list[str]


def build_info() -> BuildInfo | None:
    """Facts about the extension, or None where it is not available."""
    module = _load()[0]
    if module is None:
        return None
    return BuildInfo(module.compiler, module.openmp, module.compiled_isas(), module.supported_isas())


def register() -> None:
    """Makes the extension's kernels those of the operators for CPU tensors."""
    from cpo_kernels import ops

    isa()  # a wrong CPO_KERNELS_CPU_ISA is an error now, not in the first training step
    ops.row_forward.register_kernel("cpu")(row_forward)
    ops.row_backward.register_kernel("cpu")(row_backward)
    ops.row_backward_.register_kernel("cpu")(row_backward_)
    ops.gemm_.register_kernel("cpu")(fastest_gemm_)
    ops.gemm_pair_.register_kernel("cpu")(fastest_gemm_pair_)
    ops.column_stats.register_kernel("cpu")(column_stats)
    ops.take_columns.register_kernel("cpu")(take_columns)


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
    """The CPU kernel of ``cpo_kernels::row_forward``.

    Args:
        logits: (R, V) float32, bfloat16 or float16 with unit column stride and any row stride.
        targets: (N,) int64, in [0, V) or -100.
        row_starts: (R + 1,) int64, the tokens of row r being ``row_starts[r]:row_starts[r + 1]``; None for N == R.
        bias: (V,) float32, bfloat16 or float16, or None.
        logit_scale: multiplies the biased logits.
        softcap: c of ``c * tanh(logit / c)``, applied next; 0 for none.
        temperature: divides the result.
        isa: instruction set, by default that of :func:`isa`.
        threads: by default ``torch.get_num_threads()``; the results are bitwise the same for any number.

    Returns:
        stats (2, R) float32: row maximum, and log-sum-exp minus maximum; logps (N,) float32, 0 where there is no token.

    Raises:
        ValueError: a tensor or value that does not fit this description; the message has the offending value.
    """
    batch = _row_batch(logits, targets, row_starts, bias, logit_scale, softcap, temperature, isa, threads)
    stats = torch.empty((2, logits.shape[0]), dtype=torch.float32)
    logps = torch.empty(targets.shape, dtype=torch.float32)
    _extension().row_forward(**batch.arguments, stats=stats.data_ptr(), logps=logps.data_ptr())
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
    """The CPU kernel of ``cpo_kernels::row_backward``: the gradient of ``sum_n coef_n * logp_n``, like ``logits``.

    Args:
        logits: as in :func:`row_forward`, like all arguments that are not listed here.
        targets: see above.
        row_starts: see above.
        stats: (2, R) float32, from :func:`row_forward` with the same arguments.
        coef: (N,) float32.
        bias: see above.
        logit_scale: see above.
        softcap: see above.
        temperature: see above.
        isa: see above.
        threads: see above.

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
    """The CPU kernel of ``cpo_kernels::row_backward_``: :func:`row_backward`, written over the logits.

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


def front_halves(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The front half of the memory of each float32 row, as (R, V) of a half-precision dtype."""
    if logits.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"logits have dtype {logits.dtype} and grad_dtype is {dtype}; expected the same dtype, or torch.bfloat16 "
            f"or torch.float16 for torch.float32 logits"
        )
    check("logits", logits, (None, None), (torch.float32,), logits.device)
    if logits.stride(1) != 1:  # one column may have any stride otherwise, but not in a view of another dtype
        raise ValueError(f"logits have strides {logits.stride()}; expected a column stride of 1")
    return reference.narrow_view(logits.detach(), dtype)


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
    coef_sum = torch.empty(rows, dtype=torch.float32)
    token_grad = torch.empty(tokens, dtype=torch.float32)
    _extension().row_backward(
        **batch.arguments,
        out_dtype=DTYPE_CODES[out.dtype],
        stats=stats.data_ptr(),
        coef=coef.data_ptr(),
        coef_sum=coef_sum.data_ptr(),
        token_grad=token_grad.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )


@cache  # asking the processor takes longer than a small product
def gemm_supported(dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether :func:`gemm` is the better choice over ``torch.mm`` here, for inputs of ``dtype``.

    It is with AVX2 and AVX-512, except for half precision where the machine has AMX: torch uses its tile registers.
    """
    module = _load()[0]
    if module is None or dtype not in DTYPE_CODES or out_dtype not in DTYPE_CODES:
        return False
    in_tiles = dtype != torch.float32 and module.has_amx_bf16()
    return module.gemm_available(isa()) and not in_tiles


def column_stats(grad: Tensor, *, isa: str | None = None, threads: int | None = None) -> Tensor:
    """Largest absolute value and absolute sum of each column: (R, V) -> (2, V) float32; NaN is in the sum at least.

    Args:
        grad: float32, bfloat16 or float16 with unit column stride and any row stride.
        isa: instruction set, by default that of :func:`isa`.
        threads: by default ``torch.get_num_threads()``; the result is bitwise the same for any number.
    """
    stats = grad.new_empty((2, grad.shape[1]), dtype=torch.float32)
    _extension().column_stats(**_gradient(grad, isa, threads), stats=stats.data_ptr())
    return stats


def take_columns(
    grad: Tensor, rows: Tensor, columns: Tensor, *, isa: str | None = None, threads: int | None = None
) -> Tensor:
    """Some columns of some rows, and the sum of each row's other columns behind them: a new (k, c + 1) tensor.

    Args:
        grad: (R, V) as for :func:`column_stats`.
        rows: (k,) int64.
        columns: (c,) int64.
        isa: instruction set, by default that of :func:`isa`.
        threads: by default ``torch.get_num_threads()``.

    Raises:
        ValueError: a row or a column that there is not.
    """
    check("rows", rows, (None,), (torch.int64,))
    check("columns", columns, (None,), (torch.int64,))
    rows, columns = rows.contiguous(), columns.contiguous()
    out = grad.new_empty((rows.numel(), columns.numel() + 1))
    _extension().take_columns(
        **_gradient(grad, isa, threads),
        row_indices=rows.data_ptr(),
        num_rows=rows.numel(),
        columns=columns.data_ptr(),
        count=columns.numel(),
        out=out.data_ptr(),
    )
    return out


def _gradient(grad: Tensor, isa_name: str | None, threads: int | None) -> dict[str, str | int]:
    """The checked arguments of a gradient of logits."""
    check("grad", grad, (None, None), tuple(DTYPE_CODES))
    rows, vocab = grad.shape
    if vocab > 1 and grad.stride(1) != 1:
        raise ValueError(f"grad has strides {grad.stride()}; expected a column stride of 1")
    return {
        "isa": _isa_or_default(isa_name),
        "dtype": DTYPE_CODES[grad.dtype],
        "grad": grad.data_ptr(),
        "rows": rows,
        "vocab": vocab,
        "row_stride": grad.stride(0),
        "threads": torch.get_num_threads() if threads is None else threads,
    }


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
    """``out[:] = a @ b``, or ``out += a @ b``, with float32 accumulators whatever the dtypes.

    Where both inputs are bfloat16 and the machine has AVX512_BF16, products are of bfloat16 pairs (subnormal inputs
    count as zero); otherwise half precision is widened to float32 first. The result is bitwise the same for any number
    of threads. The workspace is at most 4 MiB a thread, and 8 MiB where half-precision results are summed over blocks
    of k.

    Args:
        a: (M, K) float32, bfloat16 or float16, with any strides; a row-major one is read where it
            lies, any other is packed.
        b: (K, N) likewise, not necessarily of the dtype of ``a``.
        out: (M, N) float32, bfloat16 or float16 with unit column stride, sharing no memory with ``a`` and ``b``.
        low: like ``out``, both bfloat16 with the same strides, or None. What rounding to ``out`` leaves over: the sum
            is ``out + low``, 16 bits more than ``out`` alone.
        accumulate: add to ``out``, which must be float32, or to ``out + low``, instead of overwriting it.
        isa: instruction set, by default that of :func:`isa`.
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
        "isa": _isa_or_default(isa),
        "m": m,
        "n": n,
        "k": k,
        "a_dtype": DTYPE_CODES[a.dtype],
        "b_dtype": DTYPE_CODES[b.dtype],
        "out_dtype": DTYPE_CODES[out.dtype],
        "threads": torch.get_num_threads() if threads is None else threads,
    }
    workspace = _workspace(_workspace_bytes(**size))
    _extension().gemm(
        **size,
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


@lru_cache(maxsize=256)
def _workspace_bytes(**size: str | int) -> int:
    size_in_bytes: int = _extension().gemm_workspace_bytes(**size)
    return size_in_bytes


_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """At least ``size`` bytes, kept for the next product of this thread: fresh pages would cost each call a fault."""
    if getattr(_kept, "workspace", None) is None or _kept.workspace.nbytes < size:
        _kept.workspace = None
        # Pages of its own, so that one that has become too small leaves nothing in the heap.
        _kept.workspace = torch.frombuffer(private_pages(size), dtype=torch.uint8)
    workspace: Tensor = _kept.workspace
    return workspace


def private_pages(size: int) -> mmap.mmap | bytearray:
    """Zeros that a forked process writes to a copy of."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return bytearray(size)


def gemm_workspace(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """The most bytes that :func:`gemm` takes for the three products of (rows, vocab, hidden_size), kept afterwards."""
    if not gemm_supported(dtype, dtype):
        return 0
    code, threads = DTYPE_CODES[dtype], torch.get_num_threads()
    dtypes = {"a_dtype": code, "b_dtype": code, "out_dtype": code}
    products = ((rows, vocab, hidden_size), (rows, hidden_size, vocab), (vocab, hidden_size, rows))
    return max(_workspace_bytes(isa=isa(), m=m, n=n, k=k, **dtypes, threads=threads) for m, n, k in products)


def fastest_gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """The CPU kernel of ``cpo_kernels::gemm_``: :func:`gemm` where it measured faster than torch's product."""
    if gemm_supported(a.dtype, out.dtype) and gemm_supported(b.dtype, out.dtype):
        gemm(a, b, out, accumulate=accumulate)
    else:
        reference.gemm_(a, b, out, accumulate)


def fastest_gemm_pair_(a: Tensor, b: Tensor, high: Tensor, low: Tensor, accumulate: bool) -> None:
    """The CPU kernel of ``cpo_kernels::gemm_pair_``: :func:`gemm` for bfloat16 pairs where it is the faster product."""
    if high.dtype == torch.bfloat16 and gemm_supported(a.dtype, high.dtype) and gemm_supported(b.dtype, high.dtype):
        gemm(a, b, high, low=low, accumulate=accumulate)
    else:
        reference.gemm_pair_(a, b, high, low, accumulate)


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether the address ranges of two tensors overlap."""

    def address_range(tensor: Tensor) -> tuple[int, int]:
        begin, last = tensor.data_ptr(), 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            last += (size - 1) * stride
        return begin, begin + (last + 1) * tensor.element_size()

    if x.numel() == 0 or y.numel() == 0:
        return False
    (x_begin, x_end), (y_begin, y_end) = address_range(x), address_range(y)
    return x_begin < y_end and y_begin < x_end


class _RowBatch:
    """The checked arguments that forward and backward share, and the tensors whose addresses are among them."""

    def __init__(self, arguments: dict[str, str | int | float], tensors: tuple[Tensor | None, ...]) -> None:
        self.arguments = arguments
        self.tensors = tensors  # kept alive until the kernel has returned


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
    if bias is not None:
        check("bias", bias, (vocab,), tuple(DTYPE_CODES))
        bias = bias.detach().to(torch.float32).contiguous()
    targets = targets.contiguous()
    mult, cap, slope = fold_transform(logit_scale, softcap, temperature)
    arguments: dict[str, str | int | float] = {
        "isa": _isa_or_default(isa_name),
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


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device = CPU,
) -> None:
    """Raises unless the tensor is on the device and has one of the dtypes and this shape; None is any size."""
    if tensor.device != device:
        expected = "a CPU tensor" if device == CPU else f"a tensor on {device}"
        raise ValueError(f"{name} is on {tensor.device}; expected {expected}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if len(tensor.shape) != len(shape) or any(e not in (None, s) for s, e in zip(tensor.shape, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({expected})")
