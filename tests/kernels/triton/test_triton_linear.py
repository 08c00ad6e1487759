"""The fused linear forward against float64, with blocks so small that a short vocabulary has several."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from devices import DEVICE
from pairwise import pairwise
from row_kernels import DTYPES, HEADS, PLAIN, SHARED
from tolerance import assert_accurate
from torch import Tensor

pytest.importorskip("triton")

from cpo_kernels.kernels import plain, reference, transform
from cpo_kernels.kernels.triton import linear, tuning
from cpo_kernels.kernels.triton.linear import linear_forward
from cpo_kernels.kernels.triton.splits import LinearForward

pytestmark = pytest.mark.triton
BLOCK_R, BLOCK_V, BLOCK_H = 16, 32, 16
TMA = {"pointers": 0, "descriptors": 1}
CONFIG = {"BLOCK_R": BLOCK_R, "BLOCK_V": BLOCK_V, "BLOCK_H": BLOCK_H, "num_warps": 4, "num_stages": 2}


@dataclass
class Case:
    """Arguments of a call, with logits of a standard deviation of about 3."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    row_starts: Tensor | None = None
    head: tuple[Tensor | None, float, float, float] = field(default=PLAIN)

    def run(self, config: dict[str, int] | None = CONFIG, **options: Any) -> LinearForward:
        return linear_forward(
            self.hidden, self.weight, self.targets, self.row_starts, *self.head, config=config, **options
        )

    def logits(self, dtype: torch.dtype) -> Tensor:
        """(R, V) logits of the softmax, all of it in ``dtype``."""
        bias, scale, softcap, temperature = self.head
        bias = None if bias is None else bias.to(dtype)
        return transform.transform_logits(
            self.hidden.to(dtype) @ self.weight.to(dtype).T, bias, scale, softcap, temperature
        )

    def logps(self, dtype: torch.dtype) -> Tensor:
        rows = plain.token_rows(self.targets, self.row_starts)
        return reference.token_logps(self.logits(dtype)[rows], self.targets)


def case(dtype=torch.float32, R=5, V=101, H=48, counts: list[int] | None = None, head=PLAIN) -> Case:
    """Row r has ``counts[r]`` tokens, of which every fourth is absent; None: one a row, and the second is absent."""
    targets = torch.randint(0, V, (R if counts is None else sum(counts),))
    row_starts = None
    if counts is None:
        targets[1:2] = -100
    else:
        R = len(counts)
        row_starts = torch.tensor([0, *torch.tensor(counts, device="cpu").cumsum(0).tolist()])
        targets[3::4] = -100
    hidden, weight = torch.randn(R, H).to(dtype), (torch.randn(V, H) * (3 / H**0.5)).to(dtype)
    return Case(hidden, weight, targets, row_starts, head)


def entropy_of(logits: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.clamp(min=-1e30)).sum(-1)


def check(c: Case, config: dict[str, int] | None = CONFIG) -> LinearForward:
    """All four results by the rule of tolerance; eager is plain torch with logits in float32."""
    out = c.run(config, seed=torch.tensor([1]), entropy=True)
    eager, oracle = c.logits(torch.float32), c.logits(torch.float64)
    assert_accurate(out.stats[0], eager.amax(-1), oracle.amax(-1), "max")
    assert_accurate(out.stats.sum(0), eager.logsumexp(-1), oracle.logsumexp(-1), "log-sum-exp")
    assert_accurate(out.logps, c.logps(torch.float32), c.logps(torch.float64), "logps")
    assert_accurate(out.entropy, entropy_of(eager), entropy_of(oracle), "entropy")
    assert ((out.samples >= 0) & (out.samples < len(c.weight))).all()
    assert (out.logps[c.targets == -100] == 0).all()
    return out


V_GRID = [
    1,  # the only probability is 1
    2,
    31,  # prime, less than a block
    2 * BLOCK_V,  # no tail
    4 * BLOCK_V - 3,  # prime; with two splits, the second is shorter
]


@pairwise({"dtype": DTYPES, "V": V_GRID, "shared": SHARED, "tma": TMA})
def test_every_vocabulary(dtype, V, shared, tma):
    check(case(dtype, V=V, counts=[1, 3, 0, 5, 2] if shared else None), {**CONFIG, "TMA": tma, "SPLITS": 2})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head(dtype, head):
    check(case(dtype, V=77, counts=[1, 3, 0, 5, 2], head=HEADS[head](77)))


@pairwise({"R": [1, BLOCK_R, BLOCK_R + 1], "H": [1, 7, BLOCK_H, 3 * BLOCK_H + 5], "tma": TMA})
def test_every_shape(R, H, tma):
    check(case(torch.bfloat16, R=R, H=H, V=53), {**CONFIG, "TMA": tma})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_the_table(dtype):
    check(case(dtype, R=131, V=301, H=80), None)
    out = case(dtype, R=131, V=301, H=80).run(None)
    assert out.samples is None and out.entropy is None


def strided(c: Case) -> list[Case]:
    """The same numbers in other layouts, with what must not be read poisoned."""
    R, H = c.hidden.shape
    wide = torch.full((R + 1, 2 * H + 1), torch.nan, dtype=c.hidden.dtype)
    rows, odd, skipping = wide[:R, :H], wide.clone()[1:, 1 : H + 1], wide.clone()[:R, : 2 * H : 2]
    tied = torch.full((H + 1, len(c.weight) + 3), torch.nan, dtype=c.weight.dtype).T[: len(c.weight), :H]
    for view in (rows, odd, skipping):
        view.copy_(c.hidden)
    tied.copy_(c.weight)
    return [Case(view, tied if view is odd else c.weight, c.targets) for view in (rows, odd, skipping)]


@pytest.mark.parametrize("tma", TMA.values(), ids=TMA)
def test_strided_inputs(tma):
    for view in strided(case(V=67, H=41)):
        check(view, {**CONFIG, "TMA": tma})


def spread(x: Tensor) -> Tensor:
    """The same numbers at every third place, with others between them."""
    wide = x.new_full((len(x), 3), 1)
    wide[:, 1] = x
    return wide[:, 1]


def test_strided_vectors():
    """Targets, starts and bias, between others that would give other results."""
    c = case(V=67, counts=[1, 3, 0, 5, 2], head=HEADS["all"](67))
    expected = c.run()
    check(Case(c.hidden, c.weight, spread(c.targets), spread(c.row_starts), (spread(c.head[0]), *c.head[1:])))
    out = Case(c.hidden, c.weight, spread(c.targets), spread(c.row_starts), (spread(c.head[0]), *c.head[1:])).run()
    assert torch.equal(out.logps, expected.logps)


def test_expanded_vectors():
    """One target for all rows, and one bias for all words."""
    c = case(V=67)
    check(Case(c.hidden, c.weight, torch.tensor([9]).expand(5), head=(torch.tensor([0.7]).expand(67), 1.0, 3.0, 1.0)))


def test_one_vector_for_all_rows():
    c = case(V=67)
    check(Case(c.hidden[:1].expand(5, -1), c.weight, c.targets), {**CONFIG, "TMA": 1})


def test_descriptors_only_where_the_hardware_takes_them():
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert linear.has_descriptor(matrix) and linear.has_descriptor(matrix[2:, 8:16])
    assert not linear.has_descriptor(matrix[:, 1:])  # off a multiple of 16 bytes
    assert not linear.has_descriptor(matrix.T)
    assert not linear.has_descriptor(matrix[:1].expand(8, -1))
    assert not linear.has_descriptor(torch.zeros(8, 63, dtype=torch.bfloat16))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits(scale):
    c = case(V=77)
    check(Case(c.hidden, c.weight, c.targets, head=(None, scale, 0.0, 1.0)), {**CONFIG, "SPLITS": 3})


def test_no_rows_and_no_tokens():
    out = case(R=0).run(seed=torch.tensor([1]), entropy=True)
    assert [t.shape for t in out] == [(2, 0), (0,), (0,), (0,)]
    c = case(counts=[0, 0, 0])
    out = check(c)
    assert out.logps.shape == (0,)


def test_a_row_of_many_tokens():
    """More than one of them in the same vocabulary tile, and the same target twice."""
    c = case(V=77, counts=[70, 1, 0])
    c.targets[:2] = 5
    out = check(c)
    assert out.logps[0] == out.logps[1]


def test_wrong_targets_are_nan():
    c = case(V=3 * BLOCK_V - 5, R=6)
    c.targets[:] = torch.tensor([-1, len(c.weight), 2**40, -(2**40), 0, -100])
    logps = c.run().logps
    assert logps[:4].isnan().all()
    expected = c.logits(torch.float64)[4].log_softmax(-1)[0]
    assert logps[4].item() == pytest.approx(expected.item(), rel=1e-5) and logps[5] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite(value):
    """They are NaN, have no sample, and leave the others alone."""
    c = case(R=BLOCK_R + 3, V=77)
    expected = c.run(seed=torch.tensor([1]), entropy=True)
    c.hidden[4, 2] = value
    out = c.run(seed=torch.tensor([1]), entropy=True)
    others = torch.arange(len(c.hidden)) != 4
    assert out.logps[4].isnan() and out.stats[1, 4].isnan() and out.entropy[4].isnan()
    assert out.samples[4] == -100
    for before, after in zip(expected, out, strict=True):
        assert torch.equal(before[..., others], after[..., others])


def test_rows_of_nothing_but_minus_infinity():
    c = case(V=77, head=(torch.full((77,), -math.inf), 1.0, 0.0, 1.0))
    out = c.run(seed=torch.tensor([1]), entropy=True)
    assert out.stats[1].isnan().all() and out.entropy.isnan().all() and (out.samples == -100).all()
    assert out.logps[c.targets != -100].isnan().all() and (out.logps[c.targets == -100] == 0).all()


def forbidden(V: int, words: Tensor) -> Tensor:
    """A bias that gives these words the probability 0."""
    bias = torch.zeros(V)
    bias[words] = -math.inf
    return bias


FORBIDDEN = {
    "the first tile": torch.arange(BLOCK_V),
    "a tile in between": torch.arange(BLOCK_V, 2 * BLOCK_V),
    "the last tile": torch.arange(2 * BLOCK_V, 77),
    "every other word": torch.arange(0, 77, 2),
    "all but one": torch.cat([torch.arange(40), torch.arange(41, 77)]),
}


@pytest.mark.parametrize("words", FORBIDDEN)
@pytest.mark.parametrize("count", [1, 3])
def test_words_of_probability_zero(words, count):
    """They add nothing to the entropy, and are never drawn."""
    words = FORBIDDEN[words].to(DEVICE)
    c = case(V=77, R=1000, head=(forbidden(77, words), 1.0, 0.0, 1.0))
    c.targets[:] = torch.randint(0, 77, (1000,))
    out = c.run({**CONFIG, "BLOCK_R": 128, "SPLITS": count}, seed=torch.tensor([1]), entropy=True)
    eager, oracle = c.logits(torch.float32), c.logits(torch.float64)
    assert_accurate(out.entropy, entropy_of(eager), entropy_of(oracle), "entropy")
    assert not torch.isin(out.samples, words).any()
    drawn = torch.isin(c.targets, words)
    assert (out.logps[drawn] == -math.inf).all() and out.logps[~drawn].isfinite().all()


def test_repeats_bitwise():
    c = case(torch.bfloat16, R=BLOCK_R + 3, V=101, counts=[2] * (BLOCK_R + 3))
    runs = [c.run({**CONFIG, "SPLITS": 3}, seed=torch.tensor([5]), entropy=True) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_rows_do_not_depend_on_each_other():
    """The results of a row are the same whatever the others hold, and whatever of it is asked for."""
    c = case(R=2 * BLOCK_R + 5, V=101)
    whole = c.run(seed=torch.tensor([5]), entropy=True)
    part = Case(c.hidden[:7], c.weight, c.targets[:7]).run(seed=torch.tensor([5]))
    for name in ("stats", "logps", "samples"):
        assert torch.equal(getattr(whole, name)[..., :7], getattr(part, name))
    assert torch.equal(c.run(entropy=True).entropy, whole.entropy)


# Grids


@pytest.mark.parametrize(("count", "cache_bytes"), [(0, 0), (0, 2**30), (1, 0), (2, 0), (3, 0), (5, 0)])
def test_any_grid_covers_the_matrix(monkeypatch, count, cache_bytes):
    """As on 8 multiprocessors: groups of row tiles of which the last is not full, and splits that are shorter."""
    monkeypatch.setattr(linear, "multiprocessors_and_cache", lambda device: (8, cache_bytes))
    c = case(R=4 * BLOCK_R + 1, V=4 * BLOCK_V + 3, H=16)
    out = check(c, {**CONFIG, "SPLITS": count})
    assert torch.equal(out.samples, c.run({**CONFIG, "SPLITS": 4}, seed=torch.tensor([1])).samples)


@pytest.mark.parametrize("width", [64, 60])
def test_table_is_asked_for_what_the_strides_allow(monkeypatch, width):
    asked = []

    def config(*sizes, descriptors):
        asked.append(descriptors)
        return CONFIG

    monkeypatch.setattr(tuning, "config", config)
    check(case(torch.float16, H=width), None)
    assert asked == [width == 64]


# Sampling

ROWS = 8192
SAMPLING = {**CONFIG, "BLOCK_R": 512, "BLOCK_V": 32, "num_warps": 8}
FLAT = (None, 0.3, 0.0, 1.0)  # no tile holds most of the probability
NORMAL_QUANTILE = 4.7534  # one chance in a million


def critical_value(freedom: int) -> float:
    """Of the chi-square distribution, exceeded once in a million times (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + NORMAL_QUANTILE * spread**0.5) ** 3


def chi_square_ratio(samples: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over its critical value: above 1 once in a million times if the samples are fair.

    Words expected less than 10 times are counted as one.
    """
    expected = samples.numel() * probabilities.double().cpu()
    counts = torch.bincount(samples.cpu(), minlength=len(expected)).double()
    rare = expected < 10
    expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)])
    counts = torch.cat([counts[~rare], counts[rare].sum().reshape(1)])
    expected, counts = expected[expected > 0], counts[expected > 0]
    return ((counts - expected) ** 2 / expected).sum().item() / critical_value(max(len(expected) - 1, 1))


def identical_rows(V: int, head=PLAIN, H: int = 16, rows: int = ROWS) -> Case:
    """Rows without tokens, all of one distribution."""
    c = case(R=1, V=V, H=H, head=head)
    return Case(c.hidden.expand(rows, -1), c.weight, torch.full((rows,), -100), head=head)


def softmax_of(c: Case) -> Tensor:
    return c.logits(torch.float64)[0].softmax(-1)


@pairwise({"V": [7, 101], "head": ["plain", "scaled", "all", "zero scale"], "count": [1, 3]})
def test_samples_follow_the_softmax(V, head, count):
    c = identical_rows(V, HEADS[head](V))
    samples = c.run({**SAMPLING, "SPLITS": count}, seed=torch.tensor([3])).samples
    assert chi_square_ratio(samples, softmax_of(c)) < 1


def test_chi_square_sees_another_distribution():
    """The test above can fail: a temperature off by a tenth, or one tile half as likely again."""
    c = identical_rows(101)
    samples = c.run(SAMPLING, seed=torch.tensor([3])).samples
    assert chi_square_ratio(samples, (c.logits(torch.float64)[0] / 1.1).softmax(-1)) > 1
    c = identical_rows(3 * BLOCK_V, FLAT)
    samples = c.run(SAMPLING, seed=torch.tensor([3])).samples
    tile = softmax_of(c)
    tile[:BLOCK_V] *= 1.5
    assert chi_square_ratio(samples, tile / tile.sum()) > 1


@pytest.mark.parametrize("words", [1, 2])
def test_chi_square_sees_words_that_are_never_drawn(words):
    probabilities = torch.full((words + 1,), 1 / (words + 1))
    assert chi_square_ratio(torch.zeros(1000, dtype=torch.int64), probabilities) > 1
    assert chi_square_ratio(torch.arange(words + 1).repeat(1000), probabilities) < 1


def test_samples_of_different_rows_are_independent():
    """Neighbours in a tile of rows, and rows at the same place in different tiles."""
    c = identical_rows(40)
    samples = c.run(SAMPLING, seed=torch.tensor([3])).samples
    coarse, p = samples // 8, softmax_of(c).reshape(5, 8).sum(-1)  # five classes in two tiles
    joint = (p[:, None] * p[None, :]).flatten()
    neighbours, tiles = coarse.reshape(-1, 2), coarse.reshape(-1, 2, SAMPLING["BLOCK_R"]).transpose(1, 2).reshape(-1, 2)
    for pairs in (neighbours, tiles):
        assert chi_square_ratio(5 * pairs[:, 0] + pairs[:, 1], joint) < 1
    assert chi_square_ratio(5 * coarse[::2] + coarse[::2], joint) > 1


def test_samples_of_different_seeds_are_independent():
    c = identical_rows(40)
    first, second = (c.run(SAMPLING, seed=torch.tensor([s])).samples // 8 for s in (3, 4))
    p = softmax_of(c).reshape(5, 8).sum(-1)
    assert chi_square_ratio(5 * first + second, (p[:, None] * p[None, :]).flatten()) < 1


def test_place_within_a_tile_is_independent_of_the_other_tiles():
    """Given that a tile is drawn from, its words come in their proportions."""
    c = identical_rows(3 * BLOCK_V, FLAT)
    samples = c.run(SAMPLING, seed=torch.tensor([3])).samples
    for first in range(0, 3 * BLOCK_V, BLOCK_V):
        p = softmax_of(c)[first : first + BLOCK_V]
        inside = samples[(samples >= first) & (samples < first + BLOCK_V)] - first
        assert len(inside) > 1000
        assert chi_square_ratio(inside, p / p.sum()) < 1


def test_seed_is_read_when_the_kernel_runs():
    """All 64 bits of it, from a tensor that may change in between: a captured CUDA graph draws anew."""
    c = identical_rows(101, rows=300)
    seed = torch.tensor([1])
    seeds = [1, 2, 1 + 2**32, -1]
    drawn = []
    for value in seeds:
        seed.fill_(value)
        drawn.append(c.run(SAMPLING, seed=seed).samples)
        assert torch.equal(drawn[-1], c.run(SAMPLING, seed=torch.tensor(value)).samples)
    for i in range(len(seeds)):
        assert not any(torch.equal(drawn[i], other) for other in drawn[:i])


def test_samples_do_not_depend_on_targets_or_splits():
    c = identical_rows(101, rows=300)
    expected = c.run(SAMPLING, seed=torch.tensor([3])).samples
    with_targets = Case(c.hidden, c.weight, torch.randint(0, 101, (300,)))
    assert torch.equal(with_targets.run(SAMPLING, seed=torch.tensor([3])).samples, expected)
    for count in (2, 3, 4):
        assert torch.equal(c.run({**SAMPLING, "SPLITS": count}, seed=torch.tensor([3])).samples, expected)


def test_samples_of_rows_with_their_own_seeds_follow_the_softmax():
    """Seeds as alike as 0, 1, 2: the counter of Philox is the same for all rows."""
    c = identical_rows(101)
    samples = c.run({**SAMPLING, "SPLITS": 3}, seed=torch.arange(ROWS)).samples
    assert chi_square_ratio(samples, softmax_of(c)) < 1
    coarse, p = samples // 26, torch.stack([part.sum() for part in softmax_of(c).split(26)])
    joint = (p[:, None] * p[None, :]).flatten()
    assert chi_square_ratio(4 * coarse[0::2] + coarse[1::2], joint) < 1
    assert chi_square_ratio(4 * coarse + coarse, joint) > 1


@pytest.mark.parametrize("tma", TMA.values(), ids=TMA)
def test_a_row_with_its_own_seed_does_not_depend_on_its_place(tma):
    """Nor on the rows of its tile, the splits or the stride of the seeds; a single row is as with one seed."""
    c = case(R=BLOCK_R + 5, V=101)
    config, seeds = {**CONFIG, "TMA": tma}, torch.randint(-(2**62), 2**62, (BLOCK_R + 5,))
    expected = c.run(config, seed=seeds).samples
    order = torch.randperm(BLOCK_R + 5)
    shuffled = Case(c.hidden[order], c.weight, c.targets[order])
    assert torch.equal(shuffled.run(config, seed=seeds[order]).samples, expected[order])
    assert torch.equal(c.run({**config, "SPLITS": 3}, seed=seeds).samples, expected)
    assert torch.equal(c.run(config, seed=torch.stack([seeds, seeds], 1)[:, 0]).samples, expected)
    for row in (0, BLOCK_R + 2):
        one = slice(row, row + 1)
        assert torch.equal(Case(c.hidden[one], c.weight, c.targets[one]).run(seed=seeds[one]).samples, expected[one])
    other = seeds.clone()
    other[3] += 2**33
    draws = [c.run(config, seed=other + 2**40 * i).samples[3] for i in range(8)]
    assert len(set(map(int, draws))) > 1  # all 64 bits count
    other = torch.where(torch.arange(BLOCK_R + 5) == 3, seeds, seeds + 1)
    assert c.run(config, seed=other).samples[3] == expected[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": torch.arange(4)}, r"seed must have one element or shape \(5,\), got \(4,\)"),
        ({"seed": torch.zeros(4, 2)}, r"seed must have shape \(1, K\) or \(5, K\), got \(4, 2\)"),
        ({"seed": torch.zeros(5, 2), "wanted": torch.ones(5) > 0}, r"of shape \(5, 2\), got torch.bool \(5,\)"),
        ({"seed": torch.zeros(5, 2), "wanted": torch.ones(5, 2)}, r"wanted must be torch.bool .* got torch.float32"),
    ],
    ids=["rows", "rows of several", "shape of the choice", "dtype of the choice"],
)
def test_wrong_numbers_of_seeds_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        case(R=5).run(**options)


# Several samples of a row


def seeds_of(rows: int, samples: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (rows, samples))


@pairwise({"per_row": [True, False], "shared": SHARED, "tma": TMA, "count": [1, 3]})
def test_several_samples_are_those_of_as_many_launches(per_row, shared, tma, count):
    """From one product, which gives the rest of the results too."""
    rows = BLOCK_R + 3
    c = case(torch.float16, R=rows, V=101, counts=[1, 3, 0, 5] + [1] * (rows - 4) if shared else None)
    config, seeds = {**CONFIG, "TMA": tma, "SPLITS": count}, seeds_of(rows if per_row else 1, 5)
    out = c.run(config, seed=seeds, entropy=True)
    assert out.samples.shape == (rows, 5)
    for k in range(5):
        alone = c.run(config, seed=seeds[:, k], entropy=True)
        assert torch.equal(out.samples[:, k], alone.samples)
    for name in ("stats", "logps", "entropy"):
        assert torch.equal(getattr(out, name), getattr(alone, name))
    spread_out = torch.stack([seeds, seeds], 2).flatten(1)[:, ::2]  # other strides
    assert torch.equal(c.run(config, seed=spread_out).samples, out.samples)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_samples_that_are_wanted_are_as_without_a_choice(count, per_row):
    rows = 2 * BLOCK_R + 3
    c, seeds = case(R=rows, V=101), seeds_of(rows if per_row else 1, 3)
    config = {**CONFIG, "SPLITS": count}
    wanted = torch.rand(rows, 3) < 0.3
    wanted[:, 1], wanted[BLOCK_R : 2 * BLOCK_R] = True, False
    whole = c.run(config, seed=seeds).samples
    expected = whole.where(wanted, -100)
    assert torch.equal(c.run(config, seed=seeds, wanted=wanted).samples, expected)
    assert torch.equal(c.run(config, seed=seeds, wanted=wanted.T.contiguous().T).samples, expected)


def test_a_row_without_a_distribution_has_none_of_its_samples():
    c, seeds = case(R=5, V=77), seeds_of(5, 3)
    c.hidden[2] = math.nan
    samples = c.run(seed=seeds, wanted=torch.tensor([[True, True, False]]).expand(5, 3)).samples
    absent = torch.zeros(5, 3, dtype=torch.bool)
    absent[2], absent[:, 2] = True, True
    assert torch.equal(samples == -100, absent)


@pytest.mark.cpu
@pytest.mark.skipif(DEVICE.type != "cpu", reason="replaces a kernel, which counts its launches")
def test_any_number_of_samples_takes_one_product(monkeypatch):
    kernel, launches = linear.linear_forward_kernel, []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(linear, "linear_forward_kernel", Counted())
    c = case(R=3, V=40)
    assert c.run(seed=seeds_of(3, 40)).samples.shape == (3, 40)
    assert len(launches) == 1


@pytest.mark.cpu
@pytest.mark.skipif(DEVICE.type != "cpu", reason="replaces a device function, which the interpreter alone allows")
def test_a_tile_looks_only_for_samples_that_one_of_its_rows_wants(monkeypatch):
    """Every search is of one sample in one tile; the first tile of a split is won by every row that wants."""
    search, searches = linear.descend, []

    def counted(left, *arguments):
        if left.shape[1] == BLOCK_V // 2:  # not the steps of a search, which pass it on
            searches.append(1)
        return search(left, *arguments)

    monkeypatch.setattr(linear, "descend", counted)
    c, seeds = case(R=2 * BLOCK_R, V=BLOCK_V), seeds_of(2 * BLOCK_R, 4)
    wanted = torch.zeros(2 * BLOCK_R, 4, dtype=torch.bool)
    for places, expected in (((), 0), ([(3, 1)], 1), ([(3, 1), (5, 1)], 1), ([(3, 1), (BLOCK_R, 1), (BLOCK_R, 2)], 3)):
        for place in places:
            wanted[place] = True
        searches.clear()
        c.run(seed=seeds, wanted=wanted)
        assert len(searches) == expected


def philox(seed: int, row: int, tile: int) -> tuple[float, float]:
    """The first two of Philox4x32-10's numbers (Salmon et al. 2011) at (row, tile, 0, 0), as uniforms in [0, 1)."""
    keys, c = [seed % 2**32, seed // 2**32 % 2**32], [row, tile, 0, 0]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high2, low2 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high2 ^ c[1] ^ keys[0], low2, high0 ^ c[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    signed = [x - 2**32 if x >= 2**31 else x for x in c[:2]]
    first, second = ((-x - 1 if x < 0 else x) * 4.6566127342e-10 for x in signed)
    return first, second


@pytest.mark.parametrize("per_row", [True, False])
def test_samples_are_a_function_of_seed_and_logits(per_row):
    """By the formulas of kernels/triton/sampling.py in float64: what a seed draws does not change with the kernel."""
    c = case(R=BLOCK_R + 4, V=101)
    rows, (V, tiles) = len(c.hidden), (101, 4)
    seeds = seeds_of(rows if per_row else 1, 3)
    masses = c.logits(torch.float64).exp().cpu()
    expected = torch.empty(rows, 3, dtype=torch.int64, device="cpu")
    for r in range(rows):
        for k in range(3):
            best = -math.inf
            seed = int(seeds[r if per_row else 0, k])
            for tile in range(tiles):
                u, place = philox(seed % 2**64, 0 if per_row else r, tile)
                words = masses[r, tile * BLOCK_V : (tile + 1) * BLOCK_V]
                key = math.log(words.sum()) - math.log(-math.log1p(-(u + 2.0**-32)))
                if key > best:
                    best = key
                    word = int(torch.searchsorted(words.cumsum(0), place * words.sum(), right=True))
                    expected[r, k] = tile * BLOCK_V + min(word, V - 1)
    assert torch.equal(c.run(seed=seeds).samples.cpu(), expected)


@pytest.mark.cpu
@pytest.mark.skipif(DEVICE.type != "cpu", reason="replaces a device function, which the interpreter alone allows")
@pytest.mark.parametrize("u", [0.0, 1e-9, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.5, 1 - 2.0**-24, 1.0, 1.5])
def test_rounding_never_draws_a_word_of_probability_zero(monkeypatch, u, threshold):
    """At both ends of the uniforms, and where rounding has taken the threshold beyond the sum of the masses."""
    words = torch.cat([torch.tensor([0]), torch.arange(5, 77, 3), torch.tensor([76])])
    c = case(V=77, R=BLOCK_R, head=(forbidden(77, words), 1.0, 0.0, 1.0))

    def uniforms(seed, row, tile):
        return (row * 0).to(linear.tl.float32) + u, (row * 0).to(linear.tl.float32) + threshold

    monkeypatch.setattr(linear, "uniforms", uniforms)
    samples = c.run(seed=torch.tensor([1])).samples
    assert ((samples >= 0) & (samples < 77)).all() and not torch.isin(samples, words).any()
