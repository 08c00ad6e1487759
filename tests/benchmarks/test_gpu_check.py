"""`make gpu-check`, its benchmarks and its tuning, as far as they run without a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from project import ROOT

pytest.importorskip("triton")

from benchmarks import bars, contestants, gpu_bench, gpu_cases, gpu_check, records, suite
from benchmarks.contestants import FLOOR, OURS, OURS_DPO
from benchmarks.environment import NOTHING_TO_DO
from benchmarks.gpu_cases import Figure, Setting
from benchmarks.gpu_check import Outcome, Settings
from benchmarks.kernels import tune
from benchmarks.measure import CaseResult, ContestantError, Row
from benchmarks.peers import BUILDERS, Peer
from benchmarks.records import Part, Record
from benchmarks.timing import Timing

pytestmark = pytest.mark.cpu  # dry runs
CPU = torch.device("cpu")
FOREVER = float("inf")
dry_run = pytest.mark.interpreter  # on a GPU, gpu-check runs the benchmarks themselves


@pytest.fixture
def settings(tmp_path):
    return Settings("cpu", tmp_path, limit=60, quick=True, workers=1)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# The parts


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for its parent to ask about it."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_command_past_its_limit_is_ended_and_its_output_kept(settings):
    code = "import time; print('started', flush=True); time.sleep(60)"
    run = gpu_check.run_command(python(code), settings, limit=5)
    assert run.status is None
    assert run.output == "started\n"
    result = gpu_check.outcome("tests", run, [])
    assert (result.status, result.good, result.tail) == ("timed out", False, "started")


def test_children_of_a_command_end_with_it(settings):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    wait = "; sys.stdout.flush(); import time; time.sleep(60)"
    run = gpu_check.run_command(python(code + wait), settings, limit=5)
    assert run.status is None
    deadline = time.monotonic() + 20
    while is_running(int(run.output)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("code", "status"), [("print(1)", "passed"), ("raise SystemExit(3)", "failed")])
def test_the_status_of_a_part_is_that_of_its_command(settings, code, status):
    result = gpu_check.outcome("build", gpu_check.run_command(python(code), settings, 30), ["a note"])
    assert (result.status, result.notes) == (status, ["a note"])
    assert result.good == (status == "passed")


def test_a_command_that_crashes_says_how_and_where(settings):
    run = gpu_check.run_command(python("import os; os.abort()"), settings, 30)
    result = gpu_check.outcome("bench", run, ["a note"])
    assert (result.status, result.notes) == ("failed", ["a note", "ended by SIGABRT"])
    assert 'File "<string>", line 1' in result.tail


def test_a_failed_part_does_not_stop_the_others_and_is_named(settings, monkeypatch, capsys):
    parts = {
        "build": lambda _: Outcome("build", "passed"),
        "tests-1": lambda _: gpu_check.outcome("tests-1", gpu_check.Run(1, "the end of the output"), ["1 failed"]),
        "bench": lambda _: gpu_check.outcome("bench", gpu_check.run_command(["/no/such/program"], settings, 5), []),
        "tune": lambda _: Outcome("tune", "nothing to do", notes=["a reason"]),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    status = gpu_check.main(["--parts", *parts, "--out", str(settings.out), "--device", "cpu"])
    assert status == 1
    assert "failed: tests-1, bench" in capsys.readouterr().out
    content = json.loads((settings.out / "gpu-check.json").read_text())
    assert [part["status"] for part in content["parts"]] == ["passed", "failed", "failed", "nothing to do"]
    assert content["environment"]["commit"]
    page = (settings.out / "gpu-check.md").read_text()
    assert "the end of the output" in page
    assert "/no/such/program" in page


def test_without_a_built_extension_the_build_comes_first(settings, monkeypatch):
    names = []
    parts = {n: lambda _, n=n: names.append(n) or Outcome(n, "passed") for n in ("build", "tune")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "extension", lambda name: None)
    gpu_check.run_parts(["tune"], settings, [])
    assert names == ["build", "tune"]


def test_tests_stand_for_every_shard_and_no_part_runs_twice():
    assert gpu_check.expand(["build", "tests"]) == ["build", "tests-1", "tests-2", "tests-3"]
    assert gpu_check.expand(["tests-2", "tests", "tests-2"]) == ["tests-2", "tests-1", "tests-3"]
    assert sorted(gpu_check.expand(["suite"])) == sorted(f"suite-{name}" for name in suite.PARTS)
    assert gpu_check.expand(n for n in gpu_check.NAMES if n not in gpu_check.GROUPS) == list(gpu_check.PARTS)


def test_what_only_a_gpu_can_tell_comes_before_what_a_cpu_has_tested():
    names = list(gpu_check.PARTS)
    assert names[:3] == ["build", "tests-1", "bench"]
    assert names[-2:] == ["tests-2", "tests-3"]
    measured = [name for name in names if name in gpu_check.SUITE]
    decide = [f"suite-{name}" for name in ("heads", "lengths", "filters", "negatives", "sharing", "steps", "wide")]
    assert measured[: len(decide)] == decide


def test_a_later_run_keeps_the_parts_of_an_earlier_one(settings, monkeypatch):
    outcomes = {"build": "passed", "bench": "passed", "tune": "failed"}
    parts = {n: lambda _, n=n: Outcome(n, outcomes[n]) for n in outcomes}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    gpu_check.run_parts(["build", "tune", "bench"], settings, [])
    outcomes["tune"] = "passed"
    assert [result.part for result in gpu_check.run_parts(["tune"], settings, [])] == ["tune"]
    content = json.loads((settings.out / "gpu-check.json").read_text())
    assert [(p["part"], p["status"]) for p in content["parts"]] == [(n, "passed") for n in ("build", "bench", "tune")]
    monkeypatch.setattr(gpu_check.environment, "sources", lambda: "other code")
    gpu_check.run_parts(["tune"], settings, [])
    content = json.loads((settings.out / "gpu-check.json").read_text())
    assert [part["part"] for part in content["parts"]] == ["tune"]


def test_parts_share_what_they_compile_unless_told_otherwise(settings, monkeypatch):
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    folders = [Path(settings.environment()[name]) for name in names]
    assert [folder.parent for folder in folders] == [ROOT / "build" / "gpu-check"] * 2
    monkeypatch.setenv(names[0], "elsewhere")
    assert settings.environment()[names[0]] == "elsewhere"


def test_the_sanitizer_says_that_there_are_no_cuda_kernels(settings, monkeypatch):
    monkeypatch.setattr(gpu_check, "extension", lambda name: None)
    result = gpu_check.sanitizer(settings)
    assert result.status == "nothing to do"
    assert "no CUDA kernels in this build" in result.notes[0]


def test_the_benchmark_of_cuda_kernels_says_that_there_are_none(settings, monkeypatch):
    monkeypatch.setattr(gpu_check, "extension", lambda name: None)
    result = gpu_check.bench_cuda(settings)
    assert (result.part, result.status, result.notes) == ("bench-cuda", "nothing to do", [gpu_check.NO_KERNELS])


@pytest.mark.parametrize(
    ("part", "module", "out", "options"),
    [
        ("bench", "gpu_bench", "", []),
        ("bench-cuda", "gpu_bench", "", ["--suite", "cuda"]),
        ("tune", "tune", "tuning.json", []),
        ("choose", "choose", "selection.json", []),
    ],
)
def test_measurements_end_before_their_limit_and_leave_the_package_alone(
    settings, monkeypatch, part, module, out, options
):
    commands = []
    monkeypatch.setattr(gpu_check, "extension", lambda name: Path(name))
    monkeypatch.setattr(gpu_check, "run_command", lambda command, *_: commands.append(command) or gpu_check.Run(0, ""))
    result = gpu_check.PARTS[part](settings)
    assert (result.part, result.status) == (part, "passed")
    where = ["--out", str(settings.out / out), "--device", "cpu"]
    expected = ["-m", f"benchmarks.{module}", *where, *options, "--seconds", str(settings.limit - 20), "--quick"]
    assert commands == [[sys.executable, *expected]]


@pytest.mark.parametrize(("status", "verdict"), [(0, "clean"), (gpu_check.FOUND, "found errors"), (1, "did not run")])
def test_what_the_sanitizer_finds_fails_the_part(settings, monkeypatch, tmp_path, status, verdict):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "extension", lambda name: Path(name))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tool))
    assert gpu_check.sanitizer(settings).notes == [gpu_check.NO_GPU]
    result = gpu_check.sanitizer(dataclasses.replace(settings, device="cuda"))
    assert result.notes == [f"{name}: {verdict}" for name in gpu_check.TOOLS]
    assert result.good == (status == 0)


def test_every_test_file_is_in_one_shard_and_those_for_a_gpu_are_the_first():
    shards = gpu_check.shards()
    files = [file for shard in shards for file in shard]
    assert len(shards) == gpu_check.SHARDS
    assert sorted(files) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py"))
    for number, shard in enumerate(shards):
        first = [any(Path(file).match(pattern) for pattern in gpu_check.FIRST_TESTS) for file in shard]
        assert set(first) == {number == 0}
    assert "device" in shards[0][0]


def test_the_other_shards_take_about_as_long_and_name_files_that_exist():
    seconds = [sum(map(gpu_check.seconds_of, shard)) for shard in gpu_check.shards()[1:]]
    assert max(seconds) < 1.1 * min(seconds)
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert gpu_check.SLOW_TESTS.keys() <= there
    assert all((ROOT / "tests" / name).exists() for name in gpu_check.QUICK_TESTS)
    assert len(gpu_check.QUICK_TESTS) == gpu_check.SHARDS


@pytest.mark.parametrize("shard", range(1, gpu_check.SHARDS + 1))
def test_a_shard_runs_its_files_and_writes_its_own_report(settings, monkeypatch, shard):
    commands = []
    monkeypatch.setattr(gpu_check, "run_command", lambda command, *_: commands.append(command) or gpu_check.Run(0, ""))
    full = dataclasses.replace(settings, quick=False)
    result = gpu_check.PARTS[f"tests-{shard}"](full)
    assert (result.part, result.status) == (f"tests-{shard}", "passed")
    files = gpu_check.shards()[shard - 1]
    assert commands[0][-len(files) :] == files
    assert f"--junitxml={settings.out}/tests-{shard}.xml" in commands[0]


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
    assert gpu_check.count_tests(output) == [
        "2 passed, 1 failed, 0 error, 1 skipped",
        "skipped 2: tests/test_b.py:9: needs a second GPU",
    ]


# The page


ENVIRONMENT = {"commit": "c", "sources": "s", "device": "d", "gpu": {"name": "g"}, "python": "p", "versions": {}}


def bench_results(folder: Path, figures: dict[str, list[Figure]], environment: dict[str, object]) -> None:
    suite = gpu_bench.SUITES["triton"]
    cases = [gpu_bench.Case(name, figures=found) for name, found in figures.items()]
    gpu_bench.write(suite, cases, environment, folder)


def verdicts(folder: Path) -> dict[str, bool | None]:
    return {bar.what: bar.met for bar in gpu_check.decided(folder, ENVIRONMENT)}


def test_the_page_says_of_every_bar_whether_it_was_met_missed_or_not_measured(tmp_path):
    loss = [
        Figure("ours, 8k", 1.04, "x floor", 1.05),
        Figure("ours, 4k", 1.041, "x floor", 1.04),
        Figure("peer", 2.0, "x floor"),
    ]
    rows = [Figure("row forward", float("nan"), "of copy", 0.9, at_least=True)]
    bench_results(tmp_path, {"loss": loss, "row kernels bf16": rows}, ENVIRONMENT)
    step = {"truncation 1": {"of_base": 1.02}, "autoregressive 1": {"of_mle": 3.5}}
    found = [Record("kinds", name, values) for name, values in step.items()]
    records.save({"negatives": Part("negatives", ENVIRONMENT, found)}, tmp_path / "negatives.json")
    said = verdicts(tmp_path)
    assert (said["ours, 8k"], said["ours, 4k"], said["row forward"]) == (True, False, False)
    assert "peer" not in said
    (cut,) = (met for what, met in said.items() if "truncation" in what)
    (written,) = (met for what, met in said.items() if "autoregressive" in what)
    assert (cut, written) == (True, False)
    for of in (bars.sharing, bars.natural_lengths, bars.steps):
        (bar,) = of({})
        assert said[bar.what] is None
    lacking = {(f"{name}, {unit}") for name, unit in gpu_cases.LOSS_BARS}
    assert lacking <= said.keys() and not any(said[name] for name in lacking)
    outcomes = [Outcome("bench", "timed out", 450.0, ["bench.md"], "the end of the output")]
    page = gpu_check.page(outcomes, gpu_check.decided(tmp_path, ENVIRONMENT), ENVIRONMENT)
    assert page.index("2 met, 3 missed") < page.index("ours, 4k") < page.index("timed out") < page.index("the end of")
    assert "dry run" not in page


def test_bars_of_other_code_or_another_device_are_not_measured(tmp_path):
    bench_results(tmp_path, {"loss": [Figure("ours, 8k", 1.04, "x floor", 1.05)]}, ENVIRONMENT | {"sources": "t"})
    other = Part("negatives", ENVIRONMENT | {"gpu": {"name": "h"}}, [Record("k", "truncation 1", {"of_base": 1.0})])
    records.save({"negatives": other}, tmp_path / "negatives.json")
    said = verdicts(tmp_path)
    assert set(said.values()) == {None}
    assert len(said) == len(gpu_cases.LOSS_BARS) + len(bars.BARS) - 1


def test_figures_come_back_from_their_file(tmp_path):
    figures = [Figure("a", 1.0, "s", 2.0, detail="d"), Figure("b", float("nan"), "of copy", at_least=True)]
    bench_results(tmp_path, {"loss": figures}, ENVIRONMENT)
    found, environment = gpu_bench.load(tmp_path / "bench.json")
    assert environment == ENVIRONMENT
    assert [repr(figure) for figure in found["loss"]] == [repr(figure) for figure in figures]
    assert gpu_bench.load(tmp_path / "nothing.json") == ({}, {})


def test_a_part_that_lacks_something_has_nothing_to_do(settings):
    code = f"print('working'); print('it needs a package'); raise SystemExit({NOTHING_TO_DO})"
    result = gpu_check.outcome("steps", gpu_check.run_command(python(code), settings, 30), ["results: steps.json"])
    assert (result.status, result.good, result.notes) == ("nothing to do", True, ["it needs a package"])


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


# The benchmarks


def test_verdicts():
    assert Figure("a", 0.9, "of copy", 0.85, at_least=True).verdict == "met"
    assert Figure("a", 0.8, "of copy", 0.85, at_least=True).verdict == "missed"
    assert Figure("a", 1.1, "x floor", 1.12).verdict == "met"
    assert Figure("a", float("nan"), "x floor", 1.12).verdict == "missed"
    assert Figure("a", 1.1, "x floor").verdict == ""


CASES = [name for name in gpu_cases.CASES if name not in ("loss beside peers", "accuracy")]  # their peers take a minute


@dry_run
def test_cases_run_and_are_written(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path), "--cases", *CASES]
    assert gpu_bench.main(arguments) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [case["name"] for case in content["cases"]] == CASES
    figures = {figure["name"]: figure for case in content["cases"] for figure in case["figures"]}
    bars = {name for name, figure in figures.items() if figure["bar"] is not None}
    shapes = ("cpo-kernels, llama3 4k", "cpo-kernels, llama3 8k", "llama3 8k bf16, frozen", "cpo-kernels, qwen 8k")
    for part in ("row forward", "row backward in place", "bf16 over fp32", *shapes, "peak, N="):
        assert any(part in name for name in bars), part
    page = (tmp_path / "bench.md").read_text()
    assert all(name in page for name in figures)


def test_peaks_are_held_against_plan_and_budget_with_and_without_padding():
    setting = Setting(CPU, quick=True)
    shape = dataclasses.replace(gpu_cases.sized(gpu_cases.LLAMA3, setting), tokens=16)
    names = set()
    for padded in (False, True):
        of_plan, of_budget = gpu_cases.peak_of(setting, shape, 2**20, padded=padded)
        assert (of_plan.unit, of_budget.unit) == ("of the plan", "of the budget")
        assert of_plan.bar == of_budget.bar == 1.02
        # All logits are a fraction of this budget.
        assert of_budget.value < of_plan.value
        names.add(of_plan.name)
    assert len(names) == 2


def failing_peer(calls_before: int) -> Peer:
    """Eager, out of memory beyond this many calls at more than a tiny size."""
    eager, calls = BUILDERS["eager"](), []

    def loss(hidden, *others):
        calls.append(hidden)
        if len(calls) > calls_before:
            raise torch.OutOfMemoryError("tried to allocate too much\nand more lines")
        return eager.loss(hidden, *others)

    return dataclasses.replace(eager, loss=loss)


# One call is that of the tiny case, the second is the warm-up, the others are timed.
@pytest.mark.parametrize("calls_before", [0, 1, 2, 3])
def test_a_peer_that_fails_is_named_and_the_others_are_measured(monkeypatch, calls_before):
    peer = failing_peer(calls_before)
    monkeypatch.setitem(BUILDERS, "failing", lambda: dataclasses.replace(peer, name="failing"))
    monkeypatch.setattr(gpu_cases, "installed", lambda: (["eager", "failing"], {"absent": "No module named 'absent'"}))
    figures = {f.name.split(",")[0]: f for f in gpu_cases.loss_against_peers(Setting(CPU, quick=True))}
    for name in ("cpo-kernels", "eager"):
        assert figures[name].value > 0
    for name, reason in (("failing", "OutOfMemoryError: tried to allocate too much"), ("absent", "No module")):
        assert figures[name].value != figures[name].value
        assert reason in figures[name].detail
        assert "more lines" not in figures[name].detail


def test_our_own_failure_is_not_left_out(monkeypatch):
    ours = contestants.ours

    def broken(*args):
        return dataclasses.replace(ours(*args), loss=failing_peer(calls_before=0).loss)

    monkeypatch.setattr(contestants, "ours", broken)
    with pytest.raises(ContestantError, match="cpo-kernels failed with OutOfMemoryError"):
        list(gpu_cases.loss_against_floor(Setting(CPU, quick=True)))


def test_accuracy_goes_on_without_a_peer_that_fails(monkeypatch):
    def sequence_logps(hidden, *others):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(
        BUILDERS, "failing", lambda: dataclasses.replace(BUILDERS["eager"](), sequence_logps=sequence_logps)
    )
    monkeypatch.setattr(gpu_cases, "installed", lambda: (["failing", "eager"], {}))
    figures = {f.name: f for f in gpu_cases.accuracy_of_sums(Setting(CPU, quick=True))}
    assert [f.name.split(",")[0] for f in figures.values() if f.value == f.value][-1] == "eager"
    assert figures["failing, log-likelihood"].detail == "RuntimeError: no such kernel"
    assert [f.verdict for f in figures.values() if f.bar is not None] == ["met"]


def test_the_fastest_peer_is_held_against_ours_on_its_own_work():
    rows = {OURS: ("cpo", 2.0), OURS_DPO: ("dpo", 4.0), FLOOR: ("cpo", 1.0), "eager": ("cpo", 5.0)}
    rows |= {"Liger DPO": ("dpo", 6.0)}
    timed = tuple(Row(name, work, Timing((seconds,)), None, None) for name, (work, seconds) in rows.items())
    (figure,) = gpu_cases.against_fastest(CaseResult(gpu_cases.QWEN, timed, plan=None))
    assert (figure.value, figure.verdict, figure.detail) == (1.5, "met", "Liger DPO; slower: eager")
    assert not list(gpu_cases.against_fastest(CaseResult(gpu_cases.QWEN, timed[:3], plan=None)))


def test_a_case_for_which_there_is_nothing_is_no_failure(tmp_path):
    def absent(setting):
        raise gpu_cases.NotHereError("no interpreter")
        yield

    suite = gpu_bench.Suite("bench", "title", {"absent": absent})
    (case,) = gpu_bench.run(suite, ["absent"], Setting(CPU, quick=True), 60, tmp_path, [])
    assert (case.error, case.note) == ("", "no interpreter")
    assert "no interpreter" in (tmp_path / "bench.md").read_text()


def test_a_case_that_fails_is_reported_and_the_next_one_runs(tmp_path):
    def broken(setting):
        yield Figure("before", 1.0, "s")
        raise RuntimeError("out of something")

    suite = gpu_bench.Suite("bench", "title", {"broken": broken, "plan": gpu_cases.chunks})
    cases = gpu_bench.run(suite, list(suite.cases), Setting(CPU, quick=True), 60, tmp_path, [])
    assert [bool(case.error) for case in cases] == [True, False]
    assert [figure.name for figure in cases[0].figures] == ["before"]
    assert "out of something" in (tmp_path / "bench.md").read_text()


def test_a_run_that_is_ended_leaves_what_it_has_found(tmp_path):
    class Ended(BaseException):
        """What no case may catch."""

    def endless(setting):
        yield Figure("before", 1.0, "s")
        raise Ended

    suite = gpu_bench.Suite("bench", "title", {"plan": gpu_cases.chunks, "endless": endless, "last": gpu_cases.chunks})
    with pytest.raises(Ended):
        gpu_bench.run(suite, list(suite.cases), Setting(CPU, quick=True), 60, tmp_path, [])
    plan, ended, last = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert not plan["error"] and "while it ran" in ended["error"] and "not run" in last["error"]
    assert [figure["name"] for figure in ended["figures"]] == ["before"]


@pytest.mark.parametrize(("suite", "stem"), [("triton", "bench"), ("cuda", "bench-cuda")])
def test_cases_after_the_time_is_up_are_named(tmp_path, suite, stem):
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--seconds", "-1", "--suite", suite]
    assert gpu_bench.main(arguments) == 1
    content = json.loads((tmp_path / f"{stem}.json").read_text())
    assert {case["error"] for case in content["cases"]} == {"not run: the time was up"}
    assert [case["name"] for case in content["cases"]] == list(gpu_bench.SUITES[suite].cases)


@dry_run
def test_a_wrong_row_kernel_is_not_timed(monkeypatch):
    rows = gpu_cases.triton_kernels("rows")

    class Wrong:
        row_backward, row_backward_ = staticmethod(rows.row_backward), staticmethod(rows.row_backward_)

        @staticmethod
        def row_forward(*args):
            stats, logps = rows.row_forward(*args)
            return stats, logps + 1e-3

    monkeypatch.setattr(gpu_cases, "triton_kernels", lambda module: Wrong)
    with pytest.raises(gpu_cases.WrongResultError, match="row_forward"):
        list(gpu_cases.row_kernels(Setting(CPU, quick=True), torch.float32))


# Tuning


@dry_run
def test_tuning_measures_every_kernel_and_leaves_the_table_alone(tmp_path):
    before = tune.TABLE.read_bytes()
    out = tmp_path / "tuning.json"
    assert tune.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    assert tune.TABLE.read_bytes() == before
    table = json.loads(out.read_text())
    assert set(table["measurements"]) == {"default"}
    assert not any("configurations tried" in e.get("measured", "") for e in table["entries"])
    measured = {(e["kernel"], e["dtype"]) for e in table["entries"] if "measured" in e}
    assert measured == {(k.name, "float32" if d == torch.float32 else "any") for k in tune.KERNELS for d in k.dtypes}
    kept = [e for e in json.loads(before)["entries"] if e["arch"] != "default"]
    assert all(entry in table["entries"] for entry in kept)


def test_a_dry_run_does_not_touch_the_committed_table():
    with pytest.raises(SystemExit):
        tune.main(["--quick", "--device", "cpu"])


def entry(kernel, arch, dtype, **others):
    return {"kernel": kernel, "arch": arch, "dtype": dtype, "config": {}, **others}


def test_measured_entries_take_the_place_of_their_own_kind_only():
    old = [
        entry("a", "sm_90", "bfloat16", config={"old": 1}),
        entry("a", "sm_90", "float32", config={"old": 2}),
        entry("a", "sm_80", "any", config={"old": 3}),
        entry("b", "sm_90", "any", config={"old": 4}),
    ]
    measured = [
        {"kernel": "a", "dtype": "any", "config": {"new": 1}},
        {"kernel": "a", "dtype": "any", "vocab_at_most": 64, "config": {"new": 2}},
    ]
    table = tune.merged({"entries": old, "measurements": {"sm_80": "x"}}, measured, "sm_90", "here")
    assert table["measurements"] == {"sm_80": "x", "sm_90": "here"}
    configs = [e["config"] for e in table["entries"] if (e["kernel"], e["arch"]) == ("a", "sm_90")]
    assert configs == [{"old": 2}, {"new": 2}, {"new": 1}]  # the narrower bound is found first
    assert {str(e["config"]) for e in table["entries"]} == {
        str({k: v}) for k, v in [("new", 1), ("new", 2), ("old", 2), ("old", 3), ("old", 4)]
    }


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_configuration_is_not_the_fastest(error):
    kernel = tune.Kernel("a", ((None, 31),), [{"BLOCK": 1}], lambda size, device: job, (torch.float32,))
    job = tune.Job(lambda config: None, lambda config: error, 1e-3, 1.0, "GB/s")
    with pytest.raises(tune.WrongResultError, match="BLOCK"):
        tune.fastest(kernel, job, tune.clock_for(CPU), False, FOREVER)
    assert list(tune.measure([kernel], CPU, True, float("inf"))) == []


def test_a_configuration_that_does_not_launch_is_passed_over():
    def run(config):
        if config["BLOCK"] == 1:
            raise RuntimeError("out of resource: shared memory")

    def check(config):
        run(config)
        return 0.0

    kernel = tune.Kernel("a", ((None, 31),), [{"BLOCK": 1}, {"BLOCK": 2}], lambda size, device: job)
    job = tune.Job(run, check, 1e-3, 1.0, "GB/s")
    found = tune.fastest(kernel, job, tune.clock_for(CPU), False, FOREVER)
    assert found is not None and (found.config, found.tried) == ({"BLOCK": 2}, 2)


@pytest.mark.triton
@pytest.mark.parametrize("tried", [0, 1, 2, 3])
def test_a_search_that_the_time_cuts_short_keeps_the_best_until_then(monkeypatch, tmp_path, tried):
    """Each configuration takes one second of a clock of its own, and is faster than the one before."""
    now = 0.0

    def run(config):
        nonlocal now
        now += 1.0

    grid = tune.grid(BLOCK=(1, 2, 3))
    job = tune.Job(run, lambda config: 0.0, 1e-3, 1e9, "GB/s")
    kernel = tune.Kernel("row_forward", ((None, 31),), grid, lambda size, device: job, (torch.float32,))
    seconds = {"BLOCK": 10.0}

    def clock(call):
        call()
        seconds["BLOCK"] -= 1
        return seconds["BLOCK"], None

    monkeypatch.setattr(tune, "KERNELS", (kernel,))
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "clock_for", lambda device: clock)
    monkeypatch.setattr(tune.time, "monotonic", lambda: now)
    out = tmp_path / "tuning.json"
    # Past the deadline only strictly: the configuration that starts at the deadline still runs.
    status = tune.main(["--device", "cpu", "--out", str(out), "--seconds", str(tried - 1)])
    assert status == (0 if tried == 3 else 1)
    if tried == 0:
        assert not out.exists()
        return
    (measured,) = (e for e in json.loads(out.read_text())["entries"] if "measured" in e and e["arch"] == "default")
    assert measured["config"] == {"BLOCK": tried}
    assert (f"{tried} of 3 configurations tried" in measured["measured"]) == (tried < 3)
