"""Choices between backends: what is made of measurements, and dry runs with emulated CUDA kernels on the CPU."""

from __future__ import annotations

import ctypes
import itertools
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels import adopt, choose
from benchmarks.kernels.adopt import write_table
from benchmarks.kernels.choose import Measured, Task
from benchmarks.setting import Setting
from cpo_kernels.kernels import selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.selection import Choice, Sizes

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
ALL = ("triton", "torch", "cuda")
dry_run = pytest.mark.interpreter  # on a GPU, gpu-check measures


@pytest.fixture
def gpu(emulated_cuda, emulator, monkeypatch):
    """The CPU is a GPU with emulated kernels: Triton's are preferred, the compiled ones are there to be chosen."""
    for name in ("driver_version", "runtime_version"):
        monkeypatch.setattr(emulator, name, lambda: 13000, raising=False)
    monkeypatch.setitem(selection.PREFERRED, "cpu", selection.PREFERRED["cuda"])
    return emulator


@pytest.fixture(autouse=True)
def table(tmp_path_factory, monkeypatch):
    """A table without choices in place of the committed one, whatever that holds by now."""
    path = tmp_path_factory.mktemp("committed") / "selection.json"
    path.write_text(json.dumps({"source": "choices: not measured yet", "prefer": {}, "choices": []}))
    monkeypatch.setattr(choose, "TABLE", path)
    monkeypatch.setattr(choose, "CHOICES", replace(choose.CHOICES, table=path))
    return json.loads(path.read_text())


# From measurements to choices


def rows(operation="row_forward", bound=None, dtype=BF16, **seconds) -> Measured:
    where = Task(operation, None, bound or 262144, dtype, bound)
    return Measured(where, {str(where): {None if n == "none" else n: s for n, s in seconds.items()}})


@pytest.mark.parametrize(("seconds", "backend"), [(0.97, "cuda"), (0.985, "triton"), (1.0, "triton"), (2.0, "triton")])
def test_another_than_the_default_must_be_faster_by_more_than_2_percent(seconds, backend):
    assert choose.fastest(rows(triton=1.0, cuda=seconds)) == backend
    assert bool(choose.entries([rows(triton=1.0, cuda=seconds)], "sm_90")) == (backend == "cuda")


def test_the_fastest_of_several_ways_is_chosen():
    measured = rows("linear_forward", none=3.0, cuda=2.5, triton=2.0)
    assert choose.fastest(measured) == "triton"
    found = choose.figures(measured)
    assert found == "cuda 1.20x, triton 1.50x the speed of product and row kernel at V=262144, bfloat16"


def test_of_several_places_the_least_gain_counts():
    places = {"G=1": {"triton": 1.0, "cuda": 0.5}, "G=2": {"triton": 1.0, "cuda": 0.99}}
    measured = Measured(Task("contrast", None), places)
    assert choose.fastest(measured) == "triton"
    assert choose.figures(measured) == "cuda at least 1.01x the speed of triton at G=1; G=2"
    places["G=2"] = {"triton": 1.0, "cuda": 0.8}
    (entry,) = choose.entries([measured], "sm_90")
    assert (entry["backend"], entry["dtype"], entry["measured"][:19]) == ("cuda", "any", "cuda at least 1.25x")


def test_a_choice_says_what_it_was_made_by():
    entries = choose.entries([rows(bound=65536, triton=1.07, cuda=1.0)], "sm_90")
    assert [entry["dtype"] for entry in entries] == ["bfloat16", "float16"]
    assert entries[0] == {
        "operation": "row_forward",
        "arch": "sm_90",
        "dtype": "bfloat16",
        "backend": "cuda",
        "vocab_at_most": 65536,
        "measured": "cuda 1.07x the speed of triton at V=65536, bfloat16",
    }


def picked(entries, operation, sizes, available=ALL, name="auto"):
    with selection.overridden(*(Choice(**entry) for entry in entries)):
        return selection.choices_for(name, "sm_90", sizes, available).get(operation)


BOUNDS = (2048, 65536, None)


@pytest.mark.parametrize("faster", list(itertools.product([False, True], repeat=3)), ids=str)
def test_each_size_gets_what_is_fastest_there(faster):
    """Whatever the pattern and the order of measuring; a default is written only where it keeps a wider choice out."""
    measured = [rows(bound=b, triton=1.0, cuda=0.5 if f else 1.5) for b, f in zip(BOUNDS, faster, strict=True)]
    entries = choose.entries(measured[::-1], "sm_90")
    for vocab, wanted in zip((2000, 50257, 128256), faster, strict=True):
        for dtype in (BF16, torch.float16):
            found = picked(entries, "row_forward", Sizes(vocab, dtype)) or "triton"
            assert found == ("cuda" if wanted else "triton")
        assert picked(entries, "row_forward", Sizes(vocab, FP32)) is None
    last = max((i for i, f in enumerate(faster) if f), default=-1)
    assert len(entries) == 2 * (last + 1)


def test_null_keeps_a_way_around_out_where_it_does_not_pay():
    def at(bound, none, **others):
        where = Task("linear_forward", None, 128256, BF16, None, bound or 8192, bound)
        return Measured(where, {str(where): {None: none, **others}})

    measured = [at(1024, 1.0, cuda=0.8, triton=0.9), at(2048, 1.0, cuda=1.2), at(None, 1.0, cuda=0.9)]
    entries = choose.entries(measured, "sm_90")
    assert [entry["backend"] for entry in entries[:3]] == ["cuda", None, "cuda"]
    for hidden, wanted in ((768, "cuda"), (2048, None), (4096, "cuda")):
        assert picked(entries, "linear_forward", Sizes(128256, FP32, hidden, BF16)) == wanted
        assert picked(entries, "linear_forward", Sizes(128256, BF16, hidden, FP32)) is None
    # A call that names another backend gets none of it.
    assert picked(entries, "linear_forward", Sizes(128256, BF16, 768, BF16), name="triton") is None


def old(arch, operation, backend="cuda", **others):
    return {"operation": operation, "arch": arch, "backend": backend, **others}


def test_measurements_take_the_place_of_choices_of_their_own_kind_only():
    choices = [
        old("sm_80", "row_forward"),
        old("sm_90", "row_forward"),  # any dtype: it would hide what was measured
        old("sm_90", "row_forward", dtype="float16"),
        old("sm_90", "row_forward", dtype="float32"),
        old("sm_90", "contrast", dtype="bfloat16"),
        old("sm_90", "row_backward", dtype="any"),
    ]
    table = {"source": "cpu: x. choices: none", "prefer": {}, "measurements": {"sm_80": "there"}, "choices": choices}
    contrast = Measured(Task("contrast", None), {"G=1": {"triton": 1.0, "cuda": 2.0}})
    new = choose.merged(table, [rows(triton=1.0, cuda=0.5), contrast], "sm_90", "here")
    assert new["measurements"] == {"sm_80": "there", "sm_90": "here"}
    assert new["source"].startswith("cpu: x. choices: benchmarks/kernels/choose.py")
    assert new["choices"][:3] == [choices[0], choices[3], choices[5]]
    assert [(c["operation"], c["dtype"]) for c in new["choices"][3:]] == [
        ("row_forward", "bfloat16"),
        ("row_forward", "float16"),
    ]
    assert choose.merged(new, [rows(triton=1.0, cuda=0.5), contrast], "sm_90", "here") == new
    assert table["choices"] is choices and len(choices) == 6


@pytest.mark.parametrize("measured", [[], [rows(triton=1.0, cuda=0.5)]], ids=["none", "one"])
def test_the_table_is_written_so_that_it_can_be_read(tmp_path, measured):
    table = choose.merged(json.loads(choose.TABLE.read_text()), measured, "sm_90", "here")
    write_table(table, "choices", tmp_path / "selection.json")
    text = (tmp_path / "selection.json").read_text()
    assert json.loads(text) == table
    assert text.count('"operation"') == sum('"operation"' in line for line in text.splitlines())
    assert [Choice(**entry).backend for entry in json.loads(text)["choices"]] == ["cuda", "cuda"] * len(measured)


# Runs

LAUNCHES = ("unit_forward", "row_forward", "row_backward", "contrast", "cpo_loss", "linear_forward", "linear_backward")


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "selection.json"
    status = choose.CHOICES.main(["--quick", "--device", "cpu", "--out", str(out), *arguments])
    return status, json.loads(out.read_text()) if out.exists() else {}


@dry_run
def test_a_dry_run_measures_every_operation_at_every_size(gpu, tmp_path, capsys, monkeypatch):
    """A dry run takes one size only, so that all of an operation would say the same."""
    tasks = {task.name: task for task in choose.TASKS}
    monkeypatch.setattr(choose, "TASKS", list(tasks.values()))
    launched = set()
    for name in LAUNCHES:
        launch = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda name=name, launch=launch, **given: launched.add(name) or launch(**given))
    before = choose.TABLE.read_bytes()
    status, table = run(tmp_path)
    assert status == 0 and choose.TABLE.read_bytes() == before
    assert set(table["measurements"]) == {"default"} and launched == set(LAUNCHES)
    log = capsys.readouterr().err
    assert f"{len(tasks)} of {len(tasks)} sizes measured" in log
    for operation in selection.OPERATIONS:
        assert f"  {operation}" in log
    assert "WrongResult" not in log
    assert all(Choice(**entry).measured for entry in table["choices"])


@dry_run
def test_without_the_extension_there_is_less_to_choose(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuda_extension, "_load", lambda: (None, "it was not built"))
    some = {each.name: each for each in choose.TASKS}
    tasks = [some[operation] for operation in ("row_forward", "linear_forward", "linear_kept")]
    monkeypatch.setattr(choose, "TASKS", tasks)
    status, table = run(tmp_path)
    log = capsys.readouterr().err
    assert status == 0 and "row_forward: without cuda, it was not built" in log
    assert "1 of 1 sizes measured" in log and "cuda" not in {c["backend"] for c in table["choices"]}


def test_a_dry_run_does_not_touch_the_committed_table():
    with pytest.raises(SystemExit):
        choose.CHOICES.main(["--quick", "--device", "cpu"])


def task(seconds: float, seen=None, now=None, name="row_forward", **bounds) -> Task:
    """One that finds the compiled kernels to take so long, where Triton's take 1 s."""

    def places(where, _setting, names, chosen):
        if seen is not None:
            seen.append([(choice.operation, choice.backend, choice.vocab_at_most) for choice in chosen])
        if now is not None:
            now[0] += 1.0
        if seconds <= 0:
            raise RuntimeError("out of something")
        yield str(where), {name: seconds if name == "cuda" else 1.0 for name in names}

    return Task(name, places, 64, FP32, **bounds)


def test_a_measurement_knows_what_was_chosen_for_its_rows(gpu, tmp_path):
    seen = []
    tasks = [
        task(0.5, seen, vocab_at_most=100),
        task(2.0, seen, name="contrast"),
        task(0.5, seen, name="linear_kept"),
    ]
    choose.CHOICES.run(tasks, Setting(CPU, quick=True), tmp_path / "out.json", float("inf"))
    assert seen == [[], *[[("row_forward", "cuda", 100)]] * 2]


@pytest.mark.triton
@pytest.mark.parametrize("measured", [0, 1, 2, 3])
def test_what_was_measured_when_the_time_was_up_is_written(gpu, tmp_path, monkeypatch, measured):
    """Each measurement takes one second of a clock of its own."""
    now = [0.0]
    tasks = [task(0.5, now=now, vocab_at_most=bound) for bound in (10, 20)] + [task(0.5, now=now)]
    monkeypatch.setattr(choose, "TASKS", tasks)
    monkeypatch.setattr(adopt.time, "monotonic", lambda: now[0])
    # The first one begins whatever it takes, and then what would probably end in time.
    status, table = run(tmp_path, "--seconds", str(measured if measured else -1))
    assert status == (0 if measured == 3 else 1)
    assert [c.get("vocab_at_most") for c in table.get("choices", [])] == [10, 20, None][:measured]


@pytest.mark.triton
def test_where_something_fails_the_default_stays_and_the_others_are_measured(gpu, tmp_path, monkeypatch, capsys):
    """A wider choice must not cover the size at which it failed."""
    monkeypatch.setattr(choose, "TASKS", [task(0.5, vocab_at_most=10), task(0.0, vocab_at_most=20), task(0.5)])
    status, table = run(tmp_path)
    assert status == 1 and "2 of 3 sizes measured" in capsys.readouterr().err
    assert [(c.get("vocab_at_most"), c["backend"]) for c in table["choices"]] == [
        (10, "cuda"),
        (20, "triton"),
        (None, "cuda"),
    ]
    assert table["choices"][1]["measured"].startswith("RuntimeError: out of something at V=")


@dry_run
@pytest.mark.parametrize("operation", ["row_forward", "linear_kept"])
def test_a_wrong_result_is_not_chosen(gpu, tmp_path, monkeypatch, capsys, operation):
    """Log-probabilities of the emulated kernels come out 10 % off."""
    for name in ("row_forward", "linear_forward"):
        right = getattr(gpu, name)

        def wrong(right=right, **arguments):
            right(**arguments)
            logps = (ctypes.c_float * arguments["tokens"]).from_address(arguments["logps"])
            logps[:] = [1.1 * logp for logp in logps]

        monkeypatch.setattr(gpu, name, wrong)
    monkeypatch.setattr(choose, "TASKS", [t for t in choose.TASKS if t.name == operation][:1])
    status, table = run(tmp_path)
    log = capsys.readouterr().err
    assert status == 1 and table["choices"] == []
    assert "WrongResultError: " in log or "AnotherLossError: " in log
