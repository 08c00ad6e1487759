"""What is measured of kernels on a GPU, and their tuning: dry runs with interpreted and emulated kernels on the CPU."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels import gpu_cases, problems, tune
from benchmarks.measure import AnotherLossError, ContestantError
from benchmarks.problem import draw
from benchmarks.setting import CPU, Setting
from benchmarks.shapes import BAR_8K
from cpo_kernels.kernels import selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice

pytestmark = pytest.mark.cpu
QUICK = Setting(quick=True)
SHAPE = gpu_cases.sized(BAR_8K, QUICK)
dry_run = pytest.mark.interpreter  # on a GPU, gpu-check runs the benchmarks themselves


@pytest.fixture
def emulated(emulated_cuda, emulator, monkeypatch):
    """The emulated kernels, with the versions that a description of the run names."""
    for name in ("driver_version", "runtime_version"):
        monkeypatch.setattr(emulator, name, lambda: 13000, raising=False)
    return emulator


@dry_run
def test_log_likelihoods_are_held_against_one_product():
    found = {record.contestant: record for record in gpu_cases.without_gradients(SHAPE, QUICK)}
    assert found[gpu_cases.PRODUCT].values["of_product"] == 1 and len(found) == 5
    assert all(r.values["of_product"] > 0 and r.case == f"no_grad, {BAR_8K.name}" for r in found.values())


@dry_run
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_kernels_are_held_against_a_copy_and_triton(emulated, dtype):
    with selection.overridden(Choice("row_backward", "default", "cuda")):
        found = {r.contestant: r for r in gpu_cases.row_kernels(dtype, QUICK)}
    kernels = ["forward", "backward in place", "unit forward"]
    kernels += ["backward, bf16 over fp32"] * (dtype == torch.float32)
    names = {f"{kernel}, {backend}" for kernel in kernels for backend in ("cuda", "triton")}
    assert found.keys() == {gpu_cases.COPY, *names}
    copy, forward = found[gpu_cases.COPY].values, found["forward, cuda"].values
    assert forward["of_gbs"] == pytest.approx(copy["seconds"] / forward["seconds"] / 2)  # it reads and does not write
    of_triton = found["forward, triton"].values["seconds"] / forward["seconds"]
    assert forward["of_triton"] == pytest.approx(of_triton)
    picked = {kernel: found[f"{kernel}, cuda"].conditions["picked"] for kernel in kernels}
    assert picked["backward in place"] and not picked["forward"]


@dry_run
def test_rows_that_do_not_fit_are_left_out(emulated, monkeypatch):
    monkeypatch.setattr(emulated, "unit_forward_bytes", lambda device: 512)
    units = [r for r in gpu_cases.row_kernels(torch.bfloat16, QUICK) if r.contestant.startswith("unit")]
    assert [r.contestant for r in units] == ["unit forward, triton"]  # which takes rows of any length


@dry_run
def test_kernels_that_are_not_built_are_left_out(monkeypatch):
    monkeypatch.setattr(cuda_extension, "_load", lambda: (None, "it was not built"))
    names = [r.contestant for r in gpu_cases.row_kernels(torch.bfloat16, QUICK)]
    kernels = ("forward", "backward in place", "unit forward")
    assert names == [gpu_cases.COPY, *(f"{kernel}, triton" for kernel in kernels)]


@dry_run
def test_the_linear_path_of_hopper_is_for_hopper(emulated, monkeypatch):
    shape = replace(SHAPE, vocab=257, hidden=16, tokens=2)
    (_, found) = gpu_cases.by_hopper(shape, QUICK)
    assert found.contestant == gpu_cases.HOPPER and found.values["of_product"] > 0
    monkeypatch.setattr(cuda_extension, "capability", lambda device: (8, 0))
    with pytest.raises(gpu_cases.NotHereError, match="needs compute capability 9"):
        gpu_cases.by_hopper(shape, QUICK)


# What computes the wrong thing


def off(function, factor: float):
    """The launcher with a second result that is off."""

    def run(*args, **options):
        first, second = function(*args, **options)
        return first, second * factor

    return run


def make(launcher: str):
    """The call of a launcher, which is checked."""
    if launcher == "linear_forward":
        problem = draw(replace(SHAPE, vocab=257, hidden=16, tokens=2))
        return gpu_cases.linear_problem(problem).hopper()
    rows = problems.RowProblem(8, 257, torch.float32, CPU)
    made = {"row_forward": rows.forward, "row_backward_": rows.backward_, "unit_forward_": rows.unit_forward_}
    return made[launcher]("cuda")


@dry_run
@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize(
    ("module", "launcher"),
    [(cuda_rows, "row_forward"), (cuda_rows, "unit_forward_"), (cuda_hopper, "linear_forward")],
)
def test_a_wrong_launch_is_not_timed(emulated, monkeypatch, module, launcher, factor):
    make(launcher)
    monkeypatch.setattr(module, launcher, off(getattr(module, launcher), factor))
    with pytest.raises(AnotherLossError):
        make(launcher)


@dry_run
@pytest.mark.parametrize("launcher", ["row_backward_", "unit_forward_"])
def test_a_wrong_gradient_of_one_row_is_not_timed(emulated, monkeypatch, launcher):
    right = getattr(cuda_rows, launcher)

    def wrong(logits, *args):
        result = right(logits, *args)
        logits[3] = 0
        return result

    monkeypatch.setattr(cuda_rows, launcher, wrong)
    with pytest.raises(AnotherLossError, match=launcher):
        make(launcher)


@dry_run
def test_a_wrong_loss_of_logits_is_not_timed(emulated, monkeypatch):
    problem, right = problems.LogitsProblem(0, 2, 257, torch.bfloat16, CPU), emulated.cpo_loss
    problem.step("cuda")

    def wrong(**given):
        right(**given)
        grad = (ctypes.c_uint16 * problem.logits.numel()).from_address(given["grad"])
        grad[:] = [0] * len(grad)

    monkeypatch.setattr(emulated, "cpo_loss", wrong)
    with pytest.raises(AnotherLossError, match="cpo_loss, cuda"):
        problem.step("cuda")


# Tuning


@dry_run
def test_tuning_measures_every_kernel_and_leaves_the_table_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "TASKS", list({task.name: task for task in tune.TASKS}.values()))
    before, out = tune.TUNING.table.read_bytes(), tmp_path / "tuning.json"
    assert tune.TUNING.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    assert tune.TUNING.table.read_bytes() == before
    table = json.loads(out.read_text())
    assert set(table["measurements"]) == {"default"}
    measured = {e["kernel"] for e in table["entries"] if "measured" in e}
    assert measured == {task.name for task in tune.TASKS}
    kept = [e for e in json.loads(before)["entries"] if e["arch"] != "default"]
    assert all(entry in table["entries"] for entry in kept)
    lines = out.read_text().splitlines()
    assert sum('"kernel"' in line for line in lines) == len(table["entries"])  # one a line
    with pytest.raises(SystemExit):
        tune.TUNING.main(["--quick", "--device", "cpu"])


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


def tuned(monkeypatch, call, *seconds):
    """The entry of three configurations that take so long."""
    found = iter(seconds)

    def measure(case, device):
        return [replace(r, values={"seconds": next(found)}) if r.values else r for r in right(case, device)]

    right = tune.measure
    monkeypatch.setattr(tune, "measure", measure)
    job = tune.Job(call, 1e9)
    grid = tune.grid(BLOCK=(1, 2, 3))
    task = tune.Task("row_forward", 31, None, torch.float32, grid, lambda vocab, dtype, setting: job)
    return tune.measure_task(task, Setting())


def test_the_fastest_configuration_that_launches_is_the_entry(monkeypatch):
    def call(config):
        if config["BLOCK"] == 1:
            raise RuntimeError("out of resource: shared memory")
        return lambda: None

    entry = tuned(monkeypatch, call, 0.5, 0.25)
    assert entry == {
        "kernel": "row_forward",
        "dtype": "float32",
        "config": {"BLOCK": 3},
        "measured": "4 GB/s at V=31, float32",
    }


def test_nothing_is_adopted_beside_a_wrong_configuration(monkeypatch):
    def call(config):
        if config["BLOCK"] == 2:
            problems.compare("a kernel", torch.ones(1), torch.zeros(1).double() + 2, 1e-3)
        return lambda: None

    with pytest.raises(ContestantError, match=r"BLOCK.*AnotherLossError: a kernel: relative error 0.5"):
        tuned(monkeypatch, call, 1.0, 1.0, 1.0)
