"""The benchmark of negatives: what its cases hold, and one run of all of them on tiny models."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import bench_negatives
from benchmarks.bench_negatives import BASE, CASES, MLE, QUICK

pytestmark = pytest.mark.cpu  # tiny models on the host


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return bench_negatives.make_steps("gpt2", QUICK, str(tmp_path_factory.mktemp("bench")))


def test_truncations_take_no_positions_of_the_body(steps):
    for name, step in steps.items():
        step()
        if "truncation" in name:
            assert step.positions == steps[BASE].positions
            assert step.tokens > steps[BASE].tokens


def test_shared_and_separate_rows_have_the_same_loss_and_gradients(steps):
    results = []
    for name in ("batch 4", "batch 4, separate rows"):
        steps[name].trainer.state.global_step = 0
        loss = steps[name]()
        results.append((loss, [p.grad.clone() for p in steps[name].trainer.model.parameters()]))
    assert steps["batch 4"].positions < steps["batch 4, separate rows"].positions
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_positions_and_tokens_are_those_of_the_texts(steps):
    for step in steps.values():
        step()
    groups, length = QUICK.groups, QUICK.tokens
    assert steps[MLE].positions == groups * (2 * length - 1)
    assert steps[BASE].positions == groups * (length + 2 * (length - 1))
    assert steps["batch 4, separate rows"].positions == groups * 5 * (2 * length - 1)
    assert steps["batch 4"].tokens == groups * 5 * length
    assert steps["mean-field 1, by the model"].tokens <= groups * 2 * length


def test_every_call_draws_new_negatives_for_the_same_examples(steps):
    step, gradients = steps[BASE], set()
    for _ in range(3):
        step()  # the loss of a model that is its own reference is the same for all negatives, its gradient is not
        gradients.add(float(next(step.trainer.model.parameters()).grad.norm()))
    assert len(gradients) == 3


def test_the_whole_benchmark(tmp_path, capsys):
    out = tmp_path / "negatives.md"
    bench_negatives.main(["--quick", "--rounds", "1", "--models", "llama", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.strip() in out.read_text()
    for name in CASES:
        cells, *cut = re.findall(rf"^\| {re.escape(name)} +\|(.+)\|$", printed, re.M)
        positions, tokens, best, median, making, of_mle, of_base = map(float, cells.split("|"))
        assert positions > 0 and tokens > 0 and of_mle > 0 and of_base > 0
        assert 0 < best <= median and making <= median
        assert len(cut) == (name == BASE or "truncation" in name)
        if "truncation" in name:
            again, best, median, of_best, of_median, bar = map(float, cut[0].split("|"))
            assert again > 0 and 0 < best <= median and of_best > 0 and of_median > 0 and bar == 1.05
    assert "- commit:" in out.read_text()


def test_the_time_of_the_processor(capsys):
    bench_negatives.main(["--quick", "--rounds", "1", "--models", "gpt2", "--cpu-time"])
    assert "## gpt2" in capsys.readouterr().out
