"""The addresses of the vectors and tokens of a row, which the row kernels share.

A block of a row is [lanes, K], K being the elements of a 16-byte vector, so that a lane is one vector of one thread. A
row that does not begin at a vector boundary (an odd V) is read from its first boundary on, and the columns before that,
its lead, come last: place p of the row is column (lead + p) mod V.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels.numerics import IGNORE_INDEX

VECTOR_BYTES = 16
SPECIALIZED_DIVISOR = 16  # Triton compiles apart for integer arguments that it divides
IGNORE = tl.constexpr(IGNORE_INDEX)


def vector_size(x: Tensor) -> int:
    """Return how many elements of ``x`` a 16-byte vector holds."""
    return VECTOR_BYTES // x.element_size()


class RowAddress(NamedTuple):
    """Row r of a matrix begins ``r * stride + misaligned`` elements from ``base``, which is at a vector boundary.

    ``shifted``: some row may begin off a boundary, or at one by a stride whose divisor Triton does not look at.
    """

    base: Tensor
    stride: int
    misaligned: int
    shifted: bool


def row_address(x: Tensor) -> RowAddress:
    """Find where the rows of ``x`` (R, V), of unit column stride, begin."""
    misaligned = int(x.storage_offset()) % vector_size(x)
    stride = x.stride(0) if x.shape[0] > 1 else 0
    base = x.as_strided((1,), (1,), x.storage_offset() - misaligned) if misaligned else x
    return RowAddress(base, stride, misaligned, misaligned != 0 or stride % SPECIALIZED_DIVISOR != 0)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, contiguous; None for None."""
    return None if tensor is None else tensor.contiguous()


@triton.jit
def token_range(row_starts, row, SHARED_ROWS: tl.constexpr):
    """Return the first token of a row and the one after its last."""
    if SHARED_ROWS:
        return tl.load(row_starts + row), tl.load(row_starts + row + 1)
    return row, row + 1


@triton.jit
def row_lead(offset, V, K: tl.constexpr, SHIFTED: tl.constexpr):
    """Find the first vector boundary of a row from ``offset`` on, and the number of columns before it."""
    if SHIFTED:
        boundary = (offset + (K - 1)) // K * K
        return boundary, tl.minimum(boundary - offset, V).to(tl.int32)
    return offset, 0


@triton.jit
def block_places(start, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return the places of a block in its row, (lanes, K)."""
    return start + tl.arange(0, BLOCK // K)[:, None] * K + tl.arange(0, K)[None, :]


@triton.jit
def wrap(column, V, SHIFTED: tl.constexpr):
    """Return the column of a place that may lie in the lead."""
    return tl.where(column >= V, column - V, column) if SHIFTED else column


@triton.jit
def load_bias(bias, column, mask, HAS_BIAS: tl.constexpr):
    """Load the bias of some columns in float32; ``mask`` None says that all of them exist."""
    if not HAS_BIAS:
        return 0.0
    elif mask is None:
        return tl.load(bias + column).to(tl.float32)
    else:
        return tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def any_present(targets, begin, end, TOKENS: tl.constexpr):
    """Tell whether a row predicts a token at all."""
    found = tl.zeros([TOKENS], tl.int32)
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        found |= (tl.load(targets + n, mask=n < end, other=IGNORE) != IGNORE).to(tl.int32)
    return tl.max(found, 0) != 0


@triton.jit
def load_coefs(targets, coef, n, mask):
    """Load the coefs of tokens n in float32: 0 for a target of -100, whatever its coef is."""
    c = tl.load(coef + n, mask=mask, other=0.0).to(tl.float32)
    return tl.where(tl.load(targets + n, mask=mask, other=IGNORE) == IGNORE, 0.0, c)


@triton.jit
def sum_coefs(targets, coef, begin, end, TOKENS: tl.constexpr):
    """Return the sum of the coefs of a row's tokens, and whether any of them is not 0, as NaN is not."""
    total = tl.zeros([TOKENS], tl.float32)
    active = tl.zeros([TOKENS], tl.int32)
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        c = load_coefs(targets, coef, n, n < end)
        total += c
        active |= (c != 0.0).to(tl.int32)
    return tl.sum(total, 0), tl.max(active, 0) != 0
