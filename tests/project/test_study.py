"""The study: its tasks decide rightly and hold out what they say, its statistics, and a short run that goes on."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from project import ROOT

pytestmark = pytest.mark.cpu  # the study runs on the CPU

FOLDER = ROOT / "examples" / "study"


@pytest.fixture(scope="module")
def study():
    """The modules of the study, by name."""
    pytest.importorskip("scipy", minversion="1.11")
    sys.path.insert(0, str(FOLDER))
    names = ("analysis", "brackets", "protocol", "report", "runs", "text", "walks")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))


def pairs(examples) -> list[tuple[list[int], list[int]]]:
    return list(zip(examples.prompts, examples.completions, strict=True))


# Tasks


def test_every_walk_of_the_data_is_valid_and_its_neighbours_are_judged_by_the_graph(study):
    task = study.walks.Walks()
    edges = {(node, to) for node, own in enumerate(task.edges) for to in own}
    assert len(edges) == study.walks.NODES * study.walks.DEGREE

    def valid(prompt, completion) -> float:
        start, goal, length = prompt
        path = [start, *completion[:-1]]
        steps = all(pair in edges for pair in itertools.pairwise(path))
        ended = completion[-1] == task.eos and len(path) == 1 + length - study.walks.NODES
        return float(steps and ended and path[-1] == goal)

    for part in ("train", "test", "validation", "few", "other"):
        own = pairs(task.examples(part, 3))[:300]
        assert task.quality(*zip(*own, strict=True)) == [1.0] * len(own)
    rng, wrong = random.Random(0), []
    for prompt, completion in pairs(task.examples("test", 0))[:200]:
        place = rng.randrange(len(completion))
        wrong.append((prompt, [*completion[:place], rng.randrange(task.vocab_size), *completion[place + 1 :]]))
        wrong.append((prompt, completion[:place] + completion[place + 1 :] or [task.eos]))
        wrong.append((prompt, completion[:-1]))
    expected = [valid(*own) for own in wrong]
    assert task.quality(*zip(*wrong, strict=True)) == expected
    assert 0 < sum(expected) < len(expected) / 2


def test_pairs_of_nodes_that_are_tested_are_in_no_other_part(study):
    task = study.walks.Walks()
    ends = {part: {tuple(p[:2]) for p in task.examples(part, 1).prompts} for part in ("train", "few", "other")}
    tested, checked = ({tuple(p[:2]) for p in task.examples(part, 0).prompts} for part in ("test", "validation"))
    assert len(tested) >= 1000
    assert not tested & checked
    assert not any((tested | checked) & own for own in ends.values())
    assert pairs(task.examples("few", 1)) == pairs(task.examples("few", 1)) != pairs(task.examples("few", 2))


def balanced(text: str) -> bool:
    """Whether nothing is left when adjacent pairs of brackets are struck out."""
    while (shorter := text.replace("()", "").replace("[]", "").replace("{}", "")) != text:
        text = shorter
    return not text


def test_brackets_are_judged_as_by_striking_out_pairs(study):
    task = study.brackets.Brackets()
    shown = dict(enumerate("([{)]}"))

    def valid(prompt, completion) -> float:
        text = "".join(shown.get(token, "?") for token in [*prompt[1:], *completion[:-1]])
        ended = completion[-1] == task.eos and len(text) == prompt[0] - 2 * study.brackets.TYPES
        return float(ended and balanced(text))

    for part in ("train", "test", "validation", "few", "other"):
        own = pairs(task.examples(part, 0))[:200]
        assert task.quality(*zip(*own, strict=True)) == [1.0] * len(own) == [valid(*one) for one in own]
    rng, changed = random.Random(0), []
    for prompt, completion in pairs(task.examples("test", 0))[:400]:
        a, b = sorted(rng.sample(range(len(completion)), 2))
        swapped = [*completion]
        swapped[a], swapped[b] = swapped[b], swapped[a]
        changed += [(prompt, swapped), (prompt, completion[:-1]), (prompt, [*completion[:a], rng.randrange(6)])]
    expected = [valid(*own) for own in changed]
    assert task.quality(*zip(*changed, strict=True)) == expected
    assert 0 < sum(expected) < len(expected)


def test_beginnings_that_are_tested_are_in_no_other_part(study):
    task = study.brackets.Brackets()
    parts = ("test", "validation", "train")
    tested, checked, seen = ({tuple(prompt) for prompt, _ in task.parts[part]} for part in parts)
    assert len(tested) >= 1000
    assert not tested & checked
    assert not (tested | checked) & seen


def test_no_piece_of_text_is_in_two_parts(study):
    task = study.text.Text()
    texts = {
        part: {tuple(prompt + completion) for prompt, completion in task.parts[part]}
        for part in ("train", "other", "judge", "validation", "test")
    }
    for first, second in itertools.combinations(texts.values(), 2):
        assert not first & second
    assert sum(map(len, task.parts["judge"])) > sum(map(len, task.parts["train"]))


# Statistics


def run_with(entropy: float, quality: float, **others) -> dict:
    """Make the record of a run with some samples, at temperature 1 those given."""
    samples = {"1.0": (entropy, quality), **others}
    return {"samples": {name: {"entropy": e, "quality": q} for name, (e, q) in samples.items()}}


def test_a_gain_counts_above_the_curve_only(study):
    curve = run_with(2.0, 0.4, **{"0.5": (1.0, 0.8), "0.01": (0.0, 0.9)})
    assert study.analysis.above_curve(curve, curve) == 0
    assert study.analysis.above_curve(run_with(1.5, 0.6), curve) == pytest.approx(0.0)
    assert study.analysis.above_curve(run_with(1.0, 0.7), curve) == pytest.approx(-0.1)
    assert study.analysis.above_curve(run_with(1.75, 0.6), curve) == pytest.approx(0.1)
    assert study.analysis.above_curve(run_with(3.0, 0.5), curve) == pytest.approx(0.1)


def test_the_interval_is_students(study):
    values = [0.3, -0.1, 0.25, 0.4]
    own = study.analysis.Difference.of(values)
    half = 3.182446305284263 * statistics.stdev(values) / math.sqrt(4)  # the 97.5 % quantile with 3 degrees of freedom
    assert (own.mean, own.low, own.high) == pytest.approx((0.2125, 0.2125 - half, 0.2125 + half))
    assert (own.p < 0.05) == own.seen == (abs(own.mean) > half)


# Runs


def small(protocol):
    """Cut the protocol down to one task of steps that take milliseconds."""
    regime = replace(protocol.FULL.regimes["walks"][0], base_steps=2, steps=2)
    named = {arm.name: replace(arm, settings=arm.settings[:1]) for arm in protocol.ARMS}
    arms = tuple(named[name] for name in ("MLE", "MLE per text", "AN", "ensemble"))
    return replace(
        protocol.FULL, regimes={"walks": (regime,)}, arms=arms, seeds=(1, 2), learning_rates=(1e-3,), prompts=(8, 8)
    )


def test_a_study_goes_on_where_it_was_and_ends_in_a_report(study, tmp_path, monkeypatch):
    protocol, folder = small(study.protocol), tmp_path / "runs"
    monkeypatch.setattr(study.report, "CURVES", ("MLE", "AN"))
    results = study.runs.Study(protocol, folder).run(1)
    assert len(results["runs"]) == 8
    assert all(run["seconds"] > 0 for (*_, arm, _), run in results["runs"].items() if arm != "ensemble")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "walks-improving-AN-2.json").unlink()
    again = study.runs.Study(protocol, folder).run(1)
    assert again["chosen"] == results["chosen"]
    assert {name for name, at in kept.items() if (folder / name).stat().st_mtime_ns != at} == {
        "walks-improving-AN-2.json",
        "walks-improving-AN-2.pt",
    }
    alike = [again["runs"]["walks", "improving", "AN", 2], results["runs"]["walks", "improving", "AN", 2]]
    assert alike[0] | {"seconds": 0} == alike[1] | {"seconds": 0}
    changed = replace(protocol, batch_size=16)
    with pytest.raises(SystemExit, match="other settings"):
        study.runs.Study(changed, folder).base("walks", protocol.regimes["walks"][0], 0)
    path = tmp_path / "report.md"
    path.write_text("Words of people.\n\n" + study.report.BEGIN + "\n\nA result of before.\n")
    study.report.write_report(protocol, results, path)
    text = path.read_text()
    assert text.startswith("Words of people.")
    assert "of before" not in text
    assert all(f"| {arm.name}" in text for arm in protocol.arms[1:])
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["runs"]["walks / improving / AN / 1"]["nll"] == results["runs"]["walks", "improving", "AN", 1]["nll"]
    assert (tmp_path / "report-curves.png").stat().st_size > 1000


def test_the_command_explains_itself():
    run = subprocess.run([sys.executable, str(FOLDER / "study.py"), "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "--judge-data" in run.stdout
