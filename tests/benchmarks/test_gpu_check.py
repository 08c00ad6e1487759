"""`make gpu-check`, as far as it runs without a GPU: parts, time-outs, shards, and the page of bars."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from project import ROOT

pytest.importorskip("triton")

from benchmarks import gpu_check, records, suite
from benchmarks.contestants import OURS
from benchmarks.environment import NOTHING_TO_DO
from benchmarks.gpu_check import Settings
from benchmarks.records import Part, Record
from benchmarks.shapes import BAR_4K, BAR_LOSSES

pytestmark = pytest.mark.cpu  # dry runs


@pytest.fixture
def settings(tmp_path):
    return Settings("cpu", tmp_path, limit=60, quick=True, workers=1)


@pytest.fixture
def run(settings, monkeypatch):
    """Run parts that are made of shell scripts."""
    monkeypatch.setattr(gpu_check.environment, "describe", lambda argv, device: ENVIRONMENT)

    def parts(limit: float = 60, **scripts: str) -> dict[str, tuple[str, str]]:
        commands = {name: lambda _, s=script: ["sh", "-c", s] for name, script in scripts.items()}
        monkeypatch.setattr(gpu_check, "PARTS", {**commands, "build": lambda _: ["true"]})
        found = gpu_check.run_parts(list(scripts), replace(settings, limit=limit), [])
        return {record.case: (record.conditions["status"], record.note) for record in found}

    monkeypatch.setattr(gpu_check, "extension", lambda name: Path(name))
    return parts


def saved(settings) -> Part:
    return records.load(settings.out / "gpu-check.json")["gpu-check"]


def is_running(pid: int) -> bool:
    """Neither gone nor waiting for its parent to ask about it."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and ") Z " not in stat.read_text()


def test_a_part_past_its_limit_is_ended_with_its_children_and_its_output_kept(run, settings):
    assert run(limit=1, tune="sleep 60 & echo $!; sleep 60")["tune"][0] == "timed out"
    (record,) = saved(settings).records
    deadline = time.monotonic() + 20
    while is_running(int(record.conditions["tail"])):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_status_of_a_part_is_that_of_its_command_and_a_failed_one_does_not_stop_the_others(run, settings):
    nothing = f"echo needs a package; exit {NOTHING_TO_DO}"
    found = run(build="true", bench="echo the end; exit 3", crash="kill -ABRT $$", tune=nothing)
    assert found == {
        "build": ("passed", ""),
        "bench": ("failed", ""),
        "crash": ("failed", "ended by SIGABRT"),
        "tune": ("nothing to do", "needs a package"),
    }
    assert [record.conditions["tail"] for record in saved(settings).records] == ["", "the end", "", ""]
    page = (settings.out / "gpu-check.md").read_text()
    assert "the end" in page and page.index("## Bars") < page.index("| bench")


def test_a_program_that_is_not_there_fails_its_part(run, settings, monkeypatch):
    run(build="true")
    monkeypatch.setitem(gpu_check.PARTS, "bench", lambda _: ["/no/such/program"])
    assert gpu_check.run_part("bench", settings).conditions["status"] == "failed"


def test_the_exit_status_names_what_failed(run, settings, capsys):
    run(build="true", tune="false")
    arguments = ["--out", str(settings.out), "--device", "cpu", "--parts"]
    assert gpu_check.main([*arguments, "build"]) == 0
    assert gpu_check.main([*arguments, "build", "tune"]) == 1
    assert capsys.readouterr().out.endswith("failed: tune\n")


def test_without_a_built_extension_the_build_comes_first(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "extension", lambda name: None)
    assert list(run(tune="true")) == ["build", "tune"]


def test_parts_are_run_in_the_order_of_what_they_tell_and_none_twice():
    assert gpu_check.expand(["tests-2", "tests", "tests-2"]) == ["tests-2", "tests-1", "tests-3"]
    everything = gpu_check.expand(n for n in gpu_check.NAMES if n not in gpu_check.GROUPS)
    assert everything == list(gpu_check.PARTS)
    assert everything[:3] == ["build", "tests-1", "bench"] and everything[-2:] == ["tests-2", "tests-3"]
    of_suite = {name for name in everything if name.startswith("suite-")}
    assert of_suite ^ {f"suite-{name}" for name in suite.PARTS} == {"suite-gpu"}


def test_a_later_run_keeps_the_parts_of_an_earlier_one_with_the_same_code(run, settings, monkeypatch):
    run(build="true", bench="true", tune="false")
    assert run(tune="true")["tune"][0] == "passed"
    found = [(record.case, record.conditions["status"]) for record in saved(settings).records]
    assert found == [(name, "passed") for name in ("build", "bench", "tune")]
    monkeypatch.setattr(gpu_check.environment, "describe", lambda argv, device: ENVIRONMENT | {"sources": "other"})
    run(tune="true")
    assert [record.case for record in saved(settings).records] == ["tune"]


@pytest.mark.parametrize(("script", "status"), [("exit 0", "passed"), ("exit 99", "failed")])
def test_what_the_sanitizer_finds_fails_the_part(settings, monkeypatch, tmp_path, script, status):
    assert gpu_check.run_part("sanitizer-memcheck", settings).conditions["status"] == "nothing to do"  # on a CPU
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "extension", lambda name: Path(name))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tool))
    found = gpu_check.run_part("sanitizer-memcheck", replace(settings, device="cuda"))
    assert found.conditions["status"] == status


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
    assert gpu_check.count_tests(output) == f"2 passed, 1 failed, 0 error, 1 skipped; {skipped}"


ENVIRONMENT = {"commit": "c", "sources": "s", "device": "d", "gpu": {"name": "g"}, "python": "p", "versions": {}}
ENVIRONMENT |= {"command": "x", "threads": 1, "load_average": 0.0, "backends": {}}


def test_the_page_says_of_every_bar_whether_it_was_met_missed_or_not_measured(tmp_path):
    found = [Record(shape.name, OURS, {"floor": 1.0}) for shape in BAR_LOSSES[:2]]
    slow = Record("row kernels, bfloat16, V=32000", "forward, triton", {"of_gbs": 0.5})
    other = [Record("k", "truncation 1", {"of_base": 1.02})]
    records.save({"gpu": Part("gpu", ENVIRONMENT, [*found, slow])}, tmp_path / "gpu.json")
    # Of another device, and so not of this run.
    records.save({"negatives": Part("negatives", ENVIRONMENT | {"gpu": {}}, other)}, tmp_path / "negatives.json")
    told = gpu_check.decided(tmp_path, ENVIRONMENT)
    assert [sum(bar.met is verdict for bar in told) for verdict in (True, False)] == [2, 1]
    part = Part(
        "gpu-check", ENVIRONMENT, [Record("bench", "", {"seconds": 4.0}, {"status": "timed out", "tail": "end"})]
    )
    page = gpu_check.page(part, told)
    assert page.index("2 met, 1 missed") < page.index(BAR_4K.name) < page.index("timed out") < page.index("end\n```")
    assert "dry run" not in page
