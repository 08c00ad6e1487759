"""The CUDA row kernels against the reference in float64: what nvcc compiles, run thread by thread on the CPU.

tests/simt/simt_host.h stands in for the GPU: it runs the threads of a block in an order drawn from a seed, and every
access outside of the arguments, misaligned vector and barrier that not all threads reach is an error.
"""

from __future__ import annotations

import pytest
import simt_host
import torch
from cuda_host_cases import (
    DTYPES,
    HEADS,
    NARROW,
    PLAIN,
    SHARED,
    Tokens,
    backward,
    forward,
    one_token_a_row,
    shared_rows,
    some_tokens,
)
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels import numerics, plain
from cpo_kernels.kernels.cuda import rows as cuda_rows

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]


def tile(dtype: torch.dtype, threads: int = 32) -> int:
    """Columns that a block takes at a time: four vectors of 16 bytes a thread."""
    return 4 * threads * 16 // dtype.itemsize


def backward_(logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, grad_dtype=None, threads: int = 32) -> None:
    cuda_rows.row_backward_(logits, *tokens[:2], stats, tokens.coef, *head, grad_dtype, threads=threads)


def check_against_reference(logits: Tensor, tokens: Tokens, head=PLAIN, threads: int = 32) -> None:
    """Forward and backward by the rule of tolerance; the reference computes in float32 and rounds the gradient once."""
    targets, row_starts, coef = tokens
    bias, *numbers = head
    double = (None if bias is None else bias.double(), *numbers)
    stats, logps = forward(logits, tokens, head, threads)
    eager_stats, eager_logps = plain.row_forward(logits, targets, row_starts, *head)
    oracle_stats, oracle_logps = plain.row_forward(logits.double(), targets, row_starts, *double)
    present = torch.unique(plain.token_rows(targets, row_starts)[targets != -100])
    for part, name in ((lambda stats: stats[0], "max"), (lambda stats: stats.sum(0), "log-sum-exp")):
        assert_accurate(*(part(s[:, present]) for s in (stats, eager_stats, oracle_stats)), name)
    assert_accurate(logps, eager_logps, oracle_logps, "logps")

    grad = backward(logits, tokens, stats, head, threads)
    eager = plain.row_backward(logits, targets, row_starts, eager_stats, coef, *head)
    oracle = plain.row_backward(logits.double(), targets, row_starts, oracle_stats, coef.double(), *double)
    assert_accurate(grad, eager, oracle, "gradient")


@SHARED
@pytest.mark.parametrize("size", ["1", "2", "31", "tile", "tile + 16", "2 tiles - 1", "2 tiles + 13"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vocabulary(dtype, size, shared):
    """One column; rows off every 16-byte boundary; whole tiles, tiles that end early, columns after the last vector."""
    count, unit, extra = {
        "1": (0, 1, 1),
        "2": (0, 1, 2),
        "31": (0, 1, 31),
        "tile": (1, tile(dtype), 0),
        "tile + 16": (1, tile(dtype), 16),
        "2 tiles - 1": (2, tile(dtype), -1),
        "2 tiles + 13": (2, tile(dtype), 13),
    }[size]
    V = count * unit + extra
    logits = (torch.randn(3, V) * 4).to(dtype)
    check_against_reference(logits, some_tokens(V, shared))


@SHARED
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head(dtype, head, shared):
    V = tile(dtype) + 41
    logits = (torch.randn(3, V) * 4).to(dtype)
    check_against_reference(logits, some_tokens(V, shared), head(V))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_at_vector_boundaries(dtype):
    V = tile(dtype)
    check_against_reference(torch.randn(3, V).to(dtype), one_token_a_row(V, 3), HEADS["bias"](V))


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("V", [1009, 9001, 20011])
def test_the_kernels_own_number_of_threads(V, head):
    logits = torch.randn(2, V).bfloat16()
    check_against_reference(logits, shared_rows(V, [2, 1]), HEADS[head](V), threads=0)


@pytest.mark.parametrize("threads", [33, 16, 1024])
def test_number_of_threads_that_no_block_has(threads):
    with pytest.raises(simt_host.EmulatorError, match=f"threads is {threads}; expected a multiple of 32 up to 512"):
        forward(torch.randn(2, 5), one_token_a_row(5, 2), threads=threads)


@pytest.mark.parametrize("count", [4, 31, 70])
def test_many_tokens_in_a_row_with_repeated_targets(count):
    """Fewer and more than a block has threads."""
    V = 5
    check_against_reference(torch.randn(3, V), shared_rows(V, [2, count, 1]))


@pytest.mark.parametrize("extreme", ["both", "first", "last"])
def test_huge_logits_lose_nothing(extreme):
    V = tile(torch.float32) + 3
    logits = torch.randn(3, V)
    if extreme == "both":
        logits += torch.where(torch.rand(3, V) < 0.5, 1e4, -1e4)
    else:
        logits[:, 0 if extreme == "first" else V - 1] = 1e4
    check_against_reference(logits, shared_rows(V, [2, 1, 2]), threads=64)
    check_against_reference(logits, one_token_a_row(V, 3), threads=64)


@pytest.mark.parametrize("slope", [5000.0, -5000.0])
def test_maximum_that_moves_from_tile_to_tile(slope):
    V = 4 * tile(torch.float32) + 13
    logits = torch.linspace(-slope, slope, V).repeat(2, 1) + torch.randn(2, V)
    check_against_reference(logits, shared_rows(V, [1, 2]))


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_is_probability_zero(dtype, leading):
    V, stretch = 2 * tile(dtype), tile(dtype) + 5
    logits = torch.randn(2, V).to(dtype)
    where = slice(0, stretch) if leading else slice(V - stretch, V)
    logits[:, where] = -torch.inf
    finite = V - 1 if leading else 0
    tokens = Tokens(torch.tensor([finite, finite]), None, torch.randn(2))
    check_against_reference(logits, tokens)
    stats, _ = forward(logits, tokens)
    assert (backward(logits, tokens, stats)[:, where] == 0).all()
    _, logps = forward(logits, tokens._replace(targets=torch.full((2,), where.start)))
    assert (logps == -torch.inf).all()


def test_row_of_minus_infinity_is_nan_as_in_log_softmax():
    logits = torch.full((1, 127), -torch.inf)
    tokens = Tokens(torch.tensor([3]), None, torch.ones(1))
    stats, logps = forward(logits, tokens)
    assert logps.isnan().all() and torch.log_softmax(logits, -1).isnan().all()
    assert backward(logits, tokens, stats).isnan().all()


@SHARED
@pytest.mark.parametrize("column", [0, 700, tile(torch.float32) * 2 + 6])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_their_row_and_no_other(bad, column, shared):
    V = 2 * tile(torch.float32) + 7
    logits = torch.randn(3, V)
    logits[1, column] = bad
    tokens = Tokens(torch.tensor([5, 6, 7]), torch.arange(4) if shared else None, torch.ones(3))
    stats, logps = forward(logits, tokens)
    assert logps.isnan().tolist() == [False, True, False]
    grad = backward(logits, tokens, stats)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_gradient_come_out_zero(dtype):
    """Zero coefs, absent tokens, no tokens: exactly 0 whatever the row holds; a NaN coef is a gradient."""
    V = tile(dtype) + 3
    logits = torch.full((4, V), torch.nan, dtype=dtype)
    targets, coef = torch.tensor([1, 2, -100, 3]), torch.tensor([0.0, -0.0, torch.nan, torch.nan])
    stats = torch.full((2, 4), torch.nan)
    for tokens in (Tokens(targets, torch.tensor([0, 2, 3, 3, 4]), coef), Tokens(targets, None, coef)):
        grad = backward(logits, tokens, stats)
        assert (grad[:3] == 0).all() and grad[3].isnan().all()
        over = logits.clone()
        backward_(over, tokens, stats)
        assert torch.equal(over[:3], grad[:3]) and over[3].isnan().all()


def test_rows_without_a_token_are_not_read():
    logits = torch.full((3, 5), torch.nan)
    tokens = Tokens(torch.tensor([-100, -100]), torch.tensor([0, 1, 1, 2]), torch.ones(2))
    stats, logps = forward(logits, tokens)
    assert (stats == 0).all() and (logps == 0).all()


def test_coefs_that_cancel_are_a_gradient_elsewhere():
    """The sum of the coefs is 0, the coefs are not."""
    tokens = Tokens(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([1.0, -1.0]))
    logits = torch.randn(1, 5)
    stats, _ = forward(logits, tokens)
    exact = torch.tensor([[0.0, 1.0, -1.0, 0.0, 0.0]])
    assert_accurate(backward(logits, tokens, stats), exact, exact.double(), "gradient")


@pytest.mark.parametrize("count", [1, 3, 40])
def test_certain_words_have_no_gradient(count):
    """All tokens of a row have one target, and it has all the probability: coefs cancel to exactly 0."""
    logits = torch.full((1, 5), -200.0)
    logits[0, 3] = 7.7
    tokens = Tokens(torch.full((count,), 3), torch.tensor([0, count]), torch.randn(count))
    stats, logps = forward(logits, tokens)
    assert (logps == 0).all() and (backward(logits, tokens, stats) == 0).all()
    if count == 1:
        assert (backward(logits, tokens._replace(row_starts=None), stats) == 0).all()


@SHARED
@pytest.mark.parametrize("V", [3, 127, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_wider_buffer(dtype, V, shared):
    """In place and out of place give the same bits wherever the rows begin, and the surroundings keep theirs."""
    head = HEADS["all"](V)
    buffer = torch.randn(3, V + 9).to(dtype)
    before, logits = buffer.clone(), buffer[:, 5 : 5 + V]
    tokens = some_tokens(V, shared)
    check_against_reference(logits, tokens, head)
    stats, _ = forward(logits, tokens, head)
    grad = backward(logits, tokens, stats, head)
    assert torch.equal(buffer, before) and grad.is_contiguous()
    assert torch.equal(grad, backward(logits.contiguous(), tokens, stats, head))
    backward_(logits, tokens, stats, head)
    assert torch.equal(logits, grad)
    assert torch.equal(buffer[:, :5], before[:, :5]) and torch.equal(buffer[:, 5 + V :], before[:, 5 + V :])


@SHARED
@pytest.mark.parametrize(
    ("V", "width", "threads"),
    [
        (2, 2, 32),
        (191, 192, 32),  # rows at vector boundaries, a tail
        (1200, 1200, 32),  # several tiles
        (1201, 1201, 32),  # rows off vector boundaries: some stores of two bytes
        (1202, 1202, 32),
        (512, 512, 32),  # one whole tile
        (4500, 4512, 128),  # warps that may overtake each other
    ],
)
@pytest.mark.parametrize("grad_dtype", NARROW, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_narrow_gradient_over_its_logits(emulator, seed, grad_dtype, V, width, threads, shared):
    emulator.seed = seed
    logits = torch.empty(3, width)[:, :V].copy_(torch.randn(3, V))
    tokens = some_tokens(V, shared)
    stats, _ = forward(logits, tokens, threads=threads)
    apart = torch.empty(3, V, dtype=grad_dtype)
    rows = cuda_rows.Rows(logits, *tokens[:2], *PLAIN)
    cuda_rows._backward_into(apart, logits, rows, stats, tokens.coef, threads)
    eager = plain.row_backward(logits, *tokens[:2], stats, tokens.coef, *PLAIN)
    oracle = plain.row_backward(logits.double(), *tokens[:2], stats.double(), tokens.coef.double(), *PLAIN)
    assert_accurate(apart, eager.to(grad_dtype), oracle, "gradient")
    backward_(logits, tokens, stats, grad_dtype=grad_dtype, threads=threads)
    assert torch.equal(numerics.narrow_view(logits, grad_dtype), apart)


def test_gradient_into_rows_of_another_layout():
    V = 1031
    logits, wide = torch.randn(3, V), torch.full((3, V + 4), 9.0)
    tokens = one_token_a_row(V, 3)
    stats, _ = forward(logits, tokens)
    rows = cuda_rows.Rows(logits, *tokens[:2], *PLAIN)
    cuda_rows._backward_into(wide[:, 3 : 3 + V], logits, rows, stats, tokens.coef, 32)
    assert torch.equal(wide[:, 3 : 3 + V], backward(logits, tokens, stats))
    assert (wide[:, :3] == 9).all() and (wide[:, 3 + V :] == 9).all()


def test_expanded_logits_can_be_read():
    logits = torch.randn(1, 127).expand(3, 127)
    tokens = Tokens(torch.tensor([1, 1, 2]), None, torch.tensor([1.0, 1.0, 2.0]))
    stats, logps = forward(logits, tokens)
    grad = backward(logits, tokens, stats)
    assert logps[0] == logps[1] and torch.equal(grad[0], grad[1]) and not torch.equal(grad[1], grad[2])
    with pytest.raises(ValueError, match="rows overlap and cannot be overwritten"):
        backward_(logits, tokens, stats)


@SHARED
@pytest.mark.parametrize("target", [7, -1, 8, -101, 2**32 + 3, -(2**40)])
def test_target_that_no_word_has(target, shared):
    """NaN, and no read or write outside the row; -1 and V would be words of its neighbours."""
    V = 7
    buffer = torch.randn(5, V)
    before, logits = buffer.clone(), buffer[1:4]
    tokens = Tokens(torch.tensor([2, target, 4]), torch.arange(4) if shared else None, torch.ones(3))
    stats, logps = forward(logits, tokens)
    assert logps.isnan().tolist() == [False, True, False]
    hits = torch.eye(V)[[2, 0, 4]]
    hits[1] = 0
    eager, oracle = (hits - torch.softmax(before[1:4].to(dtype), -1) for dtype in (torch.float32, torch.float64))
    backward_(logits, tokens, stats)
    assert_accurate(logits, eager, oracle, "gradient")
    assert torch.equal(buffer[[0, 4]], before[[0, 4]])


@SHARED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_the_threads_changes_no_bit(emulator, dtype, shared):
    """What a missing barrier leaves to chance differs from seed to seed."""
    V = 2 * tile(dtype, 128) + 5
    logits, tokens = torch.randn(3, V).to(dtype), some_tokens(V, shared)
    results = []
    for emulator.seed in range(5):
        stats, logps = forward(logits, tokens, threads=128)
        results.append((stats, logps, backward(logits, tokens, stats, threads=128)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(rows):
    tokens = Tokens(torch.zeros(rows, dtype=torch.int64), None, torch.ones(rows))
    logits = torch.randn(rows, 7)
    stats, logps = forward(logits, tokens)
    assert stats.shape == (2, rows) and logps.shape == (rows,)
    assert backward(logits, tokens, stats).isfinite().all()
