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

import pytest
import tiny_models
import torch

from cpo_kernels import attach_linear_loss

pytestmark = pytest.mark.cpu  # the demo runs on the CPU

PARAGRAPHS = 56
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("demo")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def text(tmp_path_factory, demo) -> Path:
    """Few paragraphs, as a file for --data."""
    blocks = [block for block in demo.paragraphs(demo.load_text(None)) if demo.is_prose(block)]
    path = tmp_path_factory.mktemp("demo") / "text.txt"
    path.write_text("\n\n".join(blocks[:PARAGRAPHS]), encoding="utf-8")
    return path


def test_paragraphs_are_distinct_and_on_one_line(demo):
    text = "one two three four\nfive six seven eight nine\n\nshort\n\none two three four five six seven eight  nine\n"
    assert demo.paragraphs(text) == ["one two three four five six seven eight nine"]


def test_continuations_give_the_paragraph_back(demo):
    paragraph = " ".join(f"w{i}" for i in range(30))
    pairs = list(demo.continuations(paragraph))
    assert [len(pair["prompt"].split()) for pair in pairs] == [10, 15, 20]
    assert all(pair["prompt"] + pair["completion"] == paragraph for pair in pairs)


def test_nothing_held_out_is_trained_on(demo, text):
    corpus = demo.make_corpus(str(text), seed=0)
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
        demo.make_corpus(str(path), seed=0)


def test_scores_equal_a_dense_computation(demo):
    from cpo_kernels.trainer import tokenize_examples

    examples = tokenize_examples(
        tiny_models.examples(9), tiny_models.tokenizer(), max_length=demo.MAX_LENGTH, max_prompt_length=16
    )
    model = tiny_models.llama()
    dense = tiny_models.llama()
    got = demo.score(attach_linear_loss(model), examples, eos=2)

    def logps(prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = dense(ids).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]

    sampler = demo.NegativeSampler(examples, 2, demo.HELD_OUT_NEGATIVES, demo.HELD_OUT_NEGATIVES, seed=0)
    nll, wins = [], torch.zeros(2)
    for index in range(9):
        batch = demo.ContrastBatch(2, max_length=demo.MAX_LENGTH)
        batch.add_group(examples.prompts[index], examples.completions[index], sampler.draw(index, step=0))
        truth, *others = [logps(examples.prompts[index], segment.tokens) for segment in batch.segments]
        nll.append(truth)
        means = torch.stack([other.mean() for other in others])
        split = demo.HELD_OUT_NEGATIVES
        wins += torch.stack([(truth.mean() > means[:split]).all(), (truth.mean() > means[split:]).all()])
    assert got.perplexity == pytest.approx(math.exp(-torch.cat(nll).mean()), rel=1e-5)
    assert (got.batch_wins, got.truncation_wins) == pytest.approx((wins / 9).tolist())


def head_inputs(demo):
    generator = torch.Generator().manual_seed(0)
    batch = demo.ContrastBatch(2)
    examples = tiny_models.examples(6)
    tokens = demo.tokenize_examples(examples, tiny_models.tokenizer(), max_length=32, max_prompt_length=16)
    sampler = demo.NegativeSampler(tokens, 2, 2, 2, seed=0)
    for index in range(6):
        batch.add_group(tokens.prompts[index], tokens.completions[index], sampler.draw(index, step=0))
    inputs = batch.tensors()
    hidden = torch.randn(inputs["input_ids"].numel(), 16, generator=generator)
    weight = torch.randn(tiny_models.VOCAB, 16, generator=generator)
    inputs["ref_logps"] = torch.randn(len(batch.segments), generator=generator)
    return hidden, weight, inputs


def test_fused_and_eager_head_compute_the_same_loss_and_gradients(demo):
    head = importlib.import_module("demo_head")
    hidden, weight, inputs = head_inputs(demo)
    results = []
    for function in (head.fused, head.eager):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, inputs)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_watch_ends_a_run_at_its_deadline(demo, tmp_path, text):
    corpus = demo.make_corpus(str(text), seed=0)
    trainer = demo.make_trainer(demo.make_model(corpus.tokenizer), corpus, corpus.train, tmp_path, max_steps=50)
    curve = demo.run(trainer, "late", corpus, deadline=time.monotonic(), count=2)
    assert curve.steps == [0, 1]
    assert trainer.state.global_step == 1


def test_the_whole_script(tmp_path, text):
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--data", str(text), "--steps", "2", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a worker of pytest-xdist per core
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for row in ("MLE from scratch", "continued with MLE", "continued with CPO"):
        (cells,) = re.findall(rf"^ *{row} +([\d.]+) +([\d.]+)% +([\d.]+)% *$", done.stdout, re.M)
        assert float(cells[0]) > 1 and all(0 <= float(cell) <= 100 for cell in cells[1:])
    for row in ("head, fused", "head, eager"):
        assert re.search(rf"^ *{row} +\d+ ms +\d+ MiB *$", done.stdout, re.M)
    assert "4 steps from scratch, 2 of each continuation" in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
