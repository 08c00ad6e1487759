"""The benchmarks run, check what they time, and would notice a contestant that computes something else."""

from __future__ import annotations

import dataclasses
import math
import mmap
import time

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import accuracy, contestants, heads, measure, memory, oracle, peers, shapes, tables
from benchmarks.ceilings import Ceilings
from benchmarks.floor import Floor, allocate, gemms, plan_of, product_rows
from benchmarks.oracle import Dense, Oracle
from benchmarks.peers import BUILDERS, Peer, ours, ours_dpo
from benchmarks.problem import IGNORE, contrast, draw
from benchmarks.setting import Setting
from benchmarks.timing import Effort, Timing, round_robin

pytestmark = pytest.mark.cpu  # small dry runs on the host

QUICK = {shape.name: shape for shape in shapes.QUICK}
# Peers that compile take seconds each, so they are run once, by the slow test
COMPILING = ("torch.compile", "Liger CPO", "Liger DPO", "Cut Cross-Entropy")
PLAIN = [name for name in BUILDERS if name not in (*COMPILING, "QuACK")]


@pytest.fixture
def every_peer():
    """For tests of all peers. Development installs them but QuACK, so these tests are skipped only by users."""
    missing = {name: why for name, why in peers.installed()[1].items() if name != "QuACK"}
    if missing:
        pytest.skip(f"without {', '.join(missing)}: {'; '.join(dict.fromkeys(missing.values()))}")


def test_oracle_is_autograd_in_double(monkeypatch):
    monkeypatch.setattr(oracle, "_BLOCK", 64)  # several blocks of the vocabulary, the last one shorter
    problem = draw(QUICK["quick half prompt fp32"])
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    logps = -F.cross_entropy((hidden @ weight.T).flatten(0, 2), problem.targets.flatten(), reduction="none")
    loss = contrast(logps.view(problem.targets.shape).sum(-1), problem.ref_logps.double())
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    found = Oracle(problem, Dense.of(problem))
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_close(found.grad_hidden, grad_hidden.flatten(0, 2)[found.rows])
    assert_close(found.grad_weight, grad_weight[found.columns])


def test_the_contrast_is_not_settled():
    for shape in shapes.QUICK:
        if shape.work == shapes.NLL:
            continue
        problem = draw(shape)
        logps = Dense.of(problem).sequence_logps(problem).requires_grad_()
        loss = contrast(logps, problem.ref_logps.double())
        assert torch.autograd.grad(loss, logps)[0].abs().amax(-1).min() > 1e-6


def nll_in_double(problem, hidden, weight):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 2), problem.targets.flatten(), ignore_index=IGNORE)


def dpo_in_double(problem, hidden, weight):
    ratios = []
    for rows, head in ((hidden, weight), (problem.ref_hidden.double(), problem.ref_weight.double())):
        logps = torch.log_softmax(rows @ head.T, -1).gather(-1, problem.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ratios.append(logps.masked_fill(problem.targets == IGNORE, 0).sum(-1))
    chosen, rejected = (ratios[0] - ratios[1]).unbind(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("work", [shapes.NLL, shapes.DPO])
@pytest.mark.parametrize("prompt_share", [0.0, 0.5])
def test_oracle_of_other_work_is_autograd_in_double(work, prompt_share):
    shape = dataclasses.replace(QUICK["quick fp32"], prompt_share=prompt_share, work=work)
    problem = draw(shape) if work == shapes.NLL else draw(shape).as_dpo()
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = (nll_in_double if work == shapes.NLL else dpo_in_double)(problem, hidden, weight)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    oracle = Oracle(problem, Dense.of(problem))
    assert oracle.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_close(oracle.grad_hidden, grad_hidden.flatten(0, 2)[oracle.rows])
    assert_close(oracle.grad_weight, grad_weight[oracle.columns])
    peer = ours("ours") if work == shapes.NLL else ours_dpo("ours")
    assert oracle.errors(*peer.run(problem)).worst() < 1e-5


def test_the_contrast_of_dpo_is_not_settled_and_its_reference_is_another_model():
    problem = draw(QUICK["quick fp32"]).as_dpo()
    oracle = Oracle(problem, Dense.of(problem))
    assert oracle.grad_hidden.norm(dim=-1).median() > 1e-4
    own_reference = dataclasses.replace(problem, ref_hidden=problem.hidden.detach(), ref_weight=problem.weight.detach())
    assert Oracle(own_reference, Dense.of(problem)).loss == pytest.approx(math.log(2))
    assert oracle.errors(*ours_dpo("ours").run(own_reference)).loss > 1e-2


@pytest.mark.parametrize("shape", [name for name in QUICK if "frozen" in name or "no_grad" in name])
def test_frozen_heads_and_log_likelihoods_are_checked_too(shape):
    result = measure.measure_case(QUICK[shape], ["eager"], Effort(rounds=1))
    for row in result.rows:
        if row.errors is None:
            continue
        assert row.errors.grad_weight is None
        assert (row.errors.nats is not None) == (QUICK[shape].mode == shapes.NO_GRAD)
        assert (row.errors.grad_hidden is None) == (QUICK[shape].mode == shapes.NO_GRAD)
    assert {row.contestant for row in result.rows if row.errors} >= {contestants.OURS, "eager"}


def test_log_likelihoods_of_something_else_are_an_error(monkeypatch):
    eager = BUILDERS["eager"]()
    wrong = dataclasses.replace(eager, name="mean", sequence_logps=lambda *tensors: eager.sequence_logps(*tensors) / 16)
    monkeypatch.setitem(BUILDERS, "mean", lambda: wrong)
    with pytest.raises(measure.AnotherLossError, match="mean on quick no_grad fp32"):
        measure.measure_case(QUICK["quick no_grad fp32"], ["mean"], Effort(rounds=1))


@pytest.mark.parametrize(
    ("mode", "work", "products"),
    [("trained", "cpo", 3), ("frozen", "cpo", 2), ("no_grad", "cpo", 1), ("trained", "dpo", 4), ("trained", "nll", 3)],
)
def test_the_floor_multiplies_what_must_be_multiplied(mode, work, products):
    shape = dataclasses.replace(QUICK["quick half prompt fp32"], mode=mode, work="cpo" if work == "dpo" else work)
    problem = draw(shape).as_dpo() if work == "dpo" else draw(shape)
    floor = Floor(problem, None, fresh=True)
    with FlopCounterMode(display=False) as counter:
        _, grads = floor()
    assert len(grads) == {"trained": 2, "frozen": 1, "no_grad": 0}[mode]
    assert counter.get_total_flops() == products * heads.product_flops(shape)
    assert heads.product_flops(shape) == 2 * (shape.num_tokens // 2) * shape.vocab * shape.hidden


def test_compulsory_bytes():
    shape = dataclasses.replace(QUICK["quick half prompt bf16"])
    hidden, weight = 2 * 128 * shape.hidden, 2 * shape.vocab * shape.hidden  # bytes; half of 256 tokens
    assert heads.compulsory_bytes(shape, "cpo") == 2 * hidden + 2 * weight
    assert heads.compulsory_bytes(shape, "dpo") == 3 * hidden + 3 * weight
    assert heads.compulsory_bytes(dataclasses.replace(shape, mode="frozen"), "cpo") == 2 * hidden + weight
    assert heads.compulsory_bytes(dataclasses.replace(shape, mode="no_grad"), "cpo") == hidden + weight


def timed(contestant: str, work: str, *seconds: float) -> measure.Row:
    return measure.Row(contestant, work, Timing(seconds), None, 3 * 2**20)


def test_values_are_ratios_to_the_floor_and_to_ours_on_the_same_work():
    shape = QUICK["quick fp32"]
    rows = (
        timed(contestants.FLOOR, "cpo", 3.0, 4.0),
        timed(contestants.OURS, "cpo", 1.5),
        timed(contestants.OURS_PAIRS, "pairs", 2.0),
        timed(contestants.FLOOR_DPO, "dpo", 4.0),
        timed(contestants.OURS_DPO, "dpo", 5.0),
        timed("eager", "cpo", 7.0, 6.0),
        timed("Liger CPO", "pairs", 9.0),
        timed("Liger DPO", "dpo", 10.0),
    )
    result = measure.CaseResult(shape, rows, plan=None)
    ceilings = Ceilings(tflops={"float32": 2e-6}, gbs=0.5)
    found = {row.contestant: heads.values(row, result, ceilings) for row in rows}
    ratios = {name: (v["floor"], v["gemms"], v["of_ours"]) for name, v in found.items()}
    assert ratios[contestants.FLOOR] == (1, 3, 2)
    assert ratios["eager"] == (2, 6, 4)
    assert ratios["Liger CPO"] == (3, 9, 4.5)
    assert ratios["Liger DPO"] == (2.5, 10, 2)
    assert (found["eager"]["seconds"], found["eager"]["median"], found["eager"]["rounds"]) == (6, 6.5, 2)
    assert found["eager"]["tflops"] == pytest.approx(3 * 2 * 256 * 509 * 32 / 6e12)
    assert found["eager"]["of_tflops"] == pytest.approx(found["eager"]["tflops"] / 2e-6)
    assert found["Liger DPO"]["tflops"] == pytest.approx(4 * 2 * 256 * 509 * 32 / 10e12)
    assert found["eager"]["gbs"] == pytest.approx(2 * 4 * (256 + 509) * 32 / 6e9)
    assert found["eager"]["of_gbs"] == pytest.approx(found["eager"]["gbs"] / 0.5)
    assert found["eager"]["peak_mib"] == 3


def test_a_quick_run_has_a_complete_record_of_everyone(monkeypatch):
    def fail(*tensors):
        raise RuntimeError("no such kernel\nand more")

    failing = dataclasses.replace(BUILDERS["eager"](), name="failing", loss=fail, nll=fail, sequence_logps=fail)
    monkeypatch.setitem(BUILDERS, "failing", lambda: failing)
    cases = [dataclasses.replace(QUICK[name], peers=("eager", "failing", "QuACK"), rounds=1) for name in SOME]
    cases[-1] = dataclasses.replace(cases[-1], note="few")
    monkeypatch.setattr(shapes, "QUICK_CASES", tuple(cases))
    peak = memory.Peak(contestants.OURS, "", 256, 3 * 2**20, planned=4 * 2**20, budget=6 * 2**20)
    monkeypatch.setattr(memory, "measure", lambda *arguments: peak)
    monkeypatch.setattr(
        shapes, "QUICK_ACCURACY", dataclasses.replace(shapes.QUICK_ACCURACY, peers=("eager", "failing"))
    )
    found = list(heads.run(Setting(quick=True)))
    for case in cases:
        records = {r.contestant: r for r in found if r.case == case.name and r.conditions["mode"] == case.mode}
        assert records.pop("QuACK").note == "needs a GPU"
        reason = records.pop("failing")
        assert reason.note == "failed with RuntimeError: no such kernel"
        assert not reason.values
        assert {contestants.FLOOR, contestants.OURS, "eager"} <= records.keys()
        assert records[contestants.FLOOR].values["floor"] == 1
        errors = {"nats_largest", "nats_mean"} if case.mode == "no_grad" else {"error_loss", "error_grad_hidden"}
        errors |= {"error_grad_weight"} if case.mode == "trained" else set()
        for record in records.values():
            assert record.note == case.note
            assert record.values.keys() >= MEASURED
            assert record.contestant.startswith("floor") or errors <= record.values.keys()
            assert record.conditions == {
                "V": 509,
                "H": 32,
                "N": 256,
                "K": 3,
                "dtype": case.dtype_name,
                "prompt": case.prompt_share,
                "mode": case.mode,
                "work": case.work,
            }
    assert {"torch.mm float32", "torch.mm bfloat16", "copy"} <= {r.contestant for r in found if r.case == "ceilings"}
    logps = {r.contestant: r for r in found if r.case == heads.LOGPS}
    assert logps["eager"].values.keys() == {"nats_largest", "nats_mean"}
    assert logps["failing"].note == "RuntimeError: no such kernel"
    (peak,) = (r for r in found if r.case == "peak memory, fp32")
    assert peak.values == {"peak_mib": 3, "planned_mib": 4, "of_plan": 0.75, "budget_mib": 6, "of_budget": 0.5}


SOME = ("quick half prompt bf16", "quick frozen fp32", "quick no_grad bf16", "quick cross-entropy fp32")
MEASURED = {"seconds", "median", "rounds", "floor", "gemms", "tflops", "of_tflops", "gbs", "of_gbs", "of_ours"}


def test_work_that_a_peer_cannot_do(every_peer):
    works = {name: peers.BUILDERS[name]().work_on for name in ("eager", "Liger CPO", "Liger DPO", "TRL fused head")}
    trained, cross_entropy = QUICK["quick fp32"], QUICK["quick cross-entropy fp32"]
    assert {name: work(trained) for name, work in works.items()} == {
        "eager": "cpo",
        "Liger CPO": "pairs",
        "Liger DPO": "dpo",
        "TRL fused head": "cpo",
    }
    assert [name for name, work in works.items() if work(cross_entropy)] == ["eager"]
    assert [name for name, work in works.items() if work(QUICK["quick no_grad fp32"])] == ["eager", "TRL fused head"]
    with pytest.raises(ValueError, match="Liger CPO does no work"):
        contestants.contestant(BUILDERS["Liger CPO"](), draw(cross_entropy))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["quick half prompt fp32", "quick cross-entropy bf16"])
def test_every_compiling_peer_computes_the_same_loss(every_peer, shape):
    names = [name for name in COMPILING if peers.does(name, QUICK[shape])]
    result = measure.measure_case(QUICK[shape], names, Effort(rounds=1))
    assert set(names) <= {row.contestant for row in result.rows if row.errors is not None}
    assert ("Liger DPO" in names) == (contestants.FLOOR_DPO in {row.contestant for row in result.rows})


@pytest.mark.parametrize("shape", ["quick fp32", "quick bf16", "quick half prompt fp32", "quick cross-entropy bf16"])
def test_every_plain_contestant_computes_the_same_loss(every_peer, shape):
    names = [name for name in PLAIN if peers.does(name, QUICK[shape])]
    result = measure.measure_case(QUICK[shape], names, Effort(rounds=1))
    checked = {row.contestant for row in result.rows if row.errors is not None}
    half = {contestants.OURS_FP32_LOGITS} if QUICK[shape].dtype == torch.bfloat16 else set()
    assert checked == {contestants.OURS, *half, *names}


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
    oracle.errors(loss, (grad_hidden, grad_weight))
    touched = grad_hidden.clone()
    touched[0, 0, 0, 0] = 1e-8
    with pytest.raises(ValueError, match="predicts nothing"):
        oracle.errors(loss, (touched, grad_weight))
    with pytest.raises(ValueError, match="1 gradients, expected 2"):
        oracle.errors(loss, (grad_hidden,))


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
    gemms(hidden, weight, rows, out)
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
    sizes = [(50257, 768, 1024), (128256, 1024, 512)]
    assert bars == {(*size, dtype) for size in sizes for dtype in ("float32", "bfloat16")}
    pairs = shapes.BARS[0].pairs()
    assert (pairs.candidates, pairs.num_tokens) == (2, 1024)
    with pytest.raises(ValueError, match="1000"):
        shapes.BARS[0].with_tokens(1000)


@pytest.mark.parametrize("cases", [(*shapes.CASES, *shapes.WIDE), shapes.GPU_CASES])
def test_cases_cover_what_the_issue_asks_for(cases):
    assert len({shape.name for shape in cases}) == len(cases)
    assert all(shape.reason for shape in cases)
    heads_of_models = {(50257, 1600), (32000, 3200), (128256, 4096), (151936, 4096), (262144, 2560)}
    assert heads_of_models <= {(shape.vocab, shape.hidden) for shape in cases}
    assert {shape.negatives for shape in cases} == {1, 3, 4, 16}
    assert {shape.prompt_share for shape in cases} == {0, 0.5, 0.8}
    assert {shape.mode for shape in cases} == {"trained", "frozen", "no_grad"}
    for dtype in (torch.float32, torch.bfloat16):
        asked = {name for shape in cases if shape.dtype == dtype for name in peers.asked_of(shape)}
        assert asked >= set(BUILDERS) - {"QuACK", "Liger DPO", *shapes.POLICIES}
    assert {name for shape in cases for name in peers.asked_of(shape)} == set(BUILDERS)
    half = [shape for shape in cases if shape.prompt_share == 0.5 and shape.peers is None]
    assert half, "half the tokens prompt, everyone"
    assert any("QuACK" in peers.asked_of(shape) for shape in cases if shape.work == shapes.NLL)
    for shape in cases:
        assert (shape.groups * shape.candidates) % 2 == 0  # the same tokens as pairs


def test_markdown_aligns_columns():
    assert tables.markdown(["", "b"], [["x", "10"], ["long", "2"]]) == (
        "|      |  b |\n| ---- | -: |\n| x    | 10 |\n| long |  2 |"
    )
