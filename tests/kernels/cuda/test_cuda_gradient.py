"""Forward and gradient in one read of each row, by a cluster of CUDA blocks, run thread by thread on the CPU."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from row_kernels import DTYPES, HEADS, NARROW, PLAIN, SHARED, Tokens, shared_rows, some_tokens
from simt_host import EmulatorError
from tolerance import assert_accurate

from cpo_kernels.kernels import numerics, plain
from cpo_kernels.kernels.cuda import rows as cuda_rows

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]

# Bytes of a row in a block, for rows of some thousand: one block, two, eight, and eight that hold more than asked.
SLICES = {"one": 0, "two": 3000, "eight": 700, "eight at most": 64}


def one_read_(logits, tokens, head=PLAIN, grad_dtype=None, threads=32, slice_bytes=0):
    options = {"threads": threads, "slice_bytes": slice_bytes}
    return cuda_rows.row_gradient_(logits, *tokens, *head, grad_dtype, **options)


def check(logits, tokens, head=PLAIN, grad_dtype=None, threads=32, slice_bytes=0):
    """Against the reference in float64, by the rule of tolerance."""
    bias, *numbers = head
    double = (None if bias is None else bias.double(), *numbers)
    targets, row_starts, coef = tokens
    eager_stats, eager_logps = plain.row_forward(logits, targets, row_starts, *head)
    stats, logps = plain.row_forward(logits.double(), targets, row_starts, *double)
    eager = plain.row_backward(logits, targets, row_starts, eager_stats, coef, *head)
    oracle = plain.row_backward(logits.double(), targets, row_starts, stats, coef.double(), *double)
    out_stats, out_logps = one_read_(logits, tokens, head, grad_dtype, threads, slice_bytes)
    dtype = grad_dtype or logits.dtype
    present = torch.unique(plain.token_rows(targets, row_starts)[targets != -100])
    assert_accurate(*(s.sum(0)[present] for s in (out_stats, eager_stats, stats)), "log-sum-exp")
    assert_accurate(out_logps, eager_logps, logps, "logps")
    assert_accurate(numerics.narrow_view(logits, dtype), eager.to(dtype), oracle, "gradient")


@pairwise({"dtype": DTYPES, "V": [1, 31, 1024, 1031], "slice_bytes": SLICES, "shared": SHARED})
def test_every_cluster(dtype, V, slice_bytes, shared):
    check((torch.randn(3, V) * 4).to(dtype), some_tokens(V, shared), slice_bytes=slice_bytes)


@pairwise({"dtype": DTYPES, "head": HEADS, "shared": SHARED})
def test_every_head(dtype, head, shared):
    check((torch.randn(3, 1031) * 4).to(dtype), some_tokens(1031, shared), head(1031), slice_bytes=1024)


WIDTHS = {
    f"{V} of {width}": (V, width) for V, width in [(2, 2), (1200, 1200), (1201, 1201), (1202, 1202), (1031, 1040)]
}


@pairwise({"seed": [0, 1, 2], "V, width": WIDTHS, "grad_dtype": NARROW, "shared": SHARED})
def test_narrow_gradient_over_its_logits(emulator, seed, V, width, grad_dtype, shared):
    emulator.seed = seed
    logits = torch.empty(3, width)[:, :V].copy_(torch.randn(3, V))
    check(logits, some_tokens(V, shared), grad_dtype=grad_dtype, slice_bytes=1000)


def test_as_in_two_launches():
    """The same sums in another order, and nothing else."""
    logits, tokens = torch.randn(3, 4099), shared_rows(4099, [2, 3, 1])
    stats, logps = cuda_rows.row_forward(logits, *tokens[:2], *PLAIN)
    grad = cuda_rows.row_backward(logits, *tokens[:2], stats, tokens.coef, *PLAIN)
    found = one_read_(logits, tokens, slice_bytes=4096)
    for a, b in zip((*found, logits), (stats, logps, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rows_without_a_token_or_a_gradient():
    """Neither is read, the first; the second has log-probabilities and a gradient of exactly 0."""
    logits = torch.randn(3, 1031)
    logits[0] = torch.nan
    tokens = Tokens(torch.tensor([-100, 3, 4]), torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 0.0, 1.0]))
    expected = torch.log_softmax(logits.double(), -1)[1, 3].float()
    stats, logps = one_read_(logits, tokens, slice_bytes=512)
    assert (stats[:, 0] == 0).all() and logps[0] == 0
    torch.testing.assert_close(logps[1], expected)
    assert (logits[:2] == 0).all() and (logits[2] != 0).any()


@pytest.mark.parametrize("target", [7, -1, 8, 2**32 + 3])
def test_target_that_no_word_has(target):
    buffer = torch.randn(5, 7)
    before = buffer.clone()
    _, logps = one_read_(buffer[1:4], Tokens(torch.tensor([2, target, 4]), None, torch.ones(3)), slice_bytes=16)
    assert logps.isnan().tolist() == [False, True, False]
    assert torch.equal(buffer[[0, 4]], before[[0, 4]])


def test_nan_reaches_its_row_and_no_other():
    logits = torch.randn(3, 1031)
    logits[1, 1000] = torch.nan
    _, logps = one_read_(logits, Tokens(torch.tensor([1, 2, 3]), None, torch.ones(3)), slice_bytes=600)
    assert logps.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_the_order_of_the_threads_changes_no_bit(emulator, shared):
    logits, tokens, results = torch.randn(3, 2063).bfloat16(), some_tokens(2063, shared), []
    for emulator.seed in range(5):
        over = logits.clone()
        results.append((*one_read_(over, tokens, threads=64, slice_bytes=600), over))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_rows_that_no_cluster_holds():
    with pytest.raises(
        EmulatorError, match="a row of 2000000 bytes; expected what the shared memory of 8 blocks holds"
    ):
        one_read_(torch.zeros(1, 500_000), Tokens(torch.tensor([1]), None, torch.ones(1)))
