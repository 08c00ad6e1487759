"""The demo: its data, its scores, its measurement of the head, and one short run of the whole script."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from project import ROOT

from cpo_kernels import attach_linear_loss
from cpo_kernels.trainer import ContrastBatch, NegativeSampler

pytestmark = pytest.mark.cpu  # the demo runs on the CPU

PARAGRAPHS = 56
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def demo():
    """The script and its parts, by name."""
    sys.path.insert(0, str(EXAMPLES))
    names = ("demo", "demo_head", "demo_scores", "demo_text", "demo_training")
    yield SimpleNamespace(**{name.removeprefix("demo_"): importlib.import_module(name) for name in names})
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def text(tmp_path_factory, demo) -> Path:
    """Few paragraphs, as a file for --data."""
    blocks = [block for block in demo.text.paragraphs(demo.text.load_text(None)) if demo.text.is_prose(block)]
    path = tmp_path_factory.mktemp("demo") / "text.txt"
    path.write_text("\n\n".join(blocks[:PARAGRAPHS]), encoding="utf-8")
    return path


def test_paragraphs_are_distinct_and_on_one_line(demo):
    text = "one two three four\nfive six seven eight nine\n\nshort\n\none two three four five six seven eight  nine\n"
    assert demo.text.paragraphs(text) == ["one two three four five six seven eight nine"]


def test_continuations_give_the_paragraph_back(demo):
    paragraph = " ".join(f"w{i}" for i in range(30))
    pairs = list(demo.text.continuations(paragraph))
    assert [len(pair["prompt"].split()) for pair in pairs] == [10, 15, 20]
    assert all(pair["prompt"] + pair["completion"] == paragraph for pair in pairs)


def test_nothing_held_out_is_trained_on(demo, text):
    corpus = demo.text.make_corpus(str(text), seed=0)
    assert len(corpus.held_out) == 3 * (PARAGRAPHS // 8)
    assert len(corpus.train) == 3 * (PARAGRAPHS - PARAGRAPHS // 8)

    def texts(examples):
        return {
            corpus.tokenizer.decode([*p, *c], skip_special_tokens=True)
            for p, c in zip(examples.prompts, examples.completions, strict=True)
        }

    held_out = texts(corpus.held_out)
    assert not held_out & texts(corpus.train)
    assert not any(held in seen for held in held_out for seen in texts(corpus.texts))


def test_too_little_text_is_refused(demo, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("nothing here", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"short.txt: the demo needs at least 50 paragraphs .* found 0"):
        demo.text.make_corpus(str(path), seed=0)


def tiny_examples(demo, count):
    return demo.text.tokenize_examples(
        tiny_models.examples(count), tiny_models.tokenizer(), max_length=demo.text.MAX_LENGTH, max_prompt_length=16
    )


def test_every_model_is_scored_with_the_same_negatives_of_all_kinds(demo):
    examples, model = tiny_examples(demo, 9), attach_linear_loss(tiny_models.llama(max_position_embeddings=96))
    cheap = demo.scores.cheap_negatives(examples, 2)
    negatives = demo.scores.every_negative(model, examples, 2)
    again = demo.scores.every_negative(model.train(), examples, 2)
    assert negatives == again
    for own, first, truth in zip(negatives, cheap, examples.completions, strict=True):
        assert own[: len(first)] == first
        assert {negative.kind for negative in own} == set(demo.scores.KINDS)
        drawn = [negative.tokens for negative in own if negative.kind in ("mean_field", "autoregressive")]
        assert all(tokens and tokens != truth for tokens in drawn)
    # Drawn along the ground truths, and not written one after the other
    lengths = [len(truth) for truth in examples.completions]
    fields = [[n.tokens for n in own if n.kind == "mean_field"] for own in negatives]
    assert all(len(tokens) <= length for own, length in zip(fields, lengths, strict=True) for tokens in own)


def test_mean_field_negatives_of_a_sure_model_are_its_likeliest_tokens(demo):
    model = attach_linear_loss(tiny_models.llama())
    examples = tiny_examples(demo, 5)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        drawn, changed = demo.scores.draw(model, examples, 1, 3, eos=2), 0
        for index, own in zip(range(1, 4), drawn, strict=True):
            prompt, completion = examples.prompts[index], examples.completions[index]
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
            likeliest = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
            for negative in own:
                places = [place for place, token in enumerate(negative) if token != completion[place]]
                assert all(negative[place] == likeliest[place] for place in places)
                assert len(places) <= max(1, round(0.25 * (len(completion) - 1)))
                assert len(negative) == len(completion) or negative[-1] == 2
            assert completion not in own and len(own) <= demo.scores.HELD_OUT_NEGATIVES
            changed += len(own)
    assert changed > 0


def test_scores_equal_a_dense_computation(demo):
    examples = tiny_examples(demo, 9)
    model = attach_linear_loss(tiny_models.llama(max_position_embeddings=96))
    dense = tiny_models.llama(max_position_embeddings=96)
    negatives = demo.scores.every_negative(model, examples, 2)
    got = demo.scores.score(model, examples, negatives, eos=2)

    def logps(prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = dense(ids).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]

    nll, wins = [], {kind: 0 for kind in demo.scores.KINDS}
    for prompt, completion, own in zip(examples.prompts, examples.completions, negatives, strict=True):
        truth = logps(prompt, completion)
        nll.append(truth)
        means = {kind: [] for kind in wins}
        for negative in own:
            tokens = negative.tokens if negative.cut is None else [*completion[: negative.cut], 2]
            means[negative.kind].append(logps(prompt, tokens).mean())
        for kind, values in means.items():
            wins[kind] += all(truth.mean() > value for value in values)
    assert got.perplexity == pytest.approx(math.exp(-torch.cat(nll).mean()), rel=1e-5)
    assert got.wins == pytest.approx({kind: count / 9 for kind, count in wins.items()})


def head_inputs(demo):
    generator = torch.Generator().manual_seed(0)
    batch = ContrastBatch(2)
    tokens = tiny_examples(demo, 6)
    sampler = NegativeSampler(tokens, 2, 2, 2, seed=0)
    for index in range(6):
        batch.add_group(tokens.prompts[index], tokens.completions[index], sampler.draw(index, step=0))
    inputs = batch.tensors()
    hidden = torch.randn(inputs["input_ids"].numel(), 16, generator=generator)
    weight = torch.randn(tiny_models.VOCAB, 16, generator=generator)
    inputs["ref_logps"] = torch.randn(len(batch.segments), generator=generator)
    return hidden, weight, inputs


def test_fused_and_eager_head_compute_the_same_loss_and_gradients(demo):
    hidden, weight, inputs = head_inputs(demo)
    results = []
    for function in (demo.head.fused, demo.head.eager):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, inputs)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def trainer_and_scores(demo, text, out, steps, **options):
    corpus = demo.text.make_corpus(str(text), seed=0)
    trainer = demo.training.make_trainer(
        demo.training.make_model(corpus), corpus, corpus.train, out, max_steps=steps, **options
    )
    negatives = demo.scores.cheap_negatives(corpus.held_out, corpus.eos)

    def evaluate(model):
        time.sleep(0.5)
        return demo.scores.score(model, corpus.held_out, negatives, corpus.eos, 2)

    return trainer, evaluate


def test_the_watch_ends_a_run_at_its_deadline(demo, tmp_path, text):
    trainer, evaluate = trainer_and_scores(demo, text, tmp_path, 50, **demo.training.negatives())
    curve = demo.training.run(trainer, "late", evaluate, time.monotonic(), evaluate(trainer.model), records=4)
    assert curve.steps == [0, 1]
    assert trainer.state.global_step == len(curve.seconds) == 1


@pytest.mark.parametrize("kind", ["batch", "truncation"])
def test_the_watch_sees_sharing_and_times_steps_without_scores(demo, tmp_path, text, kind):
    trainer, evaluate = trainer_and_scores(demo, text, tmp_path, 3, **demo.training.negatives(**{kind: 2}))
    deadline, first, begun = float("inf"), evaluate(trainer.model), time.monotonic()
    curve = demo.training.run(trainer, kind, evaluate, deadline, first, records=3)
    took = time.monotonic() - begun
    assert curve.steps == [0, 1, 2, 3]
    assert curve.shared == [kind == "batch"] * 3  # truncations have no rows of their own
    assert len(curve.seconds) == 3 and sum(curve.seconds) <= took - 3 * 0.5
    assert not trainer.model._forward_pre_hooks


def test_the_whole_script(tmp_path, text):
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--data", str(text), "--steps", "1", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a worker of pytest-xdist per core
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    scored = r"([\d.]+) +([\d.]+)% +([\d.]+)% +([\d.]+)% +([\d.]+)% +\d+ +([\d.]+)%"
    for row in ("all kinds", "MLE", "batch", "truncation", "mean-field", "autoregressive"):
        (cells,) = re.findall(rf"^ *{row} +(\d+) +([\d.]+) +{scored} *$", done.stdout, re.M)
        step, times, perplexity, *shares = map(float, cells)
        assert step > 0 and times > 0 and perplexity > 1 and all(0 <= share <= 100 for share in shares)
    assert re.search(rf"^ *from scratch +\d+ +{scored} *$", done.stdout, re.M)
    assert re.search(r"^ *ground truth +\d+ +[\d.]+% *$", done.stdout, re.M)
    for row in ("head, fused", "head, eager"):
        assert re.search(rf"^ *{row} +\d+ ms +\d+ MiB *$", done.stdout, re.M)
    assert "2 steps from scratch, 1 of each continuation" in done.stdout
    assert "batch 100%" in " ".join(done.stdout.split())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
