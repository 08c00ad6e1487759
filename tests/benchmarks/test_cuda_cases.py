"""The benchmark of the compiled CUDA kernels, as far as it runs on the CPU: dry runs with emulated kernels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_bench
from benchmarks.contestants import FLOOR, Contestant, contestant, floor
from benchmarks.gpu_cases import Setting, WrongResultError
from benchmarks.kernels import calls as kernel_calls
from benchmarks.kernels import cuda_cases
from benchmarks.kernels.cuda_cases import LLAMA3, OURS_CUDA, OURS_KEPT, OURS_ONE_PASS, OURS_TRITON, sized
from benchmarks.measure import AnotherLossError, ContestantError
from benchmarks.peers import ours
from benchmarks.problem import draw
from cpo_kernels.kernels import selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice

pytestmark = [pytest.mark.cpu, pytest.mark.interpreter]  # on a GPU, gpu-check runs the benchmark itself
CPU = torch.device("cpu")
SETTING = Setting(CPU, quick=True)


@pytest.fixture
def gpu(emulated_cuda, emulator, monkeypatch):
    """The emulated kernels, with the versions that a description of the run names."""
    for name in ("driver_version", "runtime_version"):
        monkeypatch.setattr(emulator, name, lambda: 13000, raising=False)
    return emulator


def figures_of(name: str, setting: Setting = SETTING) -> dict[tuple[str, str], cuda_cases.Figure]:
    found = list(cuda_cases.CASES[name](setting))
    by_name = {(figure.name, figure.unit): figure for figure in found}
    assert len(by_name) == len(found)  # none hides another
    return by_name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_row_kernels_are_held_against_a_copy_and_triton(gpu, dtype):
    figures = figures_of(f"row kernels {dtype}")
    names = ["row forward, cuda", "row backward in place, cuda", "row_gradient_, cuda"]
    names += ["row backward, bf16 over fp32, cuda"] if dtype == "fp32" else []
    for name in names:
        of_copy, of_triton = (figures[f"{name}, {dtype}, V=257", unit] for unit in ("of copy", "x Triton"))
        assert (of_copy.bar, of_copy.at_least, of_triton.bar) == (0.9, True, None)
        assert of_copy.value > 0 and of_triton.value > 0
    assert len(figures) == 2 * len(names)


def test_a_kernel_that_the_table_picks_must_not_be_slower(gpu):
    with selection.overridden(Choice("row_backward", "default", "cuda", dtype="bfloat16")):
        figures = figures_of("row kernels bf16")
    bars = {name: figure.bar for (name, unit), figure in figures.items() if unit == "x Triton"}
    assert bars["row backward in place, cuda, bf16, V=257"] == 1.0
    assert bars["row forward, cuda, bf16, V=257"] is None


def test_rows_that_do_not_fit_have_a_figure_that_says_so(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "row_gradient_bytes", lambda device: 512)
    figures = figures_of("row kernels bf16")
    missing = figures["row_gradient_, cuda, bf16, V=257", "of copy"]
    assert missing.value != missing.value and "does not fit" in missing.detail


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_loss_of_logits_is_held_against_a_copy(gpu, dtype):
    figures = figures_of(f"loss of logits {dtype}")
    where = f"{dtype}, V=257"
    for name in (OURS_CUDA, f"{OURS_CUDA}, the launch alone", OURS_TRITON):
        large, small = (figures[f"cpo_loss of logits, {name}, {where}{end}", "x copy"] for end in ("", ", in L2"))
        assert large.bar == (1.1 if name == OURS_CUDA else None) and small.bar is None
        assert "1.5" in large.detail and "L2 keeps" in small.detail


def test_contrasts_have_a_time_for_each_backend_and_size(gpu):
    sizes = [(32, 2), (32, 8), (4, 64)]
    expected = {(f"contrast, {b}, G={g}, C={c}, T=3", "us") for b in ("cuda", "triton") for g, c in sizes}
    assert set(figures_of("contrast")) == expected


def counted(monkeypatch, gpu, *names: str) -> dict[str, int]:
    """Launches of some kernels from here on."""
    counts = dict.fromkeys(names, 0)

    def counting(name, launch):
        def run(**arguments):
            counts[name] += 1
            return launch(**arguments)

        return run

    for name in names:
        monkeypatch.setattr(gpu, name, counting(name, getattr(gpu, name)))
    return counts


def test_the_likelihood_is_measured_in_two_reads_and_in_one(gpu, monkeypatch):
    counts = counted(monkeypatch, gpu, "row_forward", "row_gradient")
    figures = figures_of("likelihood")
    for name in (FLOOR, OURS_CUDA, OURS_ONE_PASS, OURS_TRITON):
        assert figures[f"{name}, llama3 8k bf16, likelihood", "x floor"].value > 0
    assert counts["row_forward"] == counts["row_gradient"] > 0  # as often


def test_the_loss_is_measured_by_both_backends_with_errors_and_peaks(gpu):
    figures = figures_of("loss")
    for name in (OURS_CUDA, OURS_TRITON, cuda_cases.OURS_FP32):
        figure = figures[f"{name}, llama3 8k bf16", "x floor"]
        assert "error" in figure.detail and "peak" in figure.detail
    assert (f"{OURS_CUDA}, qwen 8k bf16", "x floor") in figures
    assert all(figure.bar is None for figure in figures.values())


def test_the_bar_is_for_the_faster_way_with_and_without_exponentials(gpu, monkeypatch):
    counts = counted(monkeypatch, gpu, "row_forward", "linear_backward")
    figures = figures_of("loss, kept")
    assert counts["row_forward"] == counts["linear_backward"] > 0
    for shape in ("llama3 8k bf16", "qwen 8k bf16"):
        plain, kept = (figures[f"{name}, {shape}", "x floor"] for name in (OURS_CUDA, OURS_KEPT))
        best = figures[f"the fastest by the CUDA kernels, {shape}", "x floor"]
        assert (best.value, best.bar) == (min(plain.value, kept.value), 1.05)
        assert best.detail in (OURS_CUDA, OURS_KEPT)


def test_log_likelihoods_are_held_against_one_product(gpu):
    figures = figures_of("no_grad")
    for shape in ("llama3 8k bf16", "llama3 8k bf16, H=1024"):
        ways = ("torch.mm", "torch.mm and row kernel, cuda", "fused linear, triton", "fused linear, cuda")
        bars = [figures[f"no_grad, {way}, {shape}", "x one product"].bar for way in ways]
        assert bars == [None, None, None, 1.03]


def test_without_hopper_the_other_ways_are_measured(gpu, monkeypatch):
    monkeypatch.setattr(cuda_extension, "capability", lambda device: (8, 0))
    kept, logps = figures_of("loss, kept"), figures_of("no_grad")
    missing = [kept[f"{OURS_KEPT}, llama3 8k bf16", "x floor"]]
    missing.append(logps["no_grad, fused linear, cuda, llama3 8k bf16", "x one product"])
    for figure in missing:
        assert figure.value != figure.value and "needs compute capability 9.0, cpu has (8, 0)" in figure.detail
    assert kept["the fastest by the CUDA kernels, llama3 8k bf16", "x floor"].detail == OURS_CUDA


def test_without_kernels_every_case_says_why(monkeypatch):
    monkeypatch.setattr(cuda_extension, "_load", lambda: (None, "it was not built"))
    for name in cuda_cases.CASES:
        (figure,) = cuda_cases.CASES[name](SETTING)
        assert figure.value != figure.value and figure.detail == "it was not built"


def test_the_suite_has_files_of_its_own(gpu, tmp_path):
    cases = ["contrast", "no_grad"]
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--suite", "cuda", "--cases", *cases]
    assert gpu_bench.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bench-cuda.json", "bench-cuda.md"}
    content = json.loads((tmp_path / "bench-cuda.json").read_text())
    assert [case["name"] for case in content["cases"]] == cases
    assert all(f["name"] in (tmp_path / "bench-cuda.md").read_text() for c in content["cases"] for f in c["figures"])


def test_cases_are_those_of_the_suite(capsys):
    with pytest.raises(SystemExit):
        gpu_bench.main(["--suite", "cuda", "--cases", "ceilings"])
    assert "no such cases: ['ceilings']" in capsys.readouterr().err


# What computes the wrong thing


def off(function, factor: float):
    """The launcher with a second result that is off."""

    def run(*args, **options):
        first, second = function(*args, **options)
        return first, second * factor

    return run


@pytest.mark.parametrize(
    ("module", "launcher", "case", "message"),
    [
        (cuda_rows, "row_forward", "row kernels bf16", "cuda row_forward"),
        (cuda_rows, "row_gradient_", "row kernels fp32", "row_gradient_, log-probabilities"),
        (cuda_hopper, "linear_forward", "no_grad", "fused linear, cuda"),
    ],
)
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_launch_is_not_timed(gpu, monkeypatch, module, launcher, case, message, factor):
    wrong = off(getattr(module, launcher), factor)
    monkeypatch.setattr(module, launcher, wrong)
    with pytest.raises(WrongResultError, match=message):
        list(cuda_cases.CASES[case](SETTING))


@pytest.mark.parametrize(
    ("launcher", "make"),
    [("row_backward_", lambda rows: rows.backward_("cuda")), ("row_gradient_", lambda r: r.gradient_())],
)
def test_a_wrong_gradient_of_one_row_is_not_timed(gpu, monkeypatch, launcher, make):
    right = getattr(cuda_rows, launcher)

    def wrong(logits, *args):
        result = right(logits, *args)
        logits[3] = 0
        return result

    monkeypatch.setattr(cuda_rows, launcher, wrong)
    with pytest.raises(WrongResultError, match=launcher):
        make(kernel_calls.RowProblem(8, 257, torch.float32, CPU))


def test_a_wrong_loss_of_logits_is_not_timed(gpu, monkeypatch):
    right = cuda_groups.cpo_loss

    def wrong(logits, targets, grad, *args, **options):
        result = right(logits, targets, grad, *args, **options)
        grad *= 1.05
        return result

    monkeypatch.setattr(cuda_groups, "cpo_loss", wrong)
    with pytest.raises(WrongResultError, match="one launch"):
        kernel_calls.LogitsProblem(0, 2, 257, torch.bfloat16, CPU).launch()


def test_a_wrong_contrast_is_not_timed(gpu, emulated_cuda, monkeypatch):
    wrong = replace(emulated_cuda, contrast=off(emulated_cuda.contrast, 1.01))
    monkeypatch.setitem(kernel_calls.BACKENDS, "cuda", wrong)
    with pytest.raises(WrongResultError, match="cuda contrast"):
        list(cuda_cases.CASES["contrast"](SETTING))


def test_a_way_that_is_wrong_or_fails_is_raised_after_the_figures_of_the_others(gpu):
    good = ours("good", backend="cuda")

    def failing(*tensors):
        raise torch.OutOfMemoryError("tried to allocate too much\nand more lines")

    wrong = replace(good, name="wrong", loss=lambda *tensors: 2 * good.loss(*tensors))
    peers = [wrong, good, replace(good, name="failing", loss=failing)]
    with pytest.raises(ContestantError, match="failing failed with OutOfMemoryError: tried to allocate too much"):
        list(cuda_cases.loss(SETTING, LLAMA3, peers))
    figures = []
    with pytest.raises(AnotherLossError, match="wrong"):
        for figure in cuda_cases.loss(SETTING, LLAMA3, peers[:2]):
            figures.append(figure.name)
    assert figures == [f"{FLOOR}, llama3 8k bf16", "good, llama3 8k bf16"]


def test_a_reference_that_fails_ends_the_turns(gpu):
    problem = draw(sized(LLAMA3, SETTING))
    entries = [floor(problem, None), contestant(ours("good", backend="cuda"), problem)]
    broken: list[Contestant] = [replace(entries[0], call=lambda: 1 / 0), entries[1]]
    with pytest.raises(ContestantError, match="ZeroDivisionError"):
        kernel_calls.time_entries(SETTING, problem, broken, FLOOR)
