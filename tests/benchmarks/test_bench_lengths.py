"""The part lengths: batches as a text gives them, lives that are counted whole, and who is stopped or refused."""

from __future__ import annotations

import math
import os
import subprocess
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from benchmarks import lengths, lengths_run, texts
from benchmarks.contestants import FLOOR, OURS, OURS_PAIRS
from benchmarks.lengths_run import PACKED, Life, Stopwatch, Task, live
from benchmarks.measure import AnotherLossError
from benchmarks.oracle import Errors
from benchmarks.peers import BUILDERS, ours
from benchmarks.problem import IGNORE
from benchmarks.setting import Setting
from benchmarks.shapes import CPO, PAIRS
from benchmarks.texts import Corpus, Example

pytestmark = pytest.mark.cpu  # small dry runs on the host

V, H = 61, 8
QUICK = Setting(quick=True)


def corpus(*completion_lengths: int) -> Corpus:
    """Completions that say of each token whose it is."""
    examples = [Example([0], [index] * length) for index, length in enumerate(completion_lengths)]
    return Corpus(examples, None, "made up")  # type: ignore[arg-type]


def sizes(**changes: object) -> lengths.Sizes:
    return replace(lengths.QUICK, batches=8, longest=9, vocab=V, hidden=H, **changes)


def task(**changes: object) -> Task:
    targets = lengths.draw_batches(corpus(2, 5, 7, 3, 9, 4), sizes())
    return replace(Task(targets, V, H, torch.float32, torch.device("cpu"), torch.get_num_threads()), **changes)


def lived(name: str, given: Task, limit: float = math.inf) -> Life:
    life = Life()
    live(name, given, life, Stopwatch(life, limit, lambda: pytest.fail("stopped in the midst of a call")))
    return life


def test_batches_hold_whole_completions_of_different_examples():
    own = [2, 5, 7, 3, 9, 4, 30]
    batches = lengths.draw_batches(corpus(*own), sizes())
    assert len(batches) == 8
    assert {len(batch) for batch in batches} <= set(lengths.GROUPS)
    for batch in batches:
        there = batch != IGNORE
        assert batch.shape[1:] == (lengths.CANDIDATES, there.sum(-1).max())
        for group in batch:
            examples = group[:, 0].tolist()
            assert len(set(examples)) == lengths.CANDIDATES
            assert 6 not in examples  # longer than the longest that is taken
            for tokens, example in zip(group, examples, strict=True):
                assert tokens[tokens != IGNORE].tolist() == [example] * own[example]
                assert (tokens[own[example] :] == IGNORE).all()


def test_batches_are_the_same_every_time_and_have_several_shapes():
    text = texts.load(QUICK, longest=100)
    batches, again = (lengths.draw_batches(text, lengths.QUICK) for _ in range(2))
    for one, other in zip(batches, again, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert len({batch.shape for batch in batches}) > 2


def test_too_few_completions_are_refused():
    with pytest.raises(ValueError, match="only 3 completions of at most 9 tokens in made up"):
        lengths.draw_batches(corpus(1, 2, 3, 10), sizes())


def test_problems_share_the_head_and_padding_predicts_nothing():
    given = task()
    problems = list(given.problems())
    assert len({id(problem.weight) for problem in problems}) == 1
    assert all(problem.hidden.is_leaf and problem.weight.is_leaf for problem in problems)
    for problem, targets in zip(problems, given.targets, strict=True):
        assert_close(problem.targets, targets)
        assert problem.shape.num_tokens == targets.numel()


@pytest.mark.parametrize("name", [OURS, OURS_PAIRS, PACKED, "eager"])
def test_a_life_has_every_call_and_checks_the_first_and_the_last(name):
    life = lived(name, task())
    assert life.work == (PAIRS if name == OURS_PAIRS else CPO)
    assert len(life.seconds) == 8
    assert len(life.errors) == lengths_run.CHECKED + 1
    assert life.total == sum(life.seconds)
    assert life.worst().worst() < 1e-5


def test_the_floor_has_no_errors():
    life = lived(FLOOR, task())
    assert len(life.seconds) == 8
    assert life.worst() is None


def test_another_loss_is_refused_whenever_it_comes(monkeypatch):
    eager = BUILDERS["eager"]()
    calls = []

    def wrong_at_last(*tensors):
        calls.append(None)
        return eager.loss(*tensors) * (2 if len(calls) == 8 else 1)

    monkeypatch.setattr(lengths_run, "builders", lambda: {"wrong": lambda: replace(eager, loss=wrong_at_last)})
    with pytest.raises(AnotherLossError, match="on batch 8"):
        lived("wrong", task())


def test_packed_leaves_padding_out_before_the_call(monkeypatch):
    rows = []

    def count(hidden, *args, **options):
        rows.append(len(hidden))
        return linear_cpo_loss(hidden, *args, **options)

    linear_cpo_loss = lengths_run.cpo_kernels.linear_cpo_loss
    monkeypatch.setattr(lengths_run.cpo_kernels, "linear_cpo_loss", count)
    problem = next(task().problems())
    loss, grads = lengths_run.packed().run(problem)
    assert rows == [int((problem.targets != IGNORE).sum())]
    padded, padded_grads = ours("ours").run(problem)
    assert_close(loss, padded)
    assert_close(grads, padded_grads)


def test_the_worst_error_is_taken_kind_by_kind():
    life = Life(errors=[Errors(1.0, 0.2, 0.3), Errors(0.5, 0.6, 0.1)])
    assert life.worst() == Errors(1.0, 0.6, 0.3)


def test_a_life_ends_after_the_call_that_passes_the_limit(monkeypatch):
    monkeypatch.setattr(lengths_run, "waited", lambda call: (0.4, call()))
    life = lived("eager", task(), limit=1.0)
    assert life.seconds == [0.4] * 3


def test_a_call_without_end_is_counted_until_the_limit():
    life, stopped = Life(seconds=[0.5]), []
    Stopwatch(life, 0.7, lambda: stopped.append(life.total)).time(lambda: time.sleep(0.6))
    assert len(stopped) == 1
    assert 0.7 <= stopped[0] < 1.0


def test_processes_live_or_say_why_not(tmp_path):
    path = tmp_path / "task.pt"
    torch.save(task(), path)
    life = lengths.in_a_process(path, "eager", math.inf)
    assert (len(life.seconds), len(life.errors), life.work) == (8, 4, CPO)
    assert lengths.in_a_process(path, "nobody", math.inf) == "KeyError: 'nobody'"


def test_what_a_process_leaves_is_ended():
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE, start_new_session=True)
    left = int(shell.stdout.readline())
    shell.wait()
    lengths.end_group(shell.pid)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(left, 0)
            if is_zombie(left):
                raise ProcessLookupError
            time.sleep(0.02)
    lengths.end_group(shell.pid)  # nobody left: no error


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only its parent does not know yet."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"


LIVES = {
    FLOOR: Life(CPO, [1.0] * 8),
    OURS: Life(CPO, [0.5] * 7 + [1.0], [Errors(0.1, 0.2, 0.3)]),
    PACKED: Life(CPO, [0.25] * 8),
    OURS_PAIRS: Life(PAIRS, [2.0] * 8),
    "eager": Life(CPO, [3.0] * 3),
    "Liger CPO": Life(PAIRS, [], [], unfinished=40.0),
    "TRL fused head": "ImportError: no TRL",
}


class TestRecords:
    """Of a case whose processes are made up."""

    @pytest.fixture
    def records(self, monkeypatch, tmp_path):
        self.limits = {}

        def in_a_process(path, name, limit):
            self.limits[name] = limit
            return LIVES.get(name, "RuntimeError: not here")

        monkeypatch.setattr(lengths, "in_a_process", in_a_process)
        return list(lengths.Case(task(), sizes(limit=5.0, limit_compiling=30.0), tmp_path, Setting()).records())

    def test_ours_and_the_floor_run_first_and_last(self, records):
        names = [record.contestant for record in records]
        assert names[:2] == [FLOOR, OURS]
        assert names[-2:] == [OURS, FLOOR]
        assert [r.conditions["run"] for r in records if r.contestant == OURS] == ["first", "last"]
        assert set(names) == {*lengths.OWN, *lengths.builders()}

    def test_ratios_are_of_totals_on_the_same_work(self, records):
        found = {record.contestant: record for record in records}
        assert found[OURS].values["of_ours"] == 1.0
        assert found[OURS].values["floor"] == 4.5 / 8
        assert found[OURS].values["slowest"] == 1.0
        assert found[OURS].values["error_grad_weight"] == 0.3
        assert found[PACKED].values["of_ours"] == 2.0 / 4.5
        assert found["Liger CPO"].values["of_ours"] == 40.0 / 16.0
        assert found["Liger CPO"].conditions["K"] == 1
        assert "of_ours" not in found[FLOOR].values

    def test_a_peer_that_was_stopped_has_what_it_did_and_no_more(self, records):
        found = {record.contestant: record for record in records}
        assert found["eager"].note == "stopped after 3 batches: 9.0 s"
        assert found["eager"].values["total"] == 9.0
        assert found["eager"].values["batches"] == 3
        assert found["Liger CPO"].note == "stopped after 0 batches: 40.0 s"
        assert "median" not in found["Liger CPO"].values

    def test_limits_leave_ours_alone_and_are_at_least_twice_its_time(self, records):
        assert self.limits[FLOOR] == self.limits[OURS] == self.limits[OURS_PAIRS] == math.inf
        assert self.limits["eager"] == 2 * 4.5
        assert self.limits["torch.compile"] == 30.0

    def test_who_did_not_run_says_why(self, records):
        found = {record.contestant: record for record in records}
        assert found["TRL fused head"].note == "ImportError: no TRL"
        assert "heads" in found["QuACK"].note
        assert all(record.note for record in records if not record.values)
        assert not {"QuACK", "Liger DPO"} & self.limits.keys()

    @pytest.mark.parametrize("name", [FLOOR, OURS])
    def test_nothing_is_measured_without_ours_and_the_floor(self, name, monkeypatch, tmp_path):
        lives = {**LIVES, name: "MemoryError"}
        monkeypatch.setattr(lengths, "in_a_process", lambda path, name, limit: lives[name])
        with pytest.raises(RuntimeError, match="MemoryError"):
            list(lengths.Case(task(), sizes(), tmp_path, Setting()).records())

    def test_conditions_count_tokens_and_shapes(self, records):
        targets, found = task().targets, records[0].conditions
        tokens = sum(int((t != IGNORE).sum()) for t in targets)
        assert (found["N"], found["V"], found["H"], found["dtype"]) == (tokens, V, H, "float32")
        assert found["padding"] == pytest.approx(1 - tokens / sum(t.numel() for t in targets), abs=1e-3)
        assert found["shapes"] == len({t.shape for t in targets})


def test_a_quick_run_has_a_record_for_everyone(monkeypatch):
    monkeypatch.setattr(lengths, "OWN", (FLOOR, OURS))
    monkeypatch.setattr(lengths, "builders", lambda: dict.fromkeys(("eager", "torch.compile")))
    here = partial(torch.load, weights_only=False)
    monkeypatch.setattr(lengths, "in_a_process", lambda path, name, limit: lived(name, here(path), limit))
    records = list(lengths.run(QUICK))
    assert [r.contestant for r in records] == [FLOOR, OURS, "eager", "torch.compile", OURS, FLOOR]
    for record in records:
        assert record.note == ("not in a quick run" if record.contestant == "torch.compile" else "")
        assert record.values or record.note
    assert all(r.values["batches"] == lengths.QUICK.batches for r in records if r.values)
