"""The part growth: points of the curves, who is refused, and who grows no further."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import growth
from benchmarks.contestants import FLOOR, OURS, contestant
from benchmarks.growth import ON_CPU, ON_GPU, PEERS, QUICK, Growth, Watch
from benchmarks.measure import AnotherLossError
from benchmarks.oracle import Dense, Oracle
from benchmarks.peers import BUILDERS
from benchmarks.problem import draw
from benchmarks.setting import Setting
from benchmarks.timing import Timing
from benchmarks.varying import builders

pytestmark = pytest.mark.cpu  # small dry runs on the host

SETTING = Setting(quick=True)


@pytest.mark.parametrize("sizes", [ON_CPU, ON_GPU, QUICK], ids=["cpu", "gpu", "quick"])
def test_along_a_curve_one_quantity_grows(sizes):
    for curve in sizes.curves():
        found = [growth.conditions_of(shape) for shape in curve.shapes]
        own = [conditions[curve.along] for conditions in found]
        assert own == sorted(set(own))
        assert len(own) > 1
        follows = {"N": (), "V": (), "K": ("N",)}[curve.along]  # more candidates are more tokens
        for key in found[0].keys() - {curve.along, *follows}:
            assert len({conditions[key] for conditions in found}) == 1, key
        if curve.along == "K":
            assert {(shape.groups, shape.tokens) for shape in curve.shapes} == {(2, sizes.length)}


@pytest.mark.parametrize("sizes", [ON_CPU, ON_GPU], ids=["cpu", "gpu"])
def test_nothing_that_grows_is_1_at_first(sizes):
    for curve in sizes.curves():  # compilers take a dimension of 1 for a constant
        assert min(curve.shapes[0].groups, curve.shapes[0].candidates) > 1


def wrong(**changes):
    """Builders with an eager that has changes."""
    return lambda: {**builders(), "eager": lambda: replace(BUILDERS["eager"](), **changes)}


def run_points(monkeypatch, peers=("eager",), along=0, setting=SETTING, **changes):
    monkeypatch.setattr(growth, "PEERS", peers)
    sizes = replace(QUICK, **changes)
    return list(Growth(sizes.curves()[along], sizes, setting).records())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason=f"no F.linear_cross_entropy in {torch.__version__}")
def test_a_quick_run_has_a_record_for_everyone_at_every_point():
    records = list(growth.run(SETTING))
    points = {"N": QUICK.tokens, "V": QUICK.vocabularies, "K": QUICK.negatives}
    for along, values in points.items():
        for index, value in enumerate(values):
            found = {r.contestant: r for r in records if r.case == along and r.conditions[along] == value}
            assert set(found) == {FLOOR, OURS, *PEERS}
            for name, record in found.items():
                if name in PEERS and name not in growth.QUICK_PEERS:
                    assert record.note == "not in a quick run"
                    continue
                assert {"seconds", "median", "rounds", "floor", "of_ours", "peak_mib"} <= record.values.keys()
                assert ("error_loss" in record.values) == (index == 0 and name != FLOOR)


def test_ratios_are_those_of_the_fewest_seconds():
    problem = draw(QUICK.curves()[0].shapes[0])
    watch = Watch(problem, None, peaks={"eager": 3 * 2**20})
    timings = {FLOOR: Timing((2.0, 1.0)), OURS: Timing((4.0, 5.0)), "eager": Timing((9.0, 6.0))}
    values = growth.values_of("eager", watch, timings)
    assert values == {"seconds": 6.0, "median": 7.5, "rounds": 2.0, "floor": 6.0, "of_ours": 1.5, "peak_mib": 3.0}


def test_the_peak_is_that_of_eager_logits(monkeypatch):
    records = run_points(monkeypatch, tokens=(1024,), vocab_tokens=1024, vocab=8209, hidden=16, length=64)
    peaks = {record.contestant: record.values["peak_mib"] for record in records}
    logits = 1024 * 8209 * 2 / 2**20
    assert peaks["eager"] > 3 * logits  # bf16, fp32 and a gradient
    assert peaks[OURS] < peaks["eager"] / 2


def test_another_loss_at_the_first_point_is_refused(monkeypatch):
    loss = BUILDERS["eager"]().loss
    monkeypatch.setattr(growth, "builders", wrong(loss=lambda *tensors: 2 * loss(*tensors)))
    found = [r for r in run_points(monkeypatch) if r.contestant == "eager"]
    assert len(found) == len(QUICK.tokens)
    assert all(r.note.startswith("computes another loss") and not r.values for r in found)


def test_another_gradient_at_the_first_point_is_refused(monkeypatch):
    loss = BUILDERS["eager"]().loss
    monkeypatch.setattr(growth, "builders", wrong(loss=lambda h, w, *rest: loss(h, 2 * w.detach() - w, *rest)))
    found = [r for r in run_points(monkeypatch) if r.contestant == "eager"]
    assert all(r.note.startswith("computes another loss") for r in found)


@pytest.mark.parametrize("mistake", [2.0, float("nan")])
def test_another_loss_at_a_later_point_is_refused(monkeypatch, mistake):
    loss, first = BUILDERS["eager"]().loss, QUICK.tokens[0]

    def wrong_later(hidden, *rest):
        return loss(hidden, *rest) * (1.0 if hidden[..., 0].numel() <= first else mistake)

    monkeypatch.setattr(growth, "builders", wrong(loss=wrong_later))
    right, other = [r for r in run_points(monkeypatch) if r.contestant == "eager"]
    assert right.values
    assert not right.note
    assert not other.values
    assert other.note.startswith("computes another loss")


def test_ours_is_not_left_out_where_it_is_wrong(monkeypatch):
    loss = BUILDERS["eager"]().loss
    monkeypatch.setattr(growth, "ours", lambda name: replace(BUILDERS["eager"](), loss=lambda *t: 2 * loss(*t)))
    with pytest.raises(AnotherLossError, match=OURS):
        run_points(monkeypatch)


def test_a_peer_that_fails_is_left_out_and_the_others_go_on(monkeypatch):
    def fail(*tensors):
        raise MemoryError("too large\nfor this")

    eager = BUILDERS["eager"]()
    other = "F.linear_cross_entropy"  # by name, which not every torch has
    builders = {"eager": lambda: replace(eager, loss=fail), other: lambda: replace(eager, name=other)}
    monkeypatch.setattr(growth, "builders", lambda: builders)
    records = run_points(monkeypatch, peers=("eager", other))
    assert {r.contestant for r in records} == {FLOOR, OURS, "eager", other}
    assert {r.note for r in records if r.contestant == "eager"} == {"failed with MemoryError: too large"}
    assert all(r.values for r in records if r.contestant != "eager")


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    def build():
        raise ImportError("no such package")

    monkeypatch.setattr(growth, "builders", lambda: {"eager": build})
    found = [r for r in run_points(monkeypatch) if r.contestant == "eager"]
    assert {r.note for r in found} == {"not installed: ImportError: no such package"}


def test_a_slow_peer_grows_no_further(monkeypatch):
    records = run_points(monkeypatch, limit=0.0, tokens=(128, 256, 384, 512))
    notes = [r.note.split(":")[0] for r in records if r.contestant == "eager"]
    assert notes == ["", "", "grew no further", "grew no further"]  # two points are a curve
    assert all(bool(r.values) == (not r.note) for r in records)
    assert all(r.values for r in records if r.contestant in (FLOOR, OURS))


@pytest.mark.slow  # compiles
def test_compilers_compile_once_along_a_curve(monkeypatch):
    peer, counters = builders()["torch.compile"](), torch._dynamo.utils.counters
    torch._dynamo.reset()
    curve, compiled = QUICK.curves()[0], []
    for shape in curve.shapes:
        problem = growth.mark(draw(shape), curve.along)
        loss, grads = contestant(peer, problem).call()
        assert Oracle(problem, Dense.of(problem)).errors(loss, grads).worst() < 0.1
        compiled.append(counters["stats"]["unique_graphs"])
    assert len(compiled) > 1
    assert len(set(compiled)) == 1
