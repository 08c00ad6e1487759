"""The demo: its data, its scores, its measurement of the head, and one short run of the whole script."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from project import ROOT
from rich.console import Console

from cpo_kernels import attach_linear_loss

pytestmark = pytest.mark.cpu  # the demo runs on the CPU

PARAGRAPHS = 56
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def demo():
    """The parts of the script, by name."""
    sys.path.insert(0, str(EXAMPLES))
    yield SimpleNamespace(**{name: importlib.import_module(f"demo_{name}") for name in ("head", "text", "training")})
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def text(tmp_path_factory, demo) -> Path:
    """Few paragraphs, as a file for --data."""
    path = tmp_path_factory.mktemp("demo") / "text.txt"
    prose = demo.text.paragraphs("\n\n".join(topics[name] for name in sorted(topics)))
    path.write_text("\n\n".join(prose[:PARAGRAPHS]), encoding="utf-8")
    return path


def test_paragraphs_are_prose_on_one_line_and_distinct(demo):
    prose = "one two three four five six\nseven eight nine ten eleven twelve"
    code = "a = 1 + 2; b = {3: 4, 5: 6}; c = [7, 8, 9]; d = (10, 11, 12)"
    text = f"{prose}\n\nshort\n\n{code}\n\n{prose.replace('six', 'six ')}\r\n\r\n"
    assert demo.text.paragraphs(text) == [prose.replace("\n", " ")]


def test_the_library_of_python_is_read_and_what_is_installed_beside_it_is_not(demo, tmp_path, monkeypatch):
    written = {"module.py": "a module", "site-packages/other.py": "installed", "package/test/case.py": "a test"}
    for name, docstring in written.items():
        path = tmp_path / "test" / name  # the folder of the library itself may have any name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'"""{docstring}"""\nclass A:\n    """a class"""\n    def f(self): "a method"\n', encoding="utf-8"
        )
    monkeypatch.setattr(demo.text.sysconfig, "get_path", lambda name: str(tmp_path / "test"))
    assert demo.text.load_text(None).endswith("\n\na module\n\na class\n\na method")
    assert "installed" not in demo.text.load_text(None).split("\n\n")


def test_an_example_is_its_paragraph(demo):
    paragraph = " ".join(f"w{i}" for i in range(30))
    example = demo.text.as_example(paragraph)
    assert len(example["prompt"].split()) == 10
    assert example["prompt"] + example["completion"] == paragraph


@pytest.mark.parametrize(("asked", "held"), [(5, 5), (400, PARAGRAPHS // 4)])
def test_nothing_held_out_is_trained_on(demo, text, asked, held):
    corpus = demo.text.make_corpus(text, asked, seed=0)
    assert (len(corpus.held_out), len(corpus.train)) == (held, PARAGRAPHS - held)

    def texts(examples):
        return {
            corpus.tokenizer.decode([*p, *c], skip_special_tokens=True)
            for p, c in zip(examples.prompts, examples.completions, strict=True)
        }

    assert not texts(corpus.held_out) & texts(corpus.train)


def test_too_little_text_is_refused(demo, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("nothing here", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"short.txt: the demo needs at least 48 paragraphs .* found 0"):
        demo.text.make_corpus(path, 8, seed=0)


@pytest.fixture(scope="module")
def examples(demo):
    return demo.text.tokenize_examples(
        tiny_models.examples(19), tiny_models.tokenizer(), max_length=demo.text.MAX_LENGTH, max_prompt_length=16
    )


def test_mean_field_negatives_of_a_sure_model_are_its_likeliest_tokens(demo, examples):
    model, changed = attach_linear_loss(tiny_models.llama()), 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        for index, (prompt, truth) in enumerate(zip(examples.prompts, examples.completions, strict=True)):
            negatives = demo.training.draw(model, prompt, truth, index, eos=2)
            logits = model(torch.tensor([[*prompt, *truth]])).logits[0]
            likeliest = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
            for drawn in negatives:
                places = [place for place, token in enumerate(drawn) if token != truth[place]]
                assert all(drawn[place] == likeliest[place] for place in places)
                assert len(drawn) == len(truth) or drawn[-1] == 2
            changed += len(negatives)
    assert changed > 0


def test_scores_equal_a_dense_computation(demo, examples):
    start, model = (attach_linear_loss(tiny_models.llama(seed, max_position_embeddings=96)) for seed in (0, 1))
    held_out = demo.training.HeldOut(start, examples, eos=2)
    logps = held_out.logps(model)

    def dense(model, prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0].sum()

    losses, wins, candidate = [], {kind: [] for kind in demo.training.KINDS}, 0
    tokens = [  # of every candidate, from what the batches ask of the model
        targets.tolist()
        for batch in held_out.batches
        for targets in batch["targets"].split(torch.tensor(batch["cu_tokens"]).diff().tolist())
    ]
    for prompt, truth in zip(examples.prompts, examples.completions, strict=True):
        assert held_out.kinds[candidate] == "truth" and tokens[candidate] == list(truth)
        gain = dense(model, prompt, truth) - dense(start, prompt, truth)
        losses.append(-dense(model, prompt, truth) / len(truth))
        candidate += 1
        while candidate < len(tokens) and held_out.kinds[candidate] != "truth":
            other = tokens[candidate]
            assert other != list(truth)
            rival = dense(model, prompt, other) - dense(start, prompt, other)
            wins[held_out.kinds[candidate]].append(float(gain > rival))
            candidate += 1
    assert candidate == len(held_out.kinds)
    torch.testing.assert_close(held_out.losses(logps), torch.stack(losses), rtol=1e-5, atol=1e-5)
    for kind, expected in wins.items():
        assert len(expected) > len(examples) // 2
        assert held_out.wins(logps, kind).tolist() == expected


def test_two_runs_are_the_same_run(demo, text, tmp_path):
    corpus = demo.text.make_corpus(text, 8, seed=0)
    runs = [demo.training.train_all(corpus, 2, 1, 0, tmp_path, Console(quiet=True)) for _ in range(2)]
    assert [*runs[0].logps] == [None, *demo.training.KINDS]
    for kind, logps in runs[0].logps.items():
        assert torch.equal(logps, runs[1].logps[kind])
        assert not torch.equal(logps, runs[0].held_out.start)


def test_a_difference_is_paired(demo):
    ours, theirs = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    difference = demo.training.Difference.of(ours, theirs)
    assert difference.mean == 0.5
    assert difference.margin == pytest.approx(2 * statistics.stdev([1, 0, 0, 1]) / 2)
    assert difference.text() == "none seen"


def test_a_difference_within_two_standard_errors_is_none_seen(demo):
    difference = demo.training.Difference
    assert difference(0.05, 0.05).text() == difference(-0.04, 0.05).text() == difference(0.0, 0.0).text() == "none seen"
    assert difference(-0.12, 0.05).text() == "-12.0 ± 5.0"
    assert difference(0.1, 0.02).exp().text("%") == "+10.5% ± 2.2%"


def test_power_is_that_of_the_number_of_steps(demo):
    error, seen = demo.training.power(demo.training.HELD_OUT)
    assert error == pytest.approx(3.0)
    # A normal variable of mean seen / error is above 2 with this probability.
    assert 1 - statistics.NormalDist(seen / error).cdf(2) == pytest.approx(0.8, abs=0.001)


def test_both_heads_compute_the_same_loss_and_gradients(demo):
    inputs = demo.head.make_inputs(demo.head.QUICK, 3)
    losses = [function(*inputs) for function in demo.head.LOSSES.values()]
    gradients = [torch.autograd.grad(loss, inputs[:2]) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_other_losses_are_refused(demo):
    demo.head.check_same({"one": 1.0, "two": 1.00001})
    for other in (1.1, float("nan")):
        with pytest.raises(RuntimeError, match=f"one computes the loss 1.0 and two computes the loss {other}"):
            demo.head.check_same({"one": 1.0, "two": other})


def test_the_peak_counts_what_a_call_allocates(demo):
    sizes, groups = demo.head.Sizes(vocabulary=16384, hidden=256), 2
    gradients = 4 * sizes.hidden * (sizes.vocabulary + groups * demo.head.TOKENS)
    logits = 4 * sizes.vocabulary * groups * demo.head.TOKENS
    peaks = {name: demo.head.peak_elsewhere(name, sizes, groups) for name in demo.head.LOSSES}
    assert peaks["plain PyTorch"] > gradients + 2 * logits
    assert gradients < peaks["cpo-kernels"] < peaks["plain PyTorch"]


@pytest.mark.parametrize("growth", [lambda n: 40 + 7 * n, lambda n: 40 + n + n**1.5, lambda n: 9 * n**0.8])
@pytest.mark.parametrize("limit", [47, 100, 555])
def test_the_largest_batch_is_found_by_measuring_it(demo, growth, limit):
    measured = {}

    def peak(groups):
        return measured.setdefault(groups, int(growth(groups)))

    found, own = demo.head.largest_batch(peak, limit, most=64)
    fitting = [groups for groups in range(1, 65) if int(growth(groups)) <= limit]
    assert (found, own) == (fitting[-1], measured[found])
    assert found == 64 or measured[found + 1] > limit


def test_a_limit_below_one_group_is_refused(demo):
    with pytest.raises(RuntimeError, match="one group takes 47 bytes, more than the limit of 46"):
        demo.head.largest_batch(lambda groups: 40 + 7 * groups, 46, most=64)


def test_the_whole_script(tmp_path, text):
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--data", str(text), "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a worker of pytest-xdist per core
    done = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for row in ("plain PyTorch", "cpo-kernels"):
        assert re.search(rf"^ *{row} +[\d.]+ s +[\d,]+ MiB +(at least )?[\d,]+ *$", done.stdout, re.M)
    difference = r"(none seen|[+-][\d.]+%? ± [\d.]+%?)"
    for row in ("batch", "truncation", "mean-field", "autoregressive"):
        cells = rf"^ *{row} +[\d.]+ +\d+% +\d+% +{difference} +{difference} *$"
        assert re.search(cells, done.stdout, re.M), done.stdout
    assert re.search(r"^ *none \(MLE\) +1\.00 +[\d.]+ *$", done.stdout, re.M)
    assert "in 2 steps of 16" in " ".join(done.stdout.split()) and "take 1 more" in " ".join(done.stdout.split())
    assert re.search(r"prompt +MLE +CPO, mean-field +CPO, truncation", done.stdout)
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    # What to run next is there
    program, *rest = shlex.split(lines[-1].removeprefix("Next: "))
    assert program == ".venv/bin/cpo-kernels"
    assert (ROOT / next(word for word in rest if word.endswith(".yaml"))).is_file()
