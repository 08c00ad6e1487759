"""`make gpu-check`, as far as it runs without a GPU: parts, time-outs, shards, and the page of bars."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from project import ROOT

pytest.importorskip("triton")

from benchmarks import bars, gpu_check, records, suite
from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.environment import NOTHING_TO_DO
from benchmarks.gpu_check import Outcome, Settings
from benchmarks.records import Part, Record
from benchmarks.shapes import BAR_4K, BAR_8K, BAR_LOSSES, BAR_PEERS, FROZEN

pytestmark = pytest.mark.cpu  # dry runs


@pytest.fixture
def settings(tmp_path):
    return Settings("cpu", tmp_path, limit=60, quick=True, workers=1)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for its parent to ask about it."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and ") Z " not in stat.read_text()


def test_a_command_past_its_limit_is_ended_with_its_children_and_its_output_kept(settings):
    sleep = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{sleep}']).pid, flush=True); {sleep}"
    )
    run = gpu_check.run_command(python(code), settings, limit=5)
    result = gpu_check.outcome("tests", run, [])
    assert (run.status, result.status, result.good, result.tail) == (None, "timed out", False, run.output.strip())
    deadline = time.monotonic() + 20
    while is_running(int(run.output)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("code", "status", "good", "notes"),
    [
        ("print(1)", "passed", True, ["a note"]),
        ("raise SystemExit(3)", "failed", False, ["a note"]),
        ("import os; os.abort()", "failed", False, ["a note", "ended by SIGABRT"]),
        (f"print('needs a package'); raise SystemExit({NOTHING_TO_DO})", "nothing to do", True, ["needs a package"]),
    ],
)
def test_the_status_of_a_part_is_that_of_its_command(settings, code, status, good, notes):
    result = gpu_check.outcome("build", gpu_check.run_command(python(code), settings, 30), ["a note"])
    assert (result.status, result.good, result.notes) == (status, good, notes)
    assert "SIGABRT" not in str(notes) or 'File "<string>", line 1' in result.tail


def test_a_failed_part_does_not_stop_the_others_and_is_named(settings, monkeypatch, capsys):
    parts = {
        "build": lambda _: Outcome("build", "passed"),
        "tests-1": lambda _: gpu_check.outcome("tests-1", gpu_check.Run(1, "the end of the output"), ["1 failed"]),
        "bench": lambda _: gpu_check.outcome("bench", gpu_check.run_command(["/no/such/program"], settings, 5), []),
        "tune": lambda _: Outcome("tune", "nothing to do", notes=["a reason"]),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    status = gpu_check.main(["--parts", *parts, "--out", str(settings.out), "--device", "cpu"])
    assert status == 1 and "failed: tests-1, bench" in capsys.readouterr().out
    content = json.loads((settings.out / "gpu-check.json").read_text())
    assert [part["status"] for part in content["parts"]] == ["passed", "failed", "failed", "nothing to do"]
    page = (settings.out / "gpu-check.md").read_text()
    assert "the end of the output" in page and "/no/such/program" in page and "dry run" in page


def test_without_a_built_extension_the_build_comes_first(settings, monkeypatch):
    names = []
    parts = {n: lambda _, n=n: names.append(n) or Outcome(n, "passed") for n in ("build", "tune")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "extension", lambda name: None)
    gpu_check.run_parts(["tune"], settings, [])
    assert names == ["build", "tune"]


def test_parts_are_run_in_the_order_of_what_they_tell_and_none_twice():
    assert gpu_check.expand(["tests-2", "tests", "tests-2"]) == ["tests-2", "tests-1", "tests-3"]
    everything = gpu_check.expand(n for n in gpu_check.NAMES if n not in gpu_check.GROUPS)
    assert everything == list(gpu_check.PARTS)
    assert everything[:3] == ["build", "tests-1", "bench"] and everything[-2:] == ["tests-2", "tests-3"]
    assert {f"suite-{name}" for name in suite.PARTS} - set(everything) == {"suite-gpu", "suite-cuda"}


def test_a_later_run_keeps_the_parts_of_an_earlier_one_with_the_same_code(settings, monkeypatch):
    outcomes = {"build": "passed", "bench": "passed", "tune": "failed"}
    monkeypatch.setattr(gpu_check, "PARTS", {n: lambda _, n=n: Outcome(n, outcomes[n]) for n in outcomes})
    gpu_check.run_parts(["build", "tune", "bench"], settings, [])
    outcomes["tune"] = "passed"
    assert [result.part for result in gpu_check.run_parts(["tune"], settings, [])] == ["tune"]
    content = json.loads((settings.out / "gpu-check.json").read_text())
    assert [(p["part"], p["status"]) for p in content["parts"]] == [(n, "passed") for n in ("build", "bench", "tune")]
    monkeypatch.setattr(gpu_check.environment, "sources", lambda: "other code")
    gpu_check.run_parts(["tune"], settings, [])
    content = json.loads((settings.out / "gpu-check.json").read_text())
    assert [part["part"] for part in content["parts"]] == ["tune"]


@pytest.mark.parametrize("part", ["sanitizer", "bench-cuda"])
def test_without_cuda_kernels_there_is_nothing_to_do(settings, monkeypatch, part):
    monkeypatch.setattr(gpu_check, "extension", lambda name: None)
    result = gpu_check.PARTS[part](settings)
    assert (result.part, result.status, result.notes) == (part, "nothing to do", [gpu_check.NO_KERNELS])


@pytest.mark.parametrize(("status", "verdict"), [(0, "clean"), (gpu_check.FOUND, "found errors"), (1, "did not run")])
def test_what_the_sanitizer_finds_fails_the_part(settings, monkeypatch, tmp_path, status, verdict):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "extension", lambda name: Path(name))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tool))
    result = gpu_check.sanitizer(replace(settings, device="cuda"))
    assert result.notes == [f"{name}: {verdict}" for name in gpu_check.TOOLS] and result.good == (status == 0)


def test_every_test_file_is_in_one_shard_and_those_for_a_gpu_are_the_first():
    shards = gpu_check.shards()
    files = [file for shard in shards for file in shard]
    assert sorted(files) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py"))
    for number, shard in enumerate(shards):
        first = [any(Path(file).match(pattern) for pattern in gpu_check.FIRST_TESTS) for file in shard]
        assert set(first) == {number == 0}
    sizes = [sum((ROOT / file).stat().st_size for file in shard) for shard in shards[1:]]
    assert "device" in shards[0][0] and max(sizes) < 1.1 * min(sizes)
    assert all((ROOT / "tests" / name).exists() for name in gpu_check.QUICK_TESTS)


def test_counts_come_from_output_that_may_be_cut_short():
    output = """\
[gw0] [ 12%] PASSED tests/test_a.py::test_one[x y]
tests/test_a.py::test_two
[gw1] [ 25%] FAILED tests/test_a.py::test_two
tests/test_b.py::test_three PASSED                [ 40%]
[gw1] [ 50%] SKIPPED tests/test_a.py::test_four
SKIPPED [2] tests/test_b.py:9: needs a second GPU
FAILED tests/test_a.py::test_two - AssertionError
"""
    skipped = "skipped 2: tests/test_b.py:9: needs a second GPU"
    assert gpu_check.count_tests(output) == ["2 passed, 1 failed, 0 error, 1 skipped", skipped]


def test_a_part_of_the_suite_that_is_ended_keeps_its_records(settings, monkeypatch):
    """The time-out of a part comes in the midst of a case."""

    class Ended(BaseException):
        """What no part may catch."""

    class Endless:
        @staticmethod
        def run(setting):
            yield Record("c", "a", {"seconds": 1.0})
            raise Ended

    monkeypatch.setattr(suite, "import_module", lambda name: Endless)
    with pytest.raises(Ended):
        suite.main(["gpu", "--out", str(settings.out), "--quick"])
    part = records.load(settings.out / "gpu.json")["gpu"]
    assert [r.contestant for r in part.records] == ["a"] and part.error == "ended from outside"


def test_a_part_of_the_suite_whose_package_is_not_installed_says_so(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

    monkeypatch.setattr(suite, "import_module", missing)
    absent = "trl"
    assert suite.main(["steps", "--out", str(tmp_path)]) == NOTHING_TO_DO
    assert capsys.readouterr().err.splitlines()[-1] == "steps needs trl, which is not installed"
    absent = "benchmarks.gone"
    with pytest.raises(ModuleNotFoundError):
        suite.main(["steps", "--out", str(tmp_path)])


# The page

ENVIRONMENT = {"commit": "c", "sources": "s", "device": "d", "gpu": {"name": "g"}, "python": "p", "versions": {}}


def part(name: str, *found: Record, **environment: object) -> records.Parts:
    return {name: Part(name, ENVIRONMENT | environment, list(found))}


def losses(factor: float) -> list[Record]:
    """Records of ours at so many times the bars of loss and memory."""
    gib = {shape: 1.0 if shape.mode == FROZEN else 2.1 for shape in BAR_LOSSES}
    values = {s: {"seconds": 1.0, "floor": 1.05 * factor, "peak_mib": 1024 * gib[s] * factor} for s in BAR_LOSSES}
    values[BAR_4K] = {"seconds": 0.017 * factor, "floor": 1.04 * factor}
    return [Record(shape.name, OURS, own) for shape, own in values.items()]


ROWS = "row kernels, bfloat16, V=32000"
# Of each row of the contract that a GPU has shapes of its own for: records that meet its bars and that miss them.
ON_GPU = {
    "losses": (bars.gpu_losses, "gpu", losses(0.999), losses(1.001)),
    "kept": (
        bars.gpu_losses,
        "cuda",
        [Record("x, kept", "a", {"floor": 1.2}), Record("x, kept", "b", {"floor": 1.05})],
        [Record("x, kept", "a", {"floor": 1.06})],
    ),
    "logits": (
        bars.gpu_losses,
        "cuda",
        [Record("loss of logits, V=9", "cpo-kernels cuda", {"of_copy": 1.1})],
        [Record("loss of logits, V=9", "cpo-kernels cuda", {"of_copy": 1.11})],
    ),
    "peers": (
        bars.gpu_peers,
        "gpu",
        [Record(s.name, "eager", {"of_ours": 1.01}) for s in BAR_PEERS],
        [Record(s.name, "eager", {"of_ours": 0.99}) for s in BAR_PEERS],
    ),
    "rows": (
        bars.gpu_rows,
        "gpu",
        [Record(ROWS, "forward, triton", {"of_gbs": 0.9})],
        [Record(ROWS, "forward, triton", {"of_gbs": 0.89})],
    ),
    "rows by CUDA": (
        bars.gpu_rows,
        "cuda",
        [Record(ROWS, "forward, cuda", {"of_gbs": 0.9, "of_triton": 1.0}, {"picked": True})],
        [Record(ROWS, "forward, cuda", {"of_gbs": 0.8, "of_triton": 0.9}, {"picked": True})],
    ),
    "peaks": (
        bars.gpu_peaks,
        "gpu",
        [Record("peak", OURS, {"of_plan": 1.02, "of_budget": 0.5})],
        [Record("peak", OURS, {"of_plan": 1.03, "of_budget": 1.021})],
    ),
    "no_grad": (
        bars.gpu_no_grad,
        "gpu",
        [Record(f"no_grad, {BAR_8K.name}", OURS, {"of_product": 1.03})],
        [Record(f"no_grad, {BAR_8K.name}", OURS, {"of_product": 1.04})],
    ),
    "Hopper": (
        bars.gpu_no_grad,
        "cuda",
        [Record("no_grad, x", "fused linear, cuda", {"of_product": 1.03})],
        [Record("no_grad, x", "fused linear, cuda", {"of_product": 1.04})],
    ),
    "accuracy": (
        bars.gpu_accuracy,
        "gpu",
        [Record("logps", OURS_FP32_LOGITS, {"nats_largest": 2e-3})],
        [Record("logps", OURS_FP32_LOGITS, {"nats_largest": 2.1e-3})],
    ),
}


@pytest.mark.parametrize("name", ON_GPU)
def test_a_bar_of_a_gpu_is_met_or_missed_by_what_was_measured(name):
    row, of, met, missed = ON_GPU[name]
    for found, verdict in ((met, True), (missed, False)):
        told = [bar.met for bar in row(part(of, *found)) if bar.met is not None]
        assert told and set(told) == {verdict}
    counts = {"losses": 10, "peers": 2, "rows by CUDA": 2, "peaks": 2}
    assert len(told) == counts.get(name, 1)


def test_the_page_says_of_every_bar_whether_it_was_met_missed_or_not_measured(tmp_path):
    measured = part("gpu", *losses(0.5)[:1], Record(ROWS, "forward, triton", {"of_gbs": 0.5}))
    found = [Record("k", "truncation 1", {"of_base": 1.02}), Record("k", "autoregressive 1", {"of_mle": 3.5})]
    measured |= part("negatives", *found)
    for name, own in measured.items():
        records.save({name: own}, tmp_path / f"{name}.json")
    told = gpu_check.decided(tmp_path, ENVIRONMENT)
    assert [sum(bar.met is verdict for bar in told) for verdict in (True, False)] == [3, 2]
    lacking = [bar.what for bar in told if bar.met is None]
    for shape in BAR_LOSSES[1:]:
        assert any(shape.name in what for what in lacking)
    for row in (bars.natural_lengths, bars.filters, bars.sharing, bars.steps):
        assert next(iter(row({}))).what in lacking
    page = gpu_check.page([Outcome("bench", "timed out", 450.0, ["gpu.json"], "the end")], told, ENVIRONMENT)
    assert page.index("3 met, 2 missed") < page.index(BAR_4K.name) < page.index("timed out") < page.index("the end")
    assert "dry run" not in page


def test_bars_of_other_code_or_another_device_are_not_measured(tmp_path):
    records.save(part("gpu", *losses(0.5), sources="t"), tmp_path / "gpu.json")
    records.save(part("negatives", Record("k", "truncation 1", {"of_base": 1}), gpu={}), tmp_path / "negatives.json")
    told = gpu_check.decided(tmp_path, ENVIRONMENT)
    assert {bar.met for bar in told} == {None} and len(told) >= len(bars.LOSS_BARS) + len(bars.BARS) - 1
