"""The whole objective in one cooperative CUDA launch, run thread by thread on the CPU as in test_cuda_host.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contrast_chunks import GROUPS, OPTIONS, PAIR_LOSSES, Chunk, arguments, expected, with_ranks
from simt_host import EmulatorError
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels import plain
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.options import Objective

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]

V = 1031  # prime, and more than a block of 32 threads takes at a time
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {"plain": (None, 1.0, 0.0, 1.0), "all": (torch.linspace(-1, 1, V), 1.3, 30.0, 0.7)}


def make_chunk(groups: str, dtype: torch.dtype) -> tuple[Chunk, Tensor, Tensor]:
    """Logits (R, V) and targets (R,) of the slots of some groups; the slots without a token come first."""
    layout = GROUPS[groups]
    present = torch.cat([torch.arange(slots) >= slots - tokens for group in layout for tokens, slots in group])
    targets = torch.randint(0, V, present.shape).where(present, -100)
    return Chunk(layout, torch.zeros(len(targets))), (torch.randn(len(targets), V) * 2).to(dtype), targets


def run(chunk: Chunk, logits: Tensor, targets: Tensor, grad: Tensor | None, objective: Objective, head, **changes: Any):
    options = arguments(chunk, objective) | {"threads": 32} | changes
    given = {name: options.pop(name) for name in ("token_starts", "segment_starts", "lengths", "ref_logps", "ranks")}
    return cuda_groups.cpo_loss(logits, targets, grad, *given.values(), *head, **options)


def dense(chunk: Chunk, logits: Tensor, targets: Tensor, objective: Objective, head, dtype: torch.dtype):
    """(sums, logps, gradient) by the reference, from log-probabilities and coefficients in ``dtype``."""
    x = logits.double() if dtype == torch.float64 else logits
    bias, *numbers = head
    transform = (None if bias is None else bias.to(dtype), *numbers)
    stats, logps = plain.row_forward(x, targets, None, *transform)
    here = Chunk(chunk.groups, logps, chunk.ref_logps, chunk.ranks)
    sums, coef = expected(here, objective, 1.0, dtype)
    return sums, logps, plain.row_backward(x, targets, None, stats, coef.to(stats.dtype), *transform)


def check(
    groups: str, objective: Objective, dtype=torch.float32, head="plain", ranks: str | None = None, **changes: Any
):
    chunk, logits, targets = make_chunk(groups, dtype)
    chunk.ranks = None if ranks is None else with_ranks(chunk.groups, ranks)
    chunk.ref_logps = -7.0 * torch.rand(len(chunk.segments)) * chunk.lengths
    eager, oracle = (dense(chunk, logits, targets, objective, HEADS[head], to) for to in (torch.float32, torch.float64))
    grad = torch.empty_like(logits)
    out = (*run(chunk, logits, targets, grad, objective, HEADS[head], **changes), grad)
    for name, *tensors in zip(("sums", "logps", "gradient"), out, eager, oracle, strict=True):
        assert_accurate(*tensors, name)
    over = logits.clone()
    again = run(chunk, over, targets, over, objective, HEADS[head], **changes)
    assert torch.equal(over, grad) and all(torch.equal(a, b) for a, b in zip(again, out, strict=False))
    without = run(chunk, logits, targets, None, objective, HEADS[head], **changes)
    assert all(torch.equal(a, b) for a, b in zip(without, again, strict=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_head(dtype, head):
    check("ragged", Objective(beta=0.3, mle_weight=0.4), dtype, head, "ties")


@pytest.mark.parametrize("groups", GROUPS)
def test_every_layout(groups):
    check(groups, Objective(beta=0.2, num_groups=7), ranks="ranked")


@pytest.mark.parametrize("options", [*OPTIONS.values(), *PAIR_LOSSES.values()])
def test_every_objective(options):
    pairs = Objective(**options).pairs_only
    check("pairs" if pairs else "absent", Objective(**options))


@pytest.mark.parametrize("threads", [0, 32, 256])
def test_any_number_of_threads(threads):
    check("five", Objective(), threads=threads)


def test_the_order_of_the_threads_changes_no_bit(emulator):
    """Three blocks side by side, which the barriers of the grid keep in step."""
    chunk, logits, targets = make_chunk("ragged", torch.bfloat16)
    results = []
    for emulator.seed in range(4):
        over = logits.clone()
        results.append((*run(chunk, over, targets, over, Objective(), HEADS["plain"], threads=64), over))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_targets_that_no_word_has_are_not_read(emulator):
    chunk, logits, targets = make_chunk("pairs", torch.float32)
    targets[3] = V
    sums, logps = run(chunk, logits, targets, torch.empty_like(logits), Objective(), HEADS["plain"])
    assert logps.isnan().nonzero().tolist() == [[3]] and sums.isnan().tolist() == [True] + [False] * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "grad has dtype torch.float64"),
        (lambda x: x[:, 1:], r"grad has shape \(50, 1030\)"),
        (lambda x: x.T.contiguous().T, r"grad has strides \(1, 52\)"),
    ],
)
def test_gradients_that_do_not_fit(change, message):
    chunk, logits, targets = make_chunk("pairs", torch.float32)
    message = message.replace("50", str(len(targets))).replace("52", str(len(targets)))
    with pytest.raises(ValueError, match=message):
        run(chunk, logits, targets, change(torch.empty_like(logits)), Objective(), HEADS["plain"])


def test_gradient_over_other_rows_of_the_logits():
    chunk, logits, targets = make_chunk("pairs", torch.float32)
    buffer = torch.empty(len(targets) + 1, V)
    with pytest.raises(ValueError, match="grad shares memory with logits"):
        run(chunk, buffer[1:].copy_(logits), targets, buffer[:-1], Objective(), HEADS["plain"])


def test_a_chunk_needs_as_many_slots_as_rows():
    chunk, logits, targets = make_chunk("pairs", torch.float32)
    with pytest.raises(EmulatorError, match="outside of every region"):
        run(chunk, logits, targets, None, Objective(), HEADS["plain"], token_starts=chunk.token_starts * 2)


def test_groups_without_a_row_have_sums_of_zero():
    """Every segment is empty: nothing but the sums is left to write."""
    chunk = Chunk([[(0, 0), (0, 0)]] * 3, torch.zeros(0))
    logits, targets = torch.zeros(0, V), torch.zeros(0, dtype=torch.int64)
    sums, logps = run(chunk, logits, targets, torch.empty_like(logits), Objective(), HEADS["plain"])
    assert torch.equal(sums, torch.zeros(6)) and logps.shape == (0,)
