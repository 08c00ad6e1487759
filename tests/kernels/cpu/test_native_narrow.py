"""Half-precision gradients written over float32 logits, on every instruction set that this machine runs."""

from __future__ import annotations

import pytest
import torch
from cpu_rows import BLOCK, DTYPES, HEADS, ISAS, Head, call, tokens_for
from pairwise import pairwise
from torch import Tensor

from cpo_kernels.kernels.cpu import rows as cpu_rows

pytestmark = pytest.mark.cpu  # the CPU extension

HALVES = [torch.bfloat16, torch.float16]
SIZES = [
    1,
    2,
    31,  # one less than a pair of the widest vectors
    32,  # one pair, or two of 8 lanes
    33,
    64,
    1009,  # prime
    2 * BLOCK + 7,  # longer than what is prefetched
]


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal half-precision numbers, zeros with their signs; NaN in the same places, whatever its payload."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def narrow_problem(V: int, gap: int, head: Head, isa: str):
    """Seven float32 rows inside a buffer, with what it takes to overwrite them and their float32 gradient.

    Shared rows; absent tokens; a row without tokens and one with a zero coef, both of NaN; a row whose gradient is NaN;
    coefs that overflow float16, and that bring gradients down to its subnormals.
    """
    buffer = torch.randn(9, V + gap) * 4
    logits = buffer[1:-1, gap // 2 : gap // 2 + V]
    targets, row_starts, coef = tokens_for(V, [1, 3, 0, 5, 1, 2, 1])
    targets[9], coef[9] = V - 1, 0.0
    targets[-1] = 0
    coef[[0, 4, 5]] = torch.tensor([1e6, 1e-3, 2e4])
    logits[[2, 4]] = torch.nan
    logits[6, V // 2] = torch.nan
    stats, _ = cpu_rows.row_forward(logits, targets, row_starts, *head.args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *head.args(), isa=isa)
    assert (grad[[2, 4]] == 0).all() and grad[6].isnan().all() and grad[[0, 1, 3, 5]].isfinite().all()
    return buffer, logits, (targets, row_starts, stats, coef, *head.args()), grad


@pairwise({"dtype": HALVES, "gap": [0, 9], "V": SIZES, "head": ["plain", "scaled", "bias", "softcap", "all"]})
def test_half_precision_gradient_over_float32_logits(isa, dtype, gap, V, head):
    """Bitwise the float32 gradient rounded once, in the front half of each row; nothing outside the rows changes."""
    buffer, logits, args, grad = narrow_problem(V, gap, HEADS[head](V), isa)
    before = buffer.view(torch.int32).clone()
    cpu_rows.row_backward_(logits, *args, dtype, isa=isa)
    assert_same_bits(logits.view(dtype)[:, :V], grad.to(dtype))
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside[1:-1, gap // 2 : gap // 2 + V] = False
    assert torch.equal(buffer.view(torch.int32)[outside], before[outside])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_gradient_over_float32_logits_for_any_number_of_threads(isa, dtype, threads):
    R, V = 37, 5003
    logits = torch.randn(R, V)
    targets, row_starts, coef = tokens_for(V, [1, 0, 4] * 12 + [1])
    stats, _ = cpu_rows.row_forward(logits, targets, row_starts, *Head().args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    cpu_rows.row_backward_(logits, targets, row_starts, stats, coef, *Head().args(), dtype, isa=isa, threads=threads)
    assert_same_bits(logits.view(dtype)[:, :V], grad.to(dtype))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_dtype_of_the_logits_fills_the_rows(isa, dtype, named):
    V = 127
    logits, targets, coef = torch.randn(5, V).to(dtype), torch.randint(0, V, (5,)), torch.randn(5)
    stats, _ = cpu_rows.row_forward(logits, targets, None, *Head().args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, None, stats, coef, *Head().args(), isa=isa)
    cpu_rows.row_backward_(logits, targets, None, stats, coef, *Head().args(), dtype if named else None, isa=isa)
    assert torch.equal(logits, grad)


@pytest.mark.parametrize(("R", "N"), [(0, 0), (3, 0)])
def test_no_rows_and_no_tokens(isa, R, N):
    logits = torch.randn(R, 7)
    targets, row_starts, coef = torch.empty(N, dtype=torch.int64), torch.zeros(R + 1, dtype=torch.int64), torch.ones(N)
    cpu_rows.row_backward_(
        logits, targets, row_starts, torch.zeros(2, R), coef, *Head().args(), torch.bfloat16, isa=isa
    )
    assert (logits.view(torch.bfloat16)[:, :7] == 0).all()


BAD_CALLS = {
    "overlapping rows": ({"logits": torch.ones(1, 5).expand(2, 5)}, "row stride 0: rows overlap"),
    "rows that share a few columns": (
        {"logits": torch.ones(9).as_strided((2, 5), (4, 1))},
        "row stride 4: rows overlap and cannot be overwritten; expected a row stride of at least 5",
    ),
    "wider gradient": (
        {"logits": torch.ones(2, 5).bfloat16(), "grad_dtype": torch.float32},
        "logits have dtype torch.bfloat16 and grad_dtype is torch.float32; expected the same dtype, or torch.bfloat16",
    ),
    "another half precision": (
        {"logits": torch.ones(2, 5).half()},
        "logits have dtype torch.float16 and grad_dtype is torch.bfloat16; expected",
    ),
    "gradient in float64": ({"grad_dtype": torch.float64}, "dtype torch.float32 and grad_dtype is torch.float64"),
    "gradient in int16": ({"grad_dtype": torch.int16}, "dtype torch.float32 and grad_dtype is torch.int16"),
    "float64": (
        {"logits": torch.ones(2, 5).double()},
        "logits have dtype torch.float64 and grad_dtype is torch.bfloat16",
    ),
    "one dimension": ({"logits": torch.ones(5)}, r"logits has shape \(5,\); expected \(any, any\)"),
    "no columns": ({"logits": torch.ones(2, 0)}, r"shape \(2, 0\); expected at least one column"),
    "column stride": ({"logits": torch.ones(5, 2).T}, r"strides \(1, 2\); expected a column stride of 1"),
    "one column with a stride": (
        {"logits": torch.ones(2, 6)[:, ::6], "targets": torch.zeros(3, dtype=torch.int64)},
        r"strides \(6, 6\); expected a column stride of 1",
    ),
    "meta": ({"logits": torch.ones(2, 5, device="meta")}, "logits is on meta; expected a CPU tensor"),
    "target too large": ({"targets": torch.tensor([1, -100, 5])}, r"targets\[2\] = 5; expected 0 <= target < V = 5"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_names_what_is_wrong_and_writes_nothing(changes, message):
    logits = changes.get("logits", torch.randn(2, 5))
    before = logits.clone()
    with pytest.raises(ValueError, match=message):
        call(**{"logits": logits, "grad_dtype": torch.bfloat16, **changes})
    assert logits.is_meta or torch.equal(logits, before)


def test_the_extension_has_no_kernel_for_a_wider_gradient():
    """Its own check: it is never reached through the functions, which name the dtypes."""
    wide, logits = torch.full((2, 5), 7.0), torch.ones(2, 5).bfloat16()
    targets, stats, coef = torch.tensor([1, 2]), torch.zeros(2, 2), torch.ones(2)
    with pytest.raises(ValueError, match="no gradient of dtype code 0 for logits of dtype code 1"):
        cpu_rows._backward_into(wide, logits, targets, None, stats, coef, *Head().args(), isa=None, threads=None)
    assert (wide == 7.0).all()
