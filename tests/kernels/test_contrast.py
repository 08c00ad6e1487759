"""The contrast in one launch, by Triton, CUDA and the compiled CPU backend, against objective.py in float64.

What CUDA compiles runs thread by thread on the CPU, as tests/simt/simt_host.h has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
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
from pairwise import pairwise
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels.cpu import groups
from cpo_kernels.loss_table import KERNEL_CODES
from cpo_kernels.options import Objective


@dataclass(frozen=True)
class Kernel:
    """The launcher of a backend.

    Attributes:
        contrast: the launcher.
        max_candidates: what it takes at most.
        small: options with which groups of a few candidates with a few tokens cross several blocks.
        large: options for the largest group.
    """

    contrast: Callable[..., tuple[Tensor, Tensor]]
    max_candidates: int
    small: dict[str, Any]
    large: dict[str, Any]

    def launch(self, chunk: Chunk, objective: Objective, gain: float = 1.0, **changes: Any) -> tuple[Tensor, Tensor]:
        return self.contrast(chunk.logps, **(arguments(chunk, objective, gain) | self.small | changes))

    def check(self, chunk: Chunk, objective: Objective, gain: float = 1.0, **changes: Any) -> tuple[Tensor, Tensor]:
        """Launches, holds the results against the oracle and returns them."""
        out = self.launch(chunk, objective, gain, **changes)
        eager = expected(chunk, objective, gain, torch.float32)
        oracle = expected(chunk, objective, gain, torch.float64)
        for name, *tensors in zip(("sums", "coef"), out, eager, oracle, strict=True):
            assert_accurate(*tensors, name)
        return out


KERNELS = [("triton", pytest.mark.triton), ("cuda", pytest.mark.cpu), ("cpu", pytest.mark.cpu)]


@pytest.fixture(params=[pytest.param(name, marks=mark) for name, mark in KERNELS])
def kernel(request) -> Kernel:
    if request.param == "cpu":
        return Kernel(groups.contrast, groups.MAX_CANDIDATES, {}, {})
    if request.param == "cuda":
        request.getfixturevalue("emulator")
        module = import_module("cpo_kernels.kernels.cuda.groups")
        return Kernel(module.contrast, module.MAX_CANDIDATES, {"threads": 64}, {"threads": 0})
    module = import_module("cpo_kernels.kernels.triton.contrast")
    small, large = ({"config": {"TILE": tile, "num_warps": 4, "num_stages": 1}} for tile in (16, 1024))
    return Kernel(module.contrast, module.MAX_CANDIDATES, small, large)


@pytest.mark.parametrize("ranks", [None, *RANKS])
@pytest.mark.parametrize("groups", GROUPS)
def test_ranked_contrast(kernel, groups, ranks):
    layout = GROUPS[groups]
    chunk = Chunk(layout, token_logps(layout), ranks=None if ranks is None else with_ranks(layout, ranks))
    kernel.check(chunk, Objective(beta=0.3))


@pairwise({"groups": ["ragged", "absent", "empty_slots"], "options": list(OPTIONS), "reference": [False, True]})
def test_options(kernel, groups, options, reference):
    layout = GROUPS[groups]
    chunk = Chunk(layout, token_logps(layout), ranks=with_ranks(layout, "ties"))
    if reference:
        chunk.ref_logps = segment_sums(chunk, torch.float32) + torch.randn(len(chunk.segments))
    kernel.check(chunk, Objective(**OPTIONS[options]))


@pytest.mark.parametrize("ranks", [None, "best_last"])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses(kernel, loss, ranks):
    layout = [*PAIRS, [(4, 4), (0, 3)], *full([11, 2])]
    chunk = Chunk(layout, token_logps(layout), ranks=None if ranks is None else with_ranks(layout, ranks))
    chunk.ref_logps = segment_sums(chunk, torch.float32) + 3 * torch.randn(len(chunk.segments))
    kernel.check(chunk, Objective(**PAIR_LOSSES[loss]))


@pytest.mark.parametrize("loss_type", KERNEL_CODES)
def test_every_loss_of_the_table_that_has_a_code(kernel, loss_type):
    """The kernel knows it by name: one that it lacks would fail to compile."""
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    kernel.check(chunk, Objective(loss_type=loss_type, beta=0.2))


@pytest.mark.parametrize("loss_type", ["apo_zero", "no_loss"])
def test_a_loss_without_a_code_is_refused(kernel, loss_type):
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    with pytest.raises(ValueError, match=f"loss_type must be one of .*'plackett_luce'.* got '{loss_type}'"):
        kernel.launch(chunk, Objective(), loss_type=loss_type)


@pytest.mark.parametrize("options", [{}, *PAIR_LOSSES.values()])
def test_equal_ranks_express_no_preference(kernel, options):
    chunk = Chunk(PAIRS, token_logps(PAIRS), ranks=torch.ones(8, dtype=torch.int64))
    assert (kernel.launch(chunk, Objective(**options))[1] == 0).all()


@pytest.mark.parametrize("candidates", [1, 37, 100])
def test_many_candidates(kernel, candidates):
    layout = full([1 + c % 3 for c in range(candidates)], [2] * candidates)
    chunk = Chunk(layout, token_logps(layout), ranks=torch.randint(0, 5, (2 * candidates,)))
    chunk.ranks[::candidates] = 0
    kernel.check(chunk, Objective(mle_weight=0.3))


def test_the_largest_group(kernel):
    most = kernel.max_candidates
    layout = full([3, *[1] * (most - 1)])
    chunk = Chunk(layout, token_logps(layout))
    kernel.check(chunk, Objective(beta=1.0), **kernel.large)
    with pytest.raises(ValueError, match=f"at most {most}, got {most + 1}"):
        kernel.launch(chunk, Objective(), max_candidates=most + 1)


def test_sums_are_rounded_once(kernel):
    layout = full([1000, 3], [1, 517])
    chunk = Chunk(layout, token_logps(layout, low=-30.0))
    chunk.logps[::50] *= 1e4
    exact = [math.fsum(part.tolist()) for part in chunk.logps.split(chunk.slots.tolist())]
    assert torch.equal(kernel.launch(chunk, Objective())[0], torch.tensor(exact, dtype=torch.float64).float())


@pytest.mark.parametrize("ranks", ["default", "ranked"])
@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 40.0, 600.0, 1e4])
def test_scores_of_any_size(kernel, gap, ranks):
    """Settled, undecided and lost contrasts of large scores: each keeps its own relative accuracy."""
    layout = full([4, 4, 4], [4, 4, 4])
    logps = torch.full((6, 4), -2500.0) + gap * torch.tensor([0.0, -1, -2, 2, 1, 0])[:, None] / 4
    chunk = Chunk(layout, logps.flatten(), ranks=with_ranks(layout, ranks))
    coef = kernel.check(chunk, Objective(beta=1.0))[1].view(2, 12)
    chunk_of_one = [
        Chunk(layout[:1], logps.view(2, 12)[g], ranks=with_ranks(layout, ranks).view(2, 3)[g]) for g in (0, 1)
    ]
    for g in (0, 1):
        assert torch.equal(coef[g], kernel.check(chunk_of_one[g], Objective(beta=1.0, num_groups=2))[1])


def test_scores_of_a_group_sum_to_zero(kernel):
    layout = full([1] * 5, [1] * 5)
    coef = kernel.launch(Chunk(layout, token_logps(layout), ranks=with_ranks(layout, "ranked")), Objective(beta=1.0))[1]
    assert (coef.abs() > 1e-3).any()
    torch.testing.assert_close(coef.view(2, 5).double().sum(1), torch.zeros(2).double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("ranks", [None, "ties"])
def test_slices_of_longer_starts(kernel, ranks):
    """Groups 1 and 2 of a larger chunk: the starts do not begin with 0."""
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout), ranks=None if ranks is None else with_ranks(layout, ranks))
    objective = Objective(num_groups=4, num_target_tokens=9, mle_weight=0.5)
    sums, coef = kernel.launch(chunk, objective)
    starts = torch.tensor(chunk.cu_groups)
    segments = slice(chunk.cu_groups[1], chunk.cu_groups[3])
    tokens = slice(int(chunk.token_starts[segments.start]), int(chunk.token_starts[segments.stop]))
    part = Chunk(layout[1:3], chunk.logps[tokens], ranks=None if ranks is None else chunk.ranks[segments])
    part_sums, part_coef = kernel.launch(
        part,
        objective,
        token_starts=chunk.token_starts[segments.start : segments.stop + 1],
        segment_starts=starts[1:4],
    )
    assert torch.equal(part_sums, sums[segments])
    assert torch.equal(part_coef, coef[tokens])


def spread(x: Tensor) -> Tensor:
    """The same numbers at every third place, with others between them."""
    wide = x.new_full((len(x), 3), 1)
    wide[:, 1] = x
    return wide[:, 1]


VECTORS = ["logps", "ref_logps", "ranks", "lengths", "token_starts", "segment_starts"]


@pytest.mark.parametrize("name", VECTORS)
def test_strided_inputs(kernel, name):
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout), torch.randn(14), with_ranks(layout, "ties"))
    objective = Objective(mle_weight=0.5, length_normalized=True)
    expected = kernel.launch(chunk, objective)
    if name == "logps":
        out = kernel.launch(replace(chunk, logps=spread(chunk.logps)), objective)
    else:
        tensor = torch.tensor(chunk.cu_groups) if name == "segment_starts" else getattr(chunk, name)
        out = kernel.launch(chunk, objective, **{name: spread(tensor)})
    assert out[1].abs().sum() > 0
    for given, wanted in zip(out, expected, strict=True):
        assert torch.equal(given, wanted)


def test_expanded_inputs(kernel):
    """One log-probability, reference, length and rank for all."""
    layout = full([3, 3], [3, 3])
    chunk = Chunk(layout, torch.full((12,), -2.5), torch.full((4,), -7.0), torch.zeros(4, dtype=torch.int64))
    objective = Objective(mle_weight=0.5, length_normalized=True)
    one = {name: getattr(chunk, name)[:1].expand(4) for name in ("ref_logps", "ranks", "lengths")}
    out = kernel.launch(replace(chunk, logps=chunk.logps[:1].expand(12)), objective, **one)
    for given, wanted in zip(out, kernel.launch(chunk, objective), strict=True):
        assert torch.equal(given, wanted)
    assert (out[0] == -7.5).all() and (out[1] == -0.5 / 12).all()


@pytest.mark.parametrize("groups", ["five", "empty_slots", "absent"])
def test_groups_of_equal_size_need_no_segment_starts(kernel, groups):
    layout = GROUPS[groups]
    chunk = Chunk(layout, token_logps(layout))
    objective = Objective(mle_weight=0.5)
    implied = kernel.launch(chunk, objective, segment_starts=None)
    assert all(torch.equal(a, b) for a, b in zip(kernel.launch(chunk, objective), implied, strict=True))


def test_number_of_target_tokens_on_the_device_or_not(kernel):
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    objective = Objective(mle_weight=0.7, num_target_tokens=29)
    kernel.check(chunk, objective, num_target_tokens=29)
    kernel.check(chunk, objective, num_target_tokens=torch.tensor(29.0, dtype=torch.float64))


def test_ranks_of_any_integer_type(kernel):
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout), ranks=with_ranks(layout, "ties"))
    narrow = kernel.launch(chunk, Objective(), ranks=chunk.ranks.to(torch.int32))
    assert torch.equal(narrow[1], kernel.launch(chunk, Objective())[1])


def test_gain_scales_every_coefficient(kernel):
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout))
    objective = Objective(mle_weight=0.5)
    assert torch.equal(kernel.launch(chunk, objective, gain=4096.0)[1], 4096 * kernel.launch(chunk, objective)[1])


@pairwise({"value": [math.nan, math.inf], "segment": [3, 4], "mle_only": [False, True]})
def test_a_value_that_is_not_finite_stays_in_its_group(kernel, segment, value, mle_only):
    layout = [[(2, 2), (3, 3), (1, 1)], [(2, 2), (3, 4), (0, 5)], [(1, 1), (6, 6), (2, 2)]]
    chunk = Chunk(layout, token_logps(layout))
    objective = Objective(mle_weight=0.5, contrast_weight=0.0 if mle_only else 1.0)
    before = kernel.launch(chunk, objective)[1]
    starts = chunk.token_starts.tolist()
    chunk.logps[starts[segment + 1] - 1] = value
    sums, coef = kernel.launch(chunk, objective)
    assert torch.equal(sums[segment], torch.tensor(value)) or sums[segment].isnan()
    if mle_only:  # the contrast is left out
        assert torch.equal(coef, before)
        return
    assert coef[starts[3] : starts[5]].isnan().all()
    assert (coef[starts[5] : starts[6]] == 0).all(), "the absent candidate"
    for other in (slice(0, starts[3]), slice(starts[6], None)):
        assert torch.equal(coef[other], before[other])


@pairwise({"name": [*IMPOSSIBLE], "ranks": [None, "ranked", "ties", "several_positives"], "reference": [False, True]})
def test_impossible_candidates(kernel, name, ranks, reference):
    """A forbidden word in the truth or in a negative: the coefficients are the finite ones of objective.py."""
    chunk = impossible_chunk(name, ranks, reference=reference)
    for weight in (1.0, 0.0):
        objective = Objective(beta=0.3, mle_weight=0.2, contrast_weight=weight)
        want = expected(chunk, objective, 1.0, torch.float64)[1]
        assert want.isfinite().all()
        torch.testing.assert_close(kernel.launch(chunk, objective)[1].double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impossible", [[1, 3], [0, 2], [0, 1]])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses_of_impossible_candidates(kernel, loss, impossible):
    chunk = Chunk(PAIRS, token_logps(PAIRS))
    chunk.logps[chunk.token_starts[1:][impossible] - 1] = -torch.inf
    objective = Objective(**PAIR_LOSSES[loss])
    want = expected(chunk, objective, 1.0, torch.float64)[1]
    assert want.isfinite().all()
    torch.testing.assert_close(kernel.launch(chunk, objective)[1].double(), want, rtol=1e-5, atol=1e-7)


def test_a_reference_that_is_not_finite_counts_only_where_the_candidate_is_present(kernel):
    layout = GROUPS["absent"]
    chunk = Chunk(layout, token_logps(layout), ref_logps=torch.zeros(12))
    before = kernel.launch(chunk, Objective())[1]
    chunk.ref_logps[chunk.lengths == 0] = math.nan
    assert torch.equal(kernel.launch(chunk, Objective())[1], before)
    chunk.ref_logps[4] = math.nan
    assert torch.equal(
        kernel.launch(chunk, Objective())[1].isnan(), before.new_tensor([0] * 12 + [1] * 6 + [0] * 20).bool()
    )


def test_two_runs_are_equal(kernel):
    layout = GROUPS["ragged"]
    chunk = Chunk(layout, token_logps(layout), ranks=with_ranks(layout, "ranked"))
    for first, second in zip(kernel.launch(chunk, Objective()), kernel.launch(chunk, Objective()), strict=True):
        assert torch.equal(first, second)


def test_no_segments(kernel):
    empty = torch.empty(0)
    chunk = Chunk(PAIRS, empty)
    starts = torch.zeros(1, dtype=torch.int64)
    lengths = torch.zeros(0, dtype=torch.int64)
    sums, coef = kernel.launch(chunk, Objective(), token_starts=starts, segment_starts=starts, lengths=lengths)
    assert sums.shape == coef.shape == (0,)
    assert sums.dtype == torch.float32
