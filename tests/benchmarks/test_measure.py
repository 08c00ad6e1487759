"""Contestants take turns, are checked and compared, and say why they have no time."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import processes
from benchmarks.measure import (
    Agreement,
    AnotherLossError,
    Case,
    Contestant,
    ContestantError,
    NotHereError,
    each,
    in_rounds,
    measure,
    not_here,
    ready,
)
from benchmarks.meters import PeakMeter
from benchmarks.processes import ProcessError, call_alone
from benchmarks.records import Record
from benchmarks.setting import CPU

pytestmark = pytest.mark.cpu


class Clock:
    """Stands for the host's: a call takes as long as its result says."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, call):
        name, seconds = call()
        self.calls.append(name)
        return seconds, (name, seconds)


def taking(**seconds):
    """Return contestants that take so long; several numbers are the warm-up and one round after the other."""

    def call(name, own):
        left = iter(own) if isinstance(own, list) else iter(lambda: own, None)
        return lambda: (name, next(left))

    return [Contestant(name, partial(call, name, own)) for name, own in seconds.items()]


def test_everyone_runs_once_a_round_and_each_round_begins_with_another():
    clock = Clock()
    records = measure(Case("x", taking(a=1.0, b=50.0, c=2.0), rounds=4), CPU, clock)
    assert "".join(clock.calls) == "abc" + "bca" + "cab" + "abc"
    found = {record.contestant: (record.values["seconds"], record.values["rounds"]) for record in records}
    assert found == {"a": (1.0, 4), "b": (50.0, 4), "c": (2.0, 4)}


def test_rounds_end_when_the_time_is_up_but_there_are_three():
    records = measure(Case("x", taking(a=1.0, b=1.0), rounds=9, seconds=0.0), CPU, Clock())
    assert [record.values["rounds"] for record in records] == [3, 3]


def test_who_fails_leaves_the_turns_and_the_others_have_all_rounds():
    good, bad = measure(Case("x", taking(a=1.0, b=[1.0, 1.0, 1.0]), rounds=5), CPU, Clock())
    assert good.values["rounds"] == 5 and not bad.values and bad.note.startswith("StopIteration")


def test_the_median_counts_and_neither_the_least_nor_the_mean():
    """By the fewest seconds and by the mean, `a` would be faster."""
    records = measure(
        Case(
            "x", taking(a=[0, 1.0, 9.0, 8.0, 1.5, 7.0], b=[0, 6.0, 6.0, 6.0, 6.0, 6.0]), rounds=5, ratios={"of_b": "b"}
        ),
        CPU,
        Clock(),
    )
    assert records[0].values["seconds"] == 7.0 and records[0].values["of_b"] == 7.0 / 6.0


def test_medians_and_the_spread_between_quartiles_are_told():
    found = {"seconds": 3.0, "spread": pytest.approx((4 - 2) / 3), "rounds": 5.0}
    assert in_rounds((1.0, 9.0, 2.0, 3.0, 4.0)) == found
    assert in_rounds((2.0,))["spread"] == 0


def sleeps(name: str, seconds: float, **options) -> Contestant:
    return Contestant(name, lambda: partial(time.sleep, seconds), **options)


def found(case: Case) -> dict[str, Record]:
    return {record.contestant: record for record in measure(case, CPU)}


def test_values_are_ratios_of_medians():
    others = {"ratios": {"of_a": "a", "of_nobody": "nobody"}, "values": lambda s: {"per_second": 1 / s}}
    contestants = [sleeps("a", 0.01), sleeps("b", 0.02), sleeps("c", 0.03, conditions={"K": 1}, **others)]
    records = found(Case("x", contestants, {"N": 8, "K": 3}, {"of_b": "b"}, {"speed": "a"}, note="slow"))
    seconds = {name: record.values["seconds"] for name, record in records.items()}
    assert records["a"].values["of_b"] == seconds["a"] / seconds["b"] and records["b"].values["of_b"] == 1
    assert records["b"].values["speed"] == seconds["a"] / seconds["b"]
    assert records["c"].values["of_a"] == seconds["c"] / seconds["a"] and "of_b" not in records["c"].values
    assert records["c"].values["per_second"] == 1 / seconds["c"] and "of_nobody" not in records["c"].values
    assert (records["a"].conditions, records["c"].conditions) == ({"N": 8, "K": 3}, {"N": 8, "K": 1})
    assert {record.note for record in records.values()} == {"slow"}
    assert all(record.values["rounds"] == 3 and record.case == "x" for record in records.values())


def refuse(result):
    raise AnotherLossError("computes another loss")


def not_built():
    raise ImportError("no such package\nand more")


@pytest.mark.parametrize(
    ("contestant", "why"),
    [
        (Contestant("b", not_built), "ImportError: no such package"),
        (Contestant("b", lambda: lambda: 1 / 0), "ZeroDivisionError: division by zero"),
        (sleeps("b", 0.0, check=refuse), "AnotherLossError: computes another loss"),
        (not_here("b", "not asked for"), "not asked for"),
    ],
)
def test_who_is_absent_fails_or_is_wrong_has_a_reason_and_no_values(contestant, why):
    records = found(Case("x", [sleeps("a", 0.001), contestant]))
    assert records["a"].values and not records["a"].note
    assert not records["b"].values and records["b"].note == why


@pytest.mark.parametrize("needed", [ready("a", lambda: 1 / 0), ready("a", lambda: None, check=refuse)])
def test_nothing_is_compared_without_who_is_needed(needed):
    with pytest.raises(ContestantError, match="a: "):
        measure(Case("x", [needed, sleeps("b", 0.0)]), CPU)


def test_only_the_first_timed_call_is_checked_and_what_precedes_calls_is_not_timed():
    results, checked = iter(range(9)), []
    contestant = Contestant(
        "a", lambda: lambda: next(results), check=lambda result: checked.append(result) or {"error": 0.5}
    )
    case = Case("x", [contestant], rounds=4, before=lambda: time.sleep(0.02))
    (record,) = measure(case, CPU)
    assert checked == [1]  # 0 was the warm-up's
    assert record.values["error"] == 0.5 and record.values["seconds"] < 0.01


def test_the_peak_is_beyond_the_gradients_that_are_returned():
    def call():
        temporary = torch.ones(2**22)  # 16 MiB
        return temporary.sum(), (torch.ones(2**21),)

    (record,) = measure(Case("x", [ready("a", call)], peaks=True), CPU)
    assert record.values["peak_mib"] == pytest.approx(16, abs=4)


def test_the_meter_sees_what_was_touched_and_freed():
    size, meter, slack = 64 * 2**20, PeakMeter(CPU), 2 * 2**20  # counters of resident pages are batched per core
    meter.start()
    assert abs(meter.growth()) <= slack
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
    assert abs(meter.growth() - size) <= slack
    meter.start()
    assert abs(meter.growth()) <= slack


def test_results_agree_with_the_first_up_to_a_share_of_its_norm():
    agree = Agreement(1e-2, lambda result: result)
    for right in ([1.0, torch.ones(4)], [1.005, 1.005 * torch.ones(4)]):
        assert agree(right) == {}
    for wrong in ([1.02, torch.ones(4)], [1.0, torch.tensor([1.0, 1, 1, 1.1])], [float("nan"), torch.ones(4)]):
        with pytest.raises(AnotherLossError, match="differs from the first"):
            agree(wrong)


def test_a_case_that_fails_does_not_keep_the_next_from_being_measured():
    def fails():
        yield Record("first", "a", {"seconds": 1.0})
        raise ValueError("out of something")

    def not_here():
        raise NotHereError("no interpreter")
        yield

    records = []
    with pytest.raises(ContestantError, match=r"^first: ValueError: out of something$"):
        for record in each({"first": fails, "second": not_here, "third": lambda: iter([Record("third", "a")])}):
            records.append(record)
    assert [record.case for record in records] == ["first", "second", "third"] and records[1].note == "no interpreter"


# Processes of their own


def fail():
    raise ValueError("no\nand more")


alone = partial(call_alone, preload=["benchmarks.measure"])


def test_a_process_returns_or_says_why_not():
    assert alone(os.path.join, "a", "b") == "a/b"
    with pytest.raises(ProcessError, match=r"^ValueError: no$"):
        alone(fail)
    with pytest.raises(ProcessError, match="SIGABRT"):
        alone(os.abort)
    with pytest.raises(ProcessError, match="exit status 3"):
        alone(os._exit, 3)
    assert alone(processes.end_with, "early") == "early"


def leave_a_child():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


def test_what_a_process_leaves_is_ended():
    child = alone(leave_a_child)
    for _ in range(200):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("it is still there")
