"""The benchmarks run, check what they time, and would notice a contestant that computes something else."""

from __future__ import annotations

import dataclasses
import json
import mmap
import time

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("cut_cross_entropy")
pytest.importorskip("liger_kernel")
pytest.importorskip("trl")

from benchmarks import accuracy, contestants, measure, memory, report, shapes, tables
from benchmarks.floor import Floor, allocate, plan_of, product_rows, three_gemms
from benchmarks.peers import BUILDERS, Peer, ours
from benchmarks.problem import Dense, Oracle, contrast, draw
from benchmarks.timing import Effort, round_robin

pytestmark = pytest.mark.cpu  # small dry runs on the host

QUICK = {shape.name: shape for shape in shapes.QUICK}
# Peers that compile take seconds each, so they are run once, by the smoke run of the whole report
COMPILING = ("torch.compile", "Liger CPO", "Cut Cross-Entropy")
PLAIN = [name for name in BUILDERS if name not in COMPILING]


def test_oracle_is_autograd_in_double():
    problem = draw(QUICK["quick half prompt fp32"])
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    logps = -F.cross_entropy((hidden @ weight.T).flatten(0, 2), problem.targets.flatten(), reduction="none")
    loss = contrast(logps.view(problem.targets.shape).sum(-1), problem.ref_logps.double())
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    oracle = Oracle(problem, Dense.of(problem))
    assert oracle.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_close(oracle.grad_hidden, grad_hidden.flatten(0, 2)[oracle.rows])
    assert_close(oracle.grad_weight, grad_weight[oracle.columns])


def test_the_contrast_is_not_settled():
    for shape in shapes.QUICK:
        problem = draw(shape)
        logps = Dense.of(problem).sequence_logps(problem).requires_grad_()
        loss = contrast(logps, problem.ref_logps.double())
        assert torch.autograd.grad(loss, logps)[0].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("shape", ["quick fp32", "quick bf16", "quick half prompt fp32", "quick half prompt bf16"])
def test_every_plain_contestant_computes_the_same_loss(shape):
    result = measure.measure_case(QUICK[shape], PLAIN, Effort(rounds=1))
    checked = {row.contestant for row in result.rows if row.errors is not None}
    half = {contestants.OURS_FP32_LOGITS} if QUICK[shape].dtype == torch.bfloat16 else set()
    assert checked == {contestants.OURS, *half, *PLAIN}


def other_loss(name: str) -> Peer:
    """Eager, with one mistake."""
    eager = BUILDERS["eager"]()

    def mean_over_tokens(hidden, weight, targets, ref_logps):
        return contrast(eager.sequence_logps(hidden, weight, targets) / targets.shape[-1], ref_logps)

    def without_reference(hidden, weight, targets, ref_logps):
        return eager.loss(hidden, weight, targets, None)

    def not_a_number(hidden, weight, targets, ref_logps):
        return eager.loss(hidden, weight, targets, ref_logps) * float("nan")

    def not_a_number_in_one_gradient(hidden, weight, targets, ref_logps):
        return eager.loss(hidden, weight, targets, ref_logps) + (0 * weight[0, 0]).sqrt()

    losses = {
        "mean": mean_over_tokens,
        "no reference": without_reference,
        "nan": not_a_number,
        "nan gradient": not_a_number_in_one_gradient,
    }
    return dataclasses.replace(eager, name=name, loss=losses[name])


@pytest.mark.parametrize("mistake", ["mean", "no reference", "nan", "nan gradient"])
def test_another_loss_is_an_error(mistake, monkeypatch):
    monkeypatch.setitem(BUILDERS, mistake, lambda: other_loss(mistake))
    with pytest.raises(measure.AnotherLossError, match=f"{mistake} on quick bf16"):
        measure.measure_case(QUICK["quick bf16"], [mistake], Effort(rounds=1))


def test_a_gradient_for_a_prompt_row_is_an_error():
    problem = draw(QUICK["quick half prompt fp32"])
    oracle = Oracle(problem, Dense.of(problem))
    loss, (grad_hidden, grad_weight) = ours("ours").run(problem)
    oracle.errors(loss, grad_hidden, grad_weight)
    touched = grad_hidden.clone()
    touched[0, 0, 0, 0] = 1e-8
    with pytest.raises(ValueError, match="predicts nothing"):
        oracle.errors(loss, touched, grad_weight)


@pytest.mark.parametrize("shape", QUICK)
def test_the_floor_multiplies_the_rows_of_our_plan(shape):
    problem = draw(QUICK[shape])
    budget = contestants.smallest_budget(problem) if QUICK[shape].smallest_budget else None
    rows = product_rows(plan_of(problem, budget))
    predicting = int((problem.targets != -100).sum())
    assert sum(rows) == predicting == QUICK[shape].num_tokens * (1 - QUICK[shape].prompt_share)
    if QUICK[shape].smallest_budget:
        assert rows == [predicting // QUICK[shape].groups] * QUICK[shape].groups
    assert Floor(problem, budget, fresh=True).rows == rows


def test_the_floor_computes_all_three_products():
    hidden, weight = torch.randn(11, 5, dtype=torch.float64), torch.randn(17, 5, dtype=torch.float64)
    rows = [4, 4, 3]
    out = allocate(hidden, weight, rows)
    three_gemms(hidden, weight, rows, out)
    logits = hidden @ weight.T
    assert out.logits.shape == (4, 17)
    assert_close(out.logits[:3], logits[8:])
    assert_close(out.grad_hidden, logits @ weight)
    assert_close(out.grad_weight, logits.T @ hidden)


def test_round_robin_runs_everyone_in_turn(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])

    def takes(name: str, seconds: float):
        def call() -> str:
            calls.append(name)
            clock[0] += seconds
            return name

        return call

    durations = {"floor": 1.0, "near": 1.1, "far": 2.0, "very far": 3.0}
    results = []

    class Observer:
        def before(self, name: str) -> None:
            results.append(name)

        def after(self, name: str, result: object) -> None:
            results.append((name, result))

    timings = round_robin(
        {name: takes(name, seconds) for name, seconds in durations.items()},
        Effort(rounds=5),
        reference="floor",
        observer=Observer(),
    )
    assert calls[:4] == ["floor", "near", "far", "very far"]
    assert calls[4:7] == ["near", "far", "floor"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {
        "floor": 5,
        "near": 5,
        "far": 2,
        "very far": 1,
    }
    for name, timing in timings.items():
        assert timing.best == pytest.approx(durations[name])
        assert timing.median == pytest.approx(durations[name])
    assert results == [item for name in calls for item in (name, (name, name))]


def test_long_calls_get_fewer_rounds_but_three():
    effort = Effort(rounds=5, seconds=20)

    def rounds(seconds: float) -> int:
        return next(n for n in range(9) if not effort.again([seconds] * n, [seconds], always=False))

    assert [rounds(seconds) for seconds in (1, 4, 5, 8, 60)] == [5, 5, 4, 3, 3]


def test_those_that_always_run_do_so_however_far():
    calls = {"floor": lambda: None, "ours": lambda: time.sleep(0.01)}
    timings = round_robin(calls, Effort(rounds=4), reference="floor", always=["ours"])
    assert len(timings["ours"].seconds) == 4


def test_peak_meter_sees_what_was_touched_and_freed():
    size = 64 * 2**20

    def touch() -> None:
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1

    meter, slack = memory.PeakMeter(), 2 * 2**20  # the kernel's counters of resident pages are batched per core
    meter.start()
    assert abs(meter.growth()) <= slack
    touch()
    assert abs(meter.growth() - size) <= slack
    meter.start()
    assert abs(meter.growth()) <= slack


def test_peak_memory_is_measured_in_another_process():
    shape = QUICK["quick fp32"]
    peak = memory.measure(contestants.OURS, shape, 2 * shape.num_tokens)
    assert (peak.contestant, peak.num_tokens) == (contestants.OURS, 512)
    assert 512 * shape.vocab * 4 <= peak.planned <= 512 * shape.vocab * 4 + 16 * 2**20  # logits, workspace
    with pytest.raises(ValueError, match="must be a multiple"):
        memory.measure(contestants.OURS, shape, shape.num_tokens + 1)


def test_accuracy_of_logps():
    names = {contestants.OURS, contestants.OURS_FP32_LOGITS, "eager"}
    builders = {"eager": BUILDERS["eager"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "BUILDERS", builders)
        errors = {error.contestant: error for error in accuracy.measure(QUICK["quick bf16"])}
    assert errors.keys() == names
    assert errors[contestants.OURS_FP32_LOGITS].largest <= 2e-3 < errors["eager"].largest
    assert all(0 < error.mean <= error.largest for error in errors.values())


def test_shapes_are_those_of_the_bars():
    bars = {(s.vocab, s.hidden, s.num_tokens, s.dtype_name) for s in shapes.BARS}
    sizes = [(50257, 768, 1024), (50257, 768, 4096), (128256, 1024, 2048)]
    assert bars == {(*size, dtype) for size in sizes for dtype in ("float32", "bfloat16")}
    assert all(shape.candidates == 4 and shape.reason for shape in shapes.CASES)
    assert len({shape.name for shape in shapes.CASES}) == len(shapes.CASES)
    pairs = shapes.BARS[0].pairs()
    assert (pairs.candidates, pairs.num_tokens) == (2, 1024)
    with pytest.raises(ValueError, match="1000"):
        shapes.BARS[0].with_tokens(1000)


def test_markdown_aligns_columns():
    assert tables.markdown(["", "b"], [["x", "10"], ["long", "2"]]) == (
        "|      |  b |\n| ---- | -: |\n| x    | 10 |\n| long |  2 |"
    )


@pytest.mark.slow
def test_quick_report_prints_one_table(tmp_path, capsys):
    report.main(["--quick", "--only", "bf16", "--rounds", "1", "--output", str(tmp_path)])
    cases = [name for name in QUICK if "bf16" in name]
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in table]
    everyone = [contestants.FLOOR, contestants.FLOOR_REUSED, contestants.OURS, contestants.OURS_FP32_LOGITS]
    assert names[2:] == [*everyone, contestants.OURS_PAIRS, *BUILDERS]
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == [*cases, *tables.QUALITIES]
    data = json.loads((tmp_path / "quick.json").read_text())
    assert [case["shape"]["name"] for case in data["cases"]] == cases
    assert data["environment"]["versions"]["torch"] == torch.__version__
    page = (tmp_path / "quick.md").read_text()
    assert printed.strip() in page
    assert all(f"## {name}" in page for name in cases)
