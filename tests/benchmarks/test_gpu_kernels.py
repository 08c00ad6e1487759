"""What is measured of kernels on a GPU, and their tuning: dry runs with interpreted and emulated kernels on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, heads
from benchmarks.contestants import FLOOR, OURS
from benchmarks.kernels import calls, cuda_cases, tune
from benchmarks.kernels.cuda_cases import OURS_CUDA, OURS_KEPT, OURS_ONE_PASS, OURS_TRITON
from benchmarks.measure import AnotherLossError, ContestantError, NotHereError
from benchmarks.peers import ours
from benchmarks.problem import IGNORE, draw
from benchmarks.setting import CPU, Setting
from benchmarks.shapes import BAR_8K, BAR_LOSSES
from cpo_kernels.kernels import registry, selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice

pytestmark = pytest.mark.cpu
QUICK = Setting(quick=True)
FOREVER = float("inf")
dry_run = pytest.mark.interpreter  # on a GPU, gpu-check runs the benchmarks themselves


@pytest.fixture
def emulated(emulated_cuda, emulator, monkeypatch):
    """The emulated kernels, with the versions that a description of the run names."""
    for name in ("driver_version", "runtime_version"):
        monkeypatch.setattr(emulator, name, lambda: 13000, raising=False)
    return emulator


def of_case(name: str) -> dict[tuple[str, str], object]:
    found = list(cuda_cases.cases(QUICK)[name]())
    assert len({(r.case, r.contestant) for r in found}) == len(found)  # none hides another
    return {(r.case, r.contestant): r for r in found}


@dry_run
def test_a_dry_run_of_the_bars_has_every_shape(monkeypatch):
    monkeypatch.setattr(heads, "accuracies", lambda *arguments: iter(()))  # of which every peer is part
    monkeypatch.setattr(gpu, "BAR_PEERS", ())
    found = list(gpu.run(QUICK))
    cases = {record.case for record in found}
    assert {"ceilings", *(shape.name for shape in BAR_LOSSES), f"no_grad, {BAR_8K.name}"} <= cases
    for dtype, kernels in (("bfloat16", 2), ("float32", 3)):
        rows = [r for r in found if r.case == f"row kernels, {dtype}, V=257" and r.contestant != calls.COPY]
        assert len(rows) == kernels and all(r.values["of_gbs"] > 0 for r in rows)
    (no_grad,) = (r for r in found if r.case.startswith("no_grad") and r.contestant == OURS)
    assert no_grad.values["of_product"] > 0
    assert len([r for r in found if r.case.startswith("peak memory")]) == 4
    assert not any(record.note for record in found)


def test_peaks_are_held_against_plan_and_budget_with_and_without_padding():
    problem = draw(replace(gpu.sized(BAR_8K, QUICK), tokens=16))
    names = set()
    for padded in (False, True):
        if padded:
            problem.targets[..., 8:] = IGNORE
        record = gpu.peak_of(problem, 2**20, padded=padded, setting=QUICK)
        assert record.values["of_budget"] < record.values["of_plan"]  # all logits are a fraction of this budget
        names.add(record.case)
    assert len(names) == 2


@dry_run
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_kernels_are_held_against_a_copy_and_triton(emulated, dtype):
    with selection.overridden(Choice("row_backward", "default", "cuda")):
        found = {r.contestant: r for r in calls.row_kernels(dtype, ["cuda", "triton"], QUICK)}
    kernels = ["forward", "backward in place", *["backward, bf16 over fp32"] * (dtype == torch.float32)]
    names = {f"{kernel}, {backend}" for kernel in kernels for backend in ("cuda", "triton")}
    assert found.keys() == {calls.COPY, "row_gradient_, cuda", *names}
    copy, forward = found[calls.COPY].values, found["forward, cuda"].values
    assert forward["of_gbs"] == pytest.approx(copy["seconds"] / forward["seconds"] / 2)  # it reads and does not write
    assert forward["of_triton"] == found["forward, triton"].values["seconds"] / forward["seconds"]
    picked = {kernel: found[f"{kernel}, cuda"].conditions["picked"] for kernel in kernels}
    assert picked["backward in place"] and not picked["forward"]


@dry_run
def test_rows_that_do_not_fit_are_left_out(emulated, monkeypatch):
    monkeypatch.setattr(emulated, "row_gradient_bytes", lambda device: 512)
    assert not any(r.contestant.startswith("row_g") for r in calls.row_kernels(torch.bfloat16, ["cuda"], QUICK))


@dry_run
def test_losses_and_contrasts_are_measured_by_both_backends(emulated):
    logits = of_case("loss of logits bfloat16")
    for where in ("", ", in L2"):
        names = [who for case, who in logits if case == f"loss of logits, bfloat16, V=257{where}"]
        assert names == [calls.COPY, OURS_CUDA, f"{OURS_CUDA}, the launch alone", OURS_TRITON]
    assert {who for _, who in of_case("contrast")} == {"cuda", "triton"}
    found = {who: record.values for (_, who), record in of_case("likelihood").items()}
    assert found.keys() == {FLOOR, OURS_CUDA, OURS_TRITON, OURS_ONE_PASS} and found[FLOOR]["floor"] == 1
    assert all({"floor", "peak_mib"} <= values.keys() for values in found.values())


@dry_run
@pytest.mark.parametrize("hopper", [True, False])
def test_ways_of_hopper_take_part_where_there_is_one(emulated, monkeypatch, hopper):
    if not hopper:
        monkeypatch.setattr(cuda_extension, "capability", lambda device: (8, 0))
    kept = {who: r for (_, who), r in of_case(f"{BAR_8K.name}, kept").items()}
    logps = {who: r for (_, who), r in of_case("no_grad").items()}
    for record in (kept[OURS_KEPT], logps[cuda_cases.HOPPER]):
        assert bool(record.values) == hopper
        assert hopper or record.note == "needs compute capability 9.0, cpu has (8, 0)"
    assert kept[OURS_CUDA].values["floor"] > 0 and logps["fused linear, triton"].values["of_product"] > 0


def test_without_kernels_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(cuda_extension, "_load", lambda: (None, "it was not built"))
    with pytest.raises(NotHereError, match="it was not built"):
        list(cuda_cases.run(QUICK))


# What computes the wrong thing


def off(function, factor: float):
    """The launcher with a second result that is off."""

    def run(*args, **options):
        first, second = function(*args, **options)
        return first, second * factor

    return run


@dry_run
@pytest.mark.parametrize(
    ("module", "launcher", "case"),
    [
        (cuda_rows, "row_forward", "row kernels bfloat16"),
        (cuda_rows, "row_gradient_", "row kernels float32"),
        (cuda_hopper, "linear_forward", "no_grad"),
    ],
)
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_launch_is_not_timed(emulated, monkeypatch, module, launcher, case, factor):
    monkeypatch.setattr(module, launcher, off(getattr(module, launcher), factor))
    with pytest.raises(AnotherLossError):
        of_case(case)


@dry_run
@pytest.mark.parametrize("launcher", ["row_backward_", "row_gradient_"])
def test_a_wrong_gradient_of_one_row_is_not_timed(emulated, monkeypatch, launcher):
    right = getattr(cuda_rows, launcher)

    def wrong(logits, *args):
        result = right(logits, *args)
        logits[3] = 0
        return result

    monkeypatch.setattr(cuda_rows, launcher, wrong)
    problem = calls.RowProblem(8, 257, torch.float32, CPU)
    with pytest.raises(AnotherLossError, match=launcher):
        problem.backward_("cuda") if launcher == "row_backward_" else problem.gradient_()


@dry_run
def test_a_wrong_loss_of_logits_and_a_wrong_contrast_are_not_timed(emulated, emulated_cuda, monkeypatch):
    right = cuda_groups.cpo_loss

    def wrong(logits, targets, grad, *args, **options):
        result = right(logits, targets, grad, *args, **options)
        grad *= 1.05
        return result

    monkeypatch.setattr(cuda_groups, "cpo_loss", wrong)
    with pytest.raises(AnotherLossError, match="one launch"):
        calls.LogitsProblem(0, 2, 257, torch.bfloat16, CPU).launch()
    backend = replace(emulated_cuda, contrast=off(emulated_cuda.contrast, 1.01))
    monkeypatch.setitem(registry.BACKENDS, "cuda", backend)
    with pytest.raises(AnotherLossError, match="cuda contrast"):
        of_case("contrast")


@dry_run
def test_a_way_that_is_wrong_or_fails_is_told_after_the_figures_of_the_others(emulated):
    good = ours("good", backend="cuda")

    def failing(*tensors):
        raise torch.OutOfMemoryError("tried to allocate too much\nand more lines")

    wrong = replace(good, name="wrong", loss=lambda *tensors: 2 * good.loss(*tensors))
    found = []
    with pytest.raises(ContestantError, match=r"wrong: AnotherLossError.*; failing: OutOfMemoryError: tried"):
        for record in cuda_cases.losses(BAR_8K, [wrong, good, replace(good, name="failing", loss=failing)], QUICK):
            found.append(record)
    assert [record.contestant for record in found if record.values] == [FLOOR, "good"]


# Tuning


@dry_run
def test_tuning_measures_every_kernel_and_leaves_the_table_alone(tmp_path):
    before, out = tune.TABLE.read_bytes(), tmp_path / "tuning.json"
    assert tune.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    assert tune.TABLE.read_bytes() == before
    table = json.loads(out.read_text())
    assert set(table["measurements"]) == {"default"}
    measured = {(e["kernel"], e["dtype"]) for e in table["entries"] if "measured" in e}
    assert measured == {(k.name, "float32" if d == torch.float32 else "any") for k in tune.KERNELS for d in k.dtypes}
    kept = [e for e in json.loads(before)["entries"] if e["arch"] != "default"]
    assert all(entry in table["entries"] for entry in kept)
    lines = out.read_text().splitlines()
    assert sum('"kernel"' in line for line in lines) == len(table["entries"])  # one a line
    with pytest.raises(SystemExit):
        tune.main(["--quick", "--device", "cpu"])


def test_measured_entries_take_the_place_of_their_own_kind_only():
    kinds = [("a", "sm_90", "bfloat16"), ("a", "sm_90", "float32"), ("a", "sm_80", "any"), ("b", "sm_90", "any")]
    old = [dict(zip(("kernel", "arch", "dtype"), kind, strict=True), config=n) for n, kind in enumerate(kinds)]
    measured = [{"kernel": "a", "dtype": "any", "config": "wide"}]
    measured.append({"kernel": "a", "dtype": "any", "vocab_at_most": 64, "config": "narrow"})
    table = tune.merged({"entries": old, "measurements": {"sm_80": "x"}}, measured, "sm_90", "here")
    assert table["measurements"] == {"sm_80": "x", "sm_90": "here"}
    configs = [e["config"] for e in table["entries"] if (e["kernel"], e["arch"]) == ("a", "sm_90")]
    assert configs == [1, "narrow", "wide"]  # the narrower bound is found first
    assert {e["config"] for e in table["entries"]} == {1, 2, 3, "narrow", "wide"}


def tuned(configs, run, error=lambda config: 0.0, clock=None, deadline=FOREVER):
    job = tune.Job(run, error, 1e-3, 1e9, "GB/s")
    kernel = tune.Kernel("row_forward", ((None, 31),), configs, lambda size, device: job, (torch.float32,))
    return kernel, tune.fastest(kernel, job, clock or tune.clock_for(CPU), False, deadline)


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_configuration_is_not_the_fastest(error):
    with pytest.raises(AnotherLossError, match="BLOCK"):
        tuned([{"BLOCK": 1}], lambda config: None, lambda config: error)


def test_a_configuration_that_does_not_launch_is_passed_over():
    def run(config):
        if config["BLOCK"] == 1:
            raise RuntimeError("out of resource: shared memory")

    _, found = tuned([{"BLOCK": 1}, {"BLOCK": 2}], run)
    assert (found.config, found.tried) == ({"BLOCK": 2}, 2)


@pytest.mark.triton
@pytest.mark.parametrize("tried", [0, 1, 2, 3])
def test_a_search_that_the_time_cuts_short_keeps_the_best_until_then(monkeypatch, tmp_path, tried):
    """Each configuration takes one second of a clock of its own, and is faster than the one before."""
    now, left = [0.0], iter([9.0, 8.0, 7.0])

    def clock(call):
        now[0] += 1.0
        return next(left), call()

    job = tune.Job(lambda config: None, lambda config: 0.0, 1e-3, 1e9, "GB/s")
    grid = tune.grid(BLOCK=(1, 2, 3))
    kernel = tune.Kernel("row_forward", ((None, 31),), grid, lambda size, device: job, (torch.float32,))
    monkeypatch.setattr(tune, "KERNELS", (kernel,))
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "clock_for", lambda device: clock)
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    out = tmp_path / "tuning.json"
    # Past the deadline only strictly: the configuration that starts at the deadline still runs.
    status = tune.main(["--device", "cpu", "--out", str(out), "--seconds", str(tried - 1)])
    assert status == (0 if tried == 3 else 1) and out.exists() == (tried > 0)
    if tried:
        entries = json.loads(out.read_text())["entries"]
        (measured,) = (e for e in entries if "measured" in e and e["arch"] == "default")
        assert measured["config"] == {"BLOCK": tried}
        assert (f"{tried} of 3 configurations tried" in measured["measured"]) == (tried < 3)
