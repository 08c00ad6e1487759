"""The CUDA contrast against objective.py in float64, run thread by thread on the CPU as in test_cuda_host.py."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from contrast_chunks import (
    GROUPS,
    IMPOSSIBLE,
    OPTIONS,
    PAIR_LOSSES,
    PAIRS,
    RANKS,
    Chunk,
    arguments,
    expected,
    full,
    impossible_chunk,
    segment_sums,
    token_logps,
    with_ranks,
)
from pair_formulas import SMOOTHED
from project import ROOT
from simt_host import EmulatorError
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels import cpo_loss, linear_cpo_loss
from cpo_kernels.kernels.cuda.groups import MAX_CANDIDATES, contrast
from cpo_kernels.loss_table import KERNEL_CODES, LOSSES
from cpo_kernels.options import Objective

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]


def launch(chunk: Chunk, objective: Objective, gain: float = 1.0, **changes: Any) -> tuple[Tensor, Tensor]:
    return contrast(chunk.logps, **(arguments(chunk, objective, gain) | {"threads": 64} | changes))


def check(chunk: Chunk, objective: Objective, gain: float = 1.0, **changes: Any) -> tuple[Tensor, Tensor]:
    """Launch and hold against the oracle; returns what the launch gave."""
    out = launch(chunk, objective, gain, **changes)
    eager = expected(chunk, objective, gain, torch.float32)
    oracle = expected(chunk, objective, gain, torch.float64)
    for name, *tensors in zip(("sums", "coef"), out, eager, oracle, strict=True):
        assert_accurate(*tensors, name)
    return out


@pytest.mark.parametrize("ranks", [None, *RANKS])
@pytest.mark.parametrize("groups", GROUPS)
def test_ranked_contrast(groups, ranks):
    layout = GROUPS[groups]
    chunk = Chunk(layout, token_logps(layout), ranks=None if ranks is None else with_ranks(layout, ranks))
    check(chunk, Objective(beta=0.3))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("groups", ["ragged", "absent", "empty_slots"])
def test_options(groups, options, reference):
    layout = GROUPS[groups]
    chunk = Chunk(layout, token_logps(layout), ranks=with_ranks(layout, "ties"))
    if reference:
        chunk.ref_logps = segment_sums(chunk, torch.float32) + torch.randn(len(chunk.segments))
    check(chunk, Objective(**OPTIONS[options]))


@pytest.mark.parametrize("ranks", [None, "best_last"])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses(loss, ranks):
    layout = [*PAIRS, [(4, 4), (0, 3)], *full([11, 2])]
    chunk = Chunk(layout, token_logps(layout), ranks=None if ranks is None else with_ranks(layout, ranks))
    chunk.ref_logps = segment_sums(chunk, torch.float32) + 3 * torch.randn(len(chunk.segments))
    check(chunk, Objective(**PAIR_LOSSES[loss]))


def test_the_codes_of_the_header_are_those_of_the_table():
    header = (ROOT / "csrc" / "common" / "preference.h").read_text()
    entries = re.search(r"enum class Loss : int \{(.*?)\}", header, re.DOTALL)[1].split(",")
    codes = dict(re.fullmatch(r"\s*k(\w+) = (\d+)\s*", entry).groups() for entry in entries)
    assert {name: int(code) for name, code in codes.items()} == {
        name.title().replace("_", ""): code for name, code in KERNEL_CODES.items()
    }
    assert sorted(KERNEL_CODES.values()) == list(range(len(KERNEL_CODES)))
    assert int(re.search(r"kNumLosses = (\d+);", header)[1]) == len(KERNEL_CODES)


@pytest.mark.parametrize("loss_type", KERNEL_CODES)
def test_every_loss_of_the_table_that_has_a_code(loss_type):
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    check(chunk, Objective(loss_type=loss_type, beta=0.2))


@pytest.mark.parametrize("loss_type", ["apo_zero", "no_loss"])
def test_a_loss_without_a_code_is_refused(loss_type):
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    with pytest.raises(ValueError, match=f"loss_type must be one of .*'plackett_luce'.* got '{loss_type}'"):
        launch(chunk, Objective(), loss_type=loss_type)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_the_kernel_lacks_runs_in_plain_torch(emulated_cuda, emulator, monkeypatch, loss_type):
    """From hidden states and from logits: the launch is used where the table says that the kernel has the loss."""
    launches = []
    for name in ("contrast", "cpo_loss"):
        launch = getattr(emulator, name)
        monkeypatch.setattr(
            emulator, name, lambda name=name, launch=launch, **given: launches.append(name) or launch(**given)
        )
    hidden, weight, targets = torch.randn(3, 2, 4, 8), torch.randn(65, 8), torch.randint(0, 65, (3, 2, 4))
    options = {
        "loss_type": loss_type,
        "label_smoothing": SMOOTHED.get(loss_type, 0.0),
        "ref_logps": torch.randn(3, 2) - 20,
    }
    results = []
    for kind, dtype in (("cuda", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, hidden @ weight.T)]
        loss = linear_cpo_loss(*leaves[:2], targets, backend=kind, **options).loss
        of_logits = cpo_loss(leaves[2], targets, backend=kind, **options).loss
        grads = (*torch.autograd.grad(loss, leaves[:2]), *torch.autograd.grad(of_logits, leaves[2]))
        results.append((loss.detach(), of_logits.detach(), *grads))
    for what, *tensors in zip(("loss", "of logits", "hidden", "weight", "logits"), *results, strict=True):
        assert_accurate(*tensors, what)
    assert launches == (["contrast", "cpo_loss"] if loss_type in KERNEL_CODES else [])


@pytest.mark.parametrize("options", [{}, *PAIR_LOSSES.values()])
def test_equal_ranks_express_no_preference(options):
    chunk = Chunk(PAIRS, token_logps(PAIRS), ranks=torch.ones(8, dtype=torch.int64))
    assert (launch(chunk, Objective(**options))[1] == 0).all()


@pytest.mark.parametrize("threads", [0, 32, 256])
@pytest.mark.parametrize("candidates", [1, 37, 100])
def test_many_candidates(candidates, threads):
    layout = full([1 + c % 3 for c in range(candidates)], [2] * candidates)
    chunk = Chunk(layout, token_logps(layout), ranks=torch.randint(0, 5, (2 * candidates,)))
    chunk.ranks[::candidates] = 0
    check(chunk, Objective(mle_weight=0.3), threads=threads)


def test_the_largest_group():
    layout = full([3, *[1] * (MAX_CANDIDATES - 1)])
    check(Chunk(layout, token_logps(layout)), Objective(beta=1.0), threads=0)
    with pytest.raises(ValueError, match=f"at most {MAX_CANDIDATES}, got {MAX_CANDIDATES + 1}"):
        launch(Chunk(layout, token_logps(layout)), Objective(), max_candidates=MAX_CANDIDATES + 1)


def test_sums_are_rounded_once():
    layout = full([1000, 3], [1, 517])
    chunk = Chunk(layout, token_logps(layout, low=-30.0))
    chunk.logps[::50] *= 1e4
    exact = [math.fsum(part.tolist()) for part in chunk.logps.split(chunk.slots.tolist())]
    assert torch.equal(launch(chunk, Objective())[0], torch.tensor(exact, dtype=torch.float64).float())


@pytest.mark.parametrize("ranks", ["default", "ranked"])
@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 40.0, 600.0, 1e4])
def test_scores_of_any_size(gap, ranks):
    """Settled, undecided and lost contrasts of large scores: each keeps its own relative accuracy."""
    layout = full([4, 4, 4], [4, 4, 4])
    logps = torch.full((6, 4), -2500.0) + gap * torch.tensor([0.0, -1, -2, 2, 1, 0])[:, None] / 4
    chunk = Chunk(layout, logps.flatten(), ranks=with_ranks(layout, ranks))
    coef = check(chunk, Objective(beta=1.0))[1].view(2, 12)
    for g in (0, 1):
        alone = Chunk(layout[:1], logps.view(2, 12)[g], ranks=with_ranks(layout, ranks).view(2, 3)[g])
        assert torch.equal(coef[g], check(alone, Objective(beta=1.0, num_groups=2))[1])


@pytest.mark.parametrize("ranks", [None, "ties"])
def test_slices_of_longer_starts(ranks):
    """Groups 1 and 2 of a larger chunk: the starts do not begin with 0."""
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout), ranks=None if ranks is None else with_ranks(layout, ranks))
    objective = Objective(num_groups=4, num_target_tokens=9, mle_weight=0.5)
    sums, coef = launch(chunk, objective)
    starts = torch.tensor(chunk.cu_groups)
    segments = slice(chunk.cu_groups[1], chunk.cu_groups[3])
    tokens = slice(int(chunk.token_starts[segments.start]), int(chunk.token_starts[segments.stop]))
    part = Chunk(layout[1:3], chunk.logps[tokens], ranks=None if ranks is None else chunk.ranks[segments])
    part_sums, part_coef = launch(
        part,
        objective,
        token_starts=chunk.token_starts[segments.start : segments.stop + 1],
        segment_starts=starts[1:4],
    )
    assert torch.equal(part_sums, sums[segments])
    assert torch.equal(part_coef, coef[tokens])


@pytest.mark.parametrize("groups", ["five", "empty_slots", "absent"])
def test_groups_of_equal_size_need_no_segment_starts(groups):
    layout = GROUPS[groups]
    chunk = Chunk(layout, token_logps(layout))
    objective = Objective(mle_weight=0.5)
    for given, implied in zip(launch(chunk, objective), launch(chunk, objective, segment_starts=None), strict=True):
        assert torch.equal(given, implied)


def test_number_of_target_tokens_on_the_device_or_not():
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    objective = Objective(mle_weight=0.7, num_target_tokens=29)
    check(chunk, objective, num_target_tokens=29)
    check(chunk, objective, num_target_tokens=torch.tensor(29.0, dtype=torch.float64))


def test_ranks_of_any_integer_type():
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout), ranks=with_ranks(layout, "ties"))
    narrow = launch(chunk, Objective(), ranks=chunk.ranks.to(torch.int32))
    assert torch.equal(narrow[1], launch(chunk, Objective())[1])


@pytest.mark.parametrize("mle_only", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("segment", [3, 4])
def test_a_value_that_is_not_finite_stays_in_its_group(segment, value, mle_only):
    layout = [[(2, 2), (3, 3), (1, 1)], [(2, 2), (3, 4), (0, 5)], [(1, 1), (6, 6), (2, 2)]]
    chunk = Chunk(layout, token_logps(layout))
    objective = Objective(mle_weight=0.5, contrast_weight=0.0 if mle_only else 1.0)
    before = launch(chunk, objective)[1]
    starts = chunk.token_starts.tolist()
    chunk.logps[starts[segment + 1] - 1] = value
    sums, coef = launch(chunk, objective)
    assert torch.equal(sums[segment], torch.tensor(value)) or sums[segment].isnan()
    if mle_only:  # the contrast is left out
        assert torch.equal(coef, before)
        return
    assert coef[starts[3] : starts[5]].isnan().all()
    assert (coef[starts[5] : starts[6]] == 0).all(), "the absent candidate"
    for other in (slice(0, starts[3]), slice(starts[6], None)):
        assert torch.equal(coef[other], before[other])


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("ranks", [None, "ranked", "ties", "several_positives"])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_candidates(name, ranks, reference):
    """A forbidden word in the truth or in a negative: the coefficients are the finite ones of objective.py."""
    chunk = impossible_chunk(name, ranks, reference=reference)
    for weight in (1.0, 0.0):
        objective = Objective(beta=0.3, mle_weight=0.2, contrast_weight=weight)
        want = expected(chunk, objective, 1.0, torch.float64)[1]
        assert want.isfinite().all()
        torch.testing.assert_close(launch(chunk, objective)[1].double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impossible", [[1, 3], [0, 2], [0, 1]])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_of_impossible_candidates(loss, impossible):
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    chunk.logps[chunk.token_starts[1:][impossible] - 1] = -torch.inf
    objective = Objective(**PAIR_LOSSES[loss])
    want = expected(chunk, objective, 1.0, torch.float64)[1]
    assert want.isfinite().all()
    torch.testing.assert_close(launch(chunk, objective)[1].double(), want, rtol=1e-5, atol=1e-7)


def test_a_reference_that_is_not_finite_counts_only_where_the_candidate_is_present():
    layout = GROUPS["absent"]
    chunk = Chunk(layout, token_logps(layout), ref_logps=torch.zeros(12))
    before = launch(chunk, Objective())[1]
    chunk.ref_logps[chunk.lengths == 0] = math.nan
    assert torch.equal(launch(chunk, Objective())[1], before)
    chunk.ref_logps[4] = math.nan
    assert torch.equal(launch(chunk, Objective())[1].isnan(), before.new_tensor([0] * 12 + [1] * 6 + [0] * 20).bool())


def test_the_order_of_the_threads_changes_no_bit(emulator):
    layout = full([1 + c % 5 for c in range(20)], [3] * 7)
    chunk = Chunk(layout, token_logps(layout), ranks=torch.randint(0, 4, (27,)))
    results = []
    for emulator.seed in range(6):
        results.append(launch(chunk, Objective(mle_weight=0.3), threads=128))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_no_segments():
    starts, lengths = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    changes = {"token_starts": starts, "segment_starts": starts, "lengths": lengths}
    sums, coef = launch(Chunk(PAIRS, torch.empty(0)), Objective(), **changes)
    assert sums.shape == coef.shape == (0,)
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("threads", [16, 48, 512])
def test_threads_that_make_no_whole_warps_are_refused(threads):
    """Their last warp would wait for lanes that do not exist."""
    chunk = Chunk([[(1, 2), (1, 1)]], -torch.rand(3))
    with pytest.raises(EmulatorError, match=f"threads is {threads}; expected a multiple of 32 up to 256"):
        launch(chunk, Objective(), threads=threads)
