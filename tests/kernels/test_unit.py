"""Forward and unit gradient in one read and one write of each row, by Triton and by CUDA, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from row_kernels import DTYPES, HEADS, NARROW, PLAIN, SHARED, Tokens, shared_rows
from unit_kernels import NAN, UnitKernels, by_row, cuda_unit, some_tokens, tokens_of, triton_unit


@pytest.fixture(params=[pytest.param("triton", marks=pytest.mark.triton), pytest.param("cuda", marks=pytest.mark.cpu)])
def kernels(request) -> UnitKernels:
    if request.param == "triton":
        return triton_unit()
    request.getfixturevalue("emulator")
    return cuda_unit(slice_bytes=1000)


@pairwise({"dtype": DTYPES, "V": [1, 31, 128, 331], "shared": SHARED})
def test_every_vocabulary(kernels, dtype, V, shared):
    tokens = some_tokens(V, shared)
    kernels.check((torch.randn(len(list(by_row(tokens))), V) * 4).to(dtype), tokens)


@pairwise({"dtype": DTYPES, "head": HEADS, "shared": SHARED})
def test_every_head(kernels, dtype, head, shared):
    tokens = some_tokens(331, shared)
    kernels.check((torch.randn(len(list(by_row(tokens))), 331) * 4).to(dtype), tokens, head(331))


WIDTHS = {f"{V} of {width}": (V, width) for V, width in [(2, 2), (120, 120), (121, 121), (122, 122), (331, 336)]}


@pairwise({"V, width": WIDTHS, "grad_dtype": NARROW, "shared": SHARED})
def test_narrow_gradient_over_its_logits(kernels, V, width, grad_dtype, shared):
    tokens = some_tokens(V, shared)
    logits = torch.randn(len(list(by_row(tokens))), width)[:, :V]
    kernels.check(logits, tokens, grad_dtype=grad_dtype)


def test_statistics_as_in_row_forward(kernels):
    """The same sums in another order, and nothing else."""
    logits, tokens = torch.randn(3, 409), shared_rows(409, [2, 3, 1])
    expected = kernels.rows.row_forward(logits, *tokens[:2], *PLAIN)
    for a, b in zip(kernels.forward_(logits, tokens), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rows_that_hold_nan(kernels):
    """One without a token is not read; one whose coefs are all 0 is NaN until they are known, and then 0."""
    logits = torch.full((4, 331), torch.nan)
    logits[3] = 1.0
    tokens = tokens_of([[(-100, NAN)], [(3, 0.0)], [(3, 0.0), (4, 0.0)], [(5, NAN)]], 331)
    stats, logps = kernels.forward_(logits, tokens)
    assert (stats[:, 0] == 0).all() and logps.isnan().tolist() == [False, True, True, True, False]
    assert (logits[0] == 0).all() and logits[1:3].isnan().all()
    scale = kernels.finish_(logits, tokens, stats)
    assert (logits[:3] == 0).all() and scale[:3].tolist() == [0, 0, 0]
    assert logits[3].isfinite().all() and scale[3].isnan()  # a NaN coef is a gradient


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("target", [7, -1, 8, 2**32 + 3, -(2**63)])
def test_target_that_no_word_has(kernels, target, shared):
    """It is one target like another, without a column; -1 and V would be columns of the neighbours."""
    buffer = torch.randn(5, 7)
    before, rows = buffer.clone(), [[2], [target, target] if shared else [target], [4, target] if shared else [4]]
    starts = torch.tensor([0, 1, 3, 5]) if shared else None
    targets = torch.tensor([token for row in rows for token in row])
    tokens = Tokens(targets, starts, torch.linspace(0.5, 1.5, len(targets)))
    stats, logps = kernels.forward_(buffer[1:4], tokens)
    assert torch.equal(logps.isnan(), targets == target)
    probabilities = before[1:4].double().softmax(-1)
    hits = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(buffer[1].double(), hits[2] - probabilities[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(buffer[2].double(), -probabilities[1], rtol=1e-5, atol=1e-7)
    assert not shared or torch.equal(buffer[3], before[3])
    scale = kernels.finish_(buffer[1:4], tokens, stats)
    if shared:
        torch.testing.assert_close(scale, torch.tensor([0.5, 1.75, 1.0]))
        torch.testing.assert_close(buffer[3].double(), 1.25 * hits[4] - 2.75 * probabilities[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(buffer[[0, 4]], before[[0, 4]])


def test_nan_reaches_its_row_and_no_other(kernels):
    logits = torch.randn(3, 331)
    logits[1, 300] = torch.nan
    _, logps = kernels.forward_(logits, Tokens(torch.tensor([1, 2, 3]), None, torch.ones(3)))
    assert logps.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_a_certain_word_has_no_gradient(kernels, shared):
    """It has all the probability: exactly 0, as in the two kernels for coefs that are known."""
    logits = torch.full((1, 5), -200.0)
    logits[0, 3] = 7.7
    tokens = tokens_of([[(3, 0.3), (3, 0.4)] if shared else [(3, 0.3)]], 5)
    _, logps = kernels.forward_(logits, tokens if shared else tokens._replace(row_starts=None))
    assert (logps == 0).all() and (logits == 0).all()


def test_no_rows(kernels):
    tokens = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(0))
    stats, logps = kernels.forward_(torch.zeros(0, 7), tokens)
    assert stats.shape == (2, 0) and logps.shape == (0,)
    assert kernels.finish_(torch.zeros(0, 7), tokens, stats).shape == (0,)
