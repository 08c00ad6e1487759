"""The row kernels of Triton and of CUDA against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from row_kernels import (
    DTYPES,
    HEADS,
    NARROW,
    PLAIN,
    SHARED,
    RowKernels,
    Tokens,
    cuda_rows,
    one_token_a_row,
    shared_rows,
    some_tokens,
    triton_rows,
)
from tolerance import assert_accurate

from cpo_kernels.kernels import numerics, plain

EVERY_ROW = pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)


@pytest.fixture(params=[pytest.param("triton", marks=pytest.mark.triton), pytest.param("cuda", marks=pytest.mark.cpu)])
def kernels(request) -> RowKernels:
    if request.param == "triton":
        return triton_rows()
    request.getfixturevalue("emulator")
    return cuda_rows()


SIZES = {  # blocks, and columns beside them
    "the only probability is 1": (0, 1),
    "two words": (0, 2),
    "prime, less than a block: rows off every vector boundary": (0, 31),
    "no tail": (2, 0),
    "one block and whole vectors": (1, 16),
    "two blocks and whole vectors": (2, 16),
    "several blocks; with a lead of 1, a tail longer than a block": (3, -1),
    "two blocks and words after the last vector": (2, 13),
}


@pairwise({"dtype": DTYPES, "size": SIZES, "shared": SHARED})
def test_every_vocabulary(kernels, dtype, size, shared):
    blocks, extra = size
    V = blocks * kernels.block(dtype) + extra
    kernels.check((torch.randn(3, V) * 4).to(dtype), some_tokens(V, shared))


@pairwise({"dtype": DTYPES, "head": HEADS, "shared": SHARED})
def test_every_head(kernels, dtype, head, shared):
    V = kernels.block(dtype) + 41
    kernels.check((torch.randn(3, V) * 4).to(dtype), some_tokens(V, shared), head(V))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_at_vector_boundaries(kernels, dtype):
    V = kernels.block(dtype)
    kernels.check(torch.randn(3, V).to(dtype), one_token_a_row(V, 3), HEADS["bias"](V))


@pairwise({"dtype": DTYPES, "V": [1009, 9001, 20011], "head": ["plain", "all"]})
def test_the_backends_own_blocks(kernels, dtype, V, head):
    """Prime sizes; the largest crosses every block of the tables."""
    kernels.check(torch.randn(2, V).to(dtype), shared_rows(V, [2, 1]), HEADS[head](V), **kernels.own)


@pytest.mark.parametrize("count", [4, 5, 11, 31, 70])
def test_many_tokens_in_a_row_with_repeated_targets(kernels, count):
    """On both sides of the number that Triton takes at a time, and of the threads of a block of CUDA."""
    kernels.check(torch.randn(3, 5), shared_rows(5, [2, count, 1]))


@pytest.mark.parametrize("extreme", ["both", "first", "last"])
def test_huge_logits_lose_nothing(kernels, extreme):
    V = 2 * kernels.block() + 3
    logits = torch.randn(3, V)
    if extreme == "both":
        logits += torch.where(torch.rand(3, V) < 0.5, 1e4, -1e4)
    else:
        logits[:, 0 if extreme == "first" else V - 1] = 1e4
    kernels.check(logits, shared_rows(V, [2, 1, 2]))
    kernels.check(logits, one_token_a_row(V, 3))


@pytest.mark.parametrize("slope", [5000.0, -5000.0])
def test_maximum_that_moves_from_block_to_block(kernels, slope):
    V = 4 * kernels.block() + 13
    kernels.check(torch.linspace(-slope, slope, V).repeat(2, 1) + torch.randn(2, V), shared_rows(V, [1, 2]))


@pairwise({"dtype": DTYPES, "sizes": {"a word left": (0, 3, 2), "blocks": (3, 0, 5)}, "leading": [True, False]})
def test_minus_infinity_is_probability_zero(kernels, dtype, sizes, leading):
    blocks, extra, beyond = sizes
    V, stretch = blocks * kernels.block(dtype) + extra, max(blocks - 1, 0) * kernels.block(dtype) + beyond
    logits = torch.randn(2, V).to(dtype)
    where = slice(0, stretch) if leading else slice(V - stretch, V)
    logits[:, where] = -torch.inf
    finite = V - 1 if leading else 0
    tokens = Tokens(torch.tensor([finite, finite]), None, torch.randn(2))
    kernels.check(logits, tokens)
    stats, _ = kernels.forward(logits, tokens)
    assert (kernels.backward(logits, tokens, stats)[:, where] == 0).all()
    _, logps = kernels.forward(logits, tokens._replace(targets=torch.full((2,), where.start)))
    assert (logps == -torch.inf).all()


def test_row_of_minus_infinity_is_nan_as_in_log_softmax(kernels):
    logits = torch.full((1, 127), -torch.inf)
    tokens = Tokens(torch.tensor([3]), None, torch.ones(1))
    stats, logps = kernels.forward(logits, tokens)
    assert logps.isnan().all() and torch.log_softmax(logits, -1).isnan().all()
    assert kernels.backward(logits, tokens, stats).isnan().all()


@pairwise({"place": ["first", "within", "last"], "bad": [torch.nan, torch.inf], "shared": SHARED})
def test_nan_and_infinity_reach_their_row_and_no_other(kernels, bad, place, shared):
    V = 2 * kernels.block() + 7
    logits = torch.randn(3, V)
    logits[1, {"first": 0, "within": kernels.block() + 3, "last": V - 1}[place]] = bad
    tokens = Tokens(torch.tensor([5, 6, 7]), torch.arange(4) if shared else None, torch.ones(3))
    stats, logps = kernels.forward(logits, tokens)
    assert logps.isnan().tolist() == [False, True, False]
    grad = kernels.backward(logits, tokens, stats)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_gradient_come_out_zero(kernels, dtype):
    """Zero coefs, absent tokens, no tokens: exactly 0 whatever the row holds; a NaN coef is a gradient."""
    V = kernels.block(dtype) + 3
    logits = torch.full((4, V), torch.nan, dtype=dtype)
    targets, coef = torch.tensor([1, 2, -100, 3]), torch.tensor([0.0, -0.0, torch.nan, torch.nan])
    stats = torch.full((2, 4), torch.nan)
    for tokens in (Tokens(targets, torch.tensor([0, 2, 3, 3, 4]), coef), Tokens(targets, None, coef)):
        grad = kernels.backward(logits, tokens, stats)
        assert (grad[:3] == 0).all() and grad[3].isnan().all()
        over = logits.clone()
        kernels.backward_(over, tokens, stats)
        assert torch.equal(over[:3], grad[:3]) and over[3].isnan().all()


def test_rows_without_a_token_are_not_read(kernels):
    logits = torch.full((3, 5), torch.nan)
    tokens = Tokens(torch.tensor([-100, -100]), torch.tensor([0, 1, 1, 2]), torch.ones(2))
    stats, logps = kernels.forward(logits, tokens)
    assert (stats == 0).all() and (logps == 0).all()


def test_coefs_that_cancel_are_a_gradient_elsewhere(kernels):
    """The sum of the coefs is 0, the coefs are not."""
    tokens = Tokens(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([1.0, -1.0]))
    logits = torch.randn(1, 5)
    stats, _ = kernels.forward(logits, tokens)
    exact = torch.tensor([[0.0, 1.0, -1.0, 0.0, 0.0]])
    assert_accurate(kernels.backward(logits, tokens, stats), exact, exact.double(), "gradient")


@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_certain_words_have_no_gradient(kernels, count):
    """All tokens of a row have one target, and it has all the probability: coefs cancel to exactly 0."""
    logits = torch.full((1, 5), -200.0)
    logits[0, 3] = 7.7
    tokens = Tokens(torch.full((count,), 3), torch.tensor([0, count]), torch.randn(count))
    stats, logps = kernels.forward(logits, tokens)
    assert (logps == 0).all() and (kernels.backward(logits, tokens, stats) == 0).all()
    if count == 1:
        assert (kernels.backward(logits, tokens._replace(row_starts=None), stats) == 0).all()


@pairwise({"dtype": DTYPES, "size": {"3": (0, 3), "127": (0, 127), "blocks": (4, 0)}, "shared": SHARED})
def test_slices_of_a_wider_buffer(kernels, dtype, size, shared):
    """In place and out of place give the same bits wherever the rows begin, and the surroundings keep theirs."""
    blocks, extra = size
    V = blocks * kernels.block(dtype) + extra
    head = HEADS["all"](V)
    buffer = torch.randn(3, V + 9).to(dtype)
    before, logits = buffer.clone(), buffer[:, 5 : 5 + V]
    tokens = some_tokens(V, shared)
    kernels.check(logits, tokens, head)
    stats, _ = kernels.forward(logits, tokens, head)
    grad = kernels.backward(logits, tokens, stats, head)
    assert torch.equal(buffer, before) and grad.is_contiguous()
    assert torch.equal(grad, kernels.backward(logits.contiguous(), tokens, stats, head))
    kernels.backward_(logits, tokens, stats, head)
    assert torch.equal(logits, grad)
    assert torch.equal(buffer[:, :5], before[:, :5]) and torch.equal(buffer[:, 5 + V :], before[:, 5 + V :])


NARROW_SIZES = {  # (blocks, columns beside them, columns between rows, whether of several warps)
    "two words": (0, 2, 0, False),
    "rows at vector boundaries, a tail": (3, -1, 1, False),
    "rows at vector boundaries, by a stride that is no multiple of 16": (3, 5, 3, False),
    "rows off vector boundaries": (3, 5, 0, False),
    "rows off every other vector boundary": (3, 6, 0, False),
    "no tail": (2, 0, 0, False),
    "warps that may overtake each other": (None, 4500, 12, True),
}


@pairwise({"grad_dtype": NARROW, "size": NARROW_SIZES, "shared": SHARED, "seed": [0, 1, 2]})
def test_narrow_gradient_over_its_logits(kernels, request, grad_dtype, size, shared, seed):
    """The seed is of the order in which the emulator runs CUDA's threads."""
    if "cuda" in kernels.module.__name__:
        request.getfixturevalue("emulator").seed = seed
    blocks, extra, gap, several = size
    V = (blocks or 0) * kernels.block() + extra
    launch = kernels.wide if several else kernels.small
    logits = torch.empty(3, V + gap)[:, :V].copy_(torch.randn(3, V))
    tokens = some_tokens(V, shared)
    stats, _ = kernels.forward(logits, tokens, **launch)
    apart = torch.empty(3, V, dtype=grad_dtype)
    kernels.backward_into(apart, logits, tokens, stats, **launch)
    eager = plain.row_backward(logits, *tokens[:2], stats, tokens.coef, *PLAIN)
    oracle = plain.row_backward(logits.double(), *tokens[:2], stats.double(), tokens.coef.double(), *PLAIN)
    assert_accurate(apart, eager.to(grad_dtype), oracle, "gradient")
    kernels.backward_(logits, tokens, stats, grad_dtype=grad_dtype, **launch)
    assert torch.equal(numerics.narrow_view(logits, grad_dtype), apart)


def test_gradient_into_rows_of_another_layout(kernels):
    V = 2 * kernels.block() + 5
    logits, wide = torch.randn(3, V), torch.full((3, V + 4), 9.0)
    tokens = one_token_a_row(V, 3)
    stats, _ = kernels.forward(logits, tokens)
    kernels.backward_into(wide[:, 3 : 3 + V], logits, tokens, stats)
    assert torch.equal(wide[:, 3 : 3 + V], kernels.backward(logits, tokens, stats))
    assert (wide[:, :3] == 9).all() and (wide[:, 3 + V :] == 9).all()


def test_expanded_logits_can_be_read(kernels):
    logits = torch.randn(1, 127).expand(3, 127)
    tokens = Tokens(torch.tensor([1, 1, 2]), None, torch.tensor([1.0, 1.0, 2.0]))
    stats, logps = kernels.forward(logits, tokens)
    grad = kernels.backward(logits, tokens, stats)
    assert logps[0] == logps[1] and torch.equal(grad[0], grad[1]) and not torch.equal(grad[1], grad[2])


@EVERY_ROW
@pytest.mark.parametrize("target", [7, -1, 8, -101, 2**32 + 3, -(2**40)])
def test_target_that_no_word_has(kernels, target, shared):
    """NaN, and no read or write outside the row; -1 and V would be words of its neighbours."""
    V = 7
    buffer = torch.randn(5, V)
    before, logits = buffer.clone(), buffer[1:4]
    tokens = Tokens(torch.tensor([2, target, 4]), torch.arange(4) if shared else None, torch.ones(3))
    stats, logps = kernels.forward(logits, tokens)
    assert logps.isnan().tolist() == [False, True, False]
    hits = torch.eye(V)[[2, 0, 4]]
    hits[1] = 0
    eager, oracle = (hits - torch.softmax(before[1:4].to(dtype), -1) for dtype in (torch.float32, torch.float64))
    kernels.backward_(logits, tokens, stats)
    assert_accurate(logits, eager, oracle, "gradient")
    assert torch.equal(buffer[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(kernels, dtype):
    V = 3 * kernels.block(dtype) + 5
    logits, tokens = torch.randn(3, V).to(dtype), shared_rows(V, [3, 1, 6])
    (stats, logps), (other_stats, other_logps) = (kernels.forward(logits, tokens) for _ in range(2))
    assert torch.equal(stats, other_stats) and torch.equal(logps, other_logps)
    assert torch.equal(kernels.backward(logits, tokens, stats), kernels.backward(logits, tokens, stats))


@pytest.mark.parametrize("R", [0, 1, 3])
def test_no_rows_and_no_tokens(kernels, R):
    logits, starts = torch.randn(R, 7), torch.zeros(R + 1, dtype=torch.int64)
    tokens = Tokens(torch.zeros(0, dtype=torch.int64), starts, torch.ones(0))
    stats, logps = kernels.forward(logits, tokens)
    assert stats.shape == (2, R) and logps.shape == (0,) and (stats == 0).all()
    kernels.backward_(logits, tokens, stats)
    assert (logits == 0).all()
