"""Mean-field negatives in training: who draws them, what they replace, and what the reference is spared."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from trainer_runs import trainer
from trainer_steps import NONE, candidates, micro_batch

from cpo_kernels import linear_token_statistics
from cpo_kernels.negatives import mean_field_negatives, token_seeds, write_negatives
from cpo_kernels.negatives.endings import until_end
from cpo_kernels.trainer.along_truth import Reading
from cpo_kernels.trainer.negatives import Drawn

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("source", ["model", "reference"])
def test_mean_field_negatives_come_from_who_was_asked(tmp_path, source):
    """One of the two is sure of a single word after anything: its negatives are that word over and over."""
    word = tiny_models.tokenizer()("river")["input_ids"][0]
    sure, other = tiny_models.sure_of(tiny_models.llama(), word), tiny_models.llama(seed=1)
    model, reference = (sure, other) if source == "model" else (other, sure)
    options = {"num_mean_field_negatives": 2, "mean_field_source": source, "mean_field_fraction": 1.0, **NONE}
    run = trainer(tmp_path, model, ref_model=reference, **options)
    for truth, *drawn in candidates(run, micro_batch(run, [0, 1, 2])):
        assert drawn == [[word] * len(truth)] * 2


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("source", ["model", "reference"])
def test_mean_field_negatives_replace_a_share_and_keep_the_rest(tmp_path, source, fraction):
    """The model that draws is sure of a word that no ground truth has, so what it replaced can be counted."""
    words = tiny_models.tokenizer()
    word = words("river")["input_ids"][0]
    texts = ["sat", "sat on", "sat on the mat", "ran over the mat and sat", "ran and sat on the mat and the tree"]
    data = [{"prompt": "the cat", "completion": " " + text} for text in texts]
    sure, other = tiny_models.sure_of(tiny_models.llama(), word), tiny_models.llama(seed=1)
    model, reference = (sure, other) if source == "model" else (other, sure)
    options = {"num_mean_field_negatives": 3, "mean_field_source": source, "mean_field_fraction": fraction, **NONE}
    run = trainer(tmp_path, model, data, ref_model=reference, **options)
    for truth, *drawn in candidates(run, micro_batch(run, range(len(texts)))):
        assert len(drawn) == 3 and truth[-1] == words.eos_token_id
        for negative in drawn:
            assert len(negative) == len(truth) and negative[-1] == truth[-1]
            changed = [new for new, old in zip(negative, truth, strict=True) if new != old]
            assert changed == [word] * max(1, round(fraction * (len(truth) - 1)))


def test_a_mean_field_fraction_of_one_draws_what_it_always_drew(tmp_path):
    """Held against one sample of every token of the reference's own rows, cut behind the first EOS."""
    reference = tiny_models.llama(seed=1)
    options = {"num_mean_field_negatives": 3, "mean_field_fraction": 1.0, **NONE}
    run = trainer(tmp_path, ref_model=reference, **options)
    for index, (truth, *drawn) in zip([4, 9], candidates(run, micro_batch(run, [4, 9])), strict=True):
        prompt = run.train_dataset.prompts[index]
        with torch.no_grad():
            hidden = reference.model(torch.tensor([[*prompt, *truth]])).last_hidden_state[0, len(prompt) - 1 : -1]
        seeds = token_seeds(run.args.seed, 0, index, len(truth))
        targets = torch.tensor(truth)
        out = linear_token_statistics(hidden, reference.lm_head.weight, targets, seed=seeds, num_samples=3)
        assert drawn == [until_end(own, 2) for own in out.samples.T.tolist() if own != truth]


def test_negatives_that_a_loop_writes_to_a_file_are_those_of_the_first_step(tmp_path):
    """The loop of docs/negatives.md: training on its file has the candidates that a trainer draws itself."""
    reference = tiny_models.llama(seed=1)
    drawing = trainer(tmp_path, ref_model=reference, num_mean_field_negatives=4, **NONE)
    data = drawing.train_dataset
    examples = [{"prompt": p, "completion": c} for p, c in zip(data.prompts, data.completions, strict=True)]
    written = []
    for index, example in enumerate(examples):
        prompt, truth = example["prompt"], example["completion"]
        with torch.no_grad():
            hidden = reference.base_model(torch.tensor([prompt + truth])).last_hidden_state[0, len(prompt) - 1 : -1]
        seeds = token_seeds(drawing.args.seed, 0, index, len(truth))
        written += mean_field_negatives(
            hidden, reference.lm_head.weight, torch.tensor(truth), seeds=seeds, count=4, eos_token_id=2
        )
    path = tmp_path / "mean-field.jsonl"
    write_negatives(path, examples, written, kind="mean_field")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    reading = trainer(tmp_path, examples=rows, ref_model=reference, **NONE)
    indices = range(len(examples))
    inputs, own = micro_batch(reading, indices), micro_batch(drawing, indices)
    assert candidates(reading, inputs) == candidates(drawing, own)
    assert inputs["kinds"] == own["kinds"] and own["kinds"].count("mean_field") > 2 * len(examples)


def test_only_what_is_replaced_is_drawn(tmp_path):
    run = trainer(tmp_path, num_mean_field_negatives=5, mean_field_fraction=0.5, num_truncation_negatives=2)
    indices = [0, 3, 7]
    truncations = [Drawn(run._negatives.sampler(run.train_dataset).draw(index, 0)) for index in indices]
    readings = run._negatives._read(run.train_dataset, indices, 0, truncations)
    for index, reading in zip(indices, readings, strict=True):
        length = len(run.train_dataset.completions[index])
        assert ((reading.samples >= 0).sum(1) == max(1, round(0.5 * (length - 1)))).all()
        assert (reading.samples[:, -1] == -100).all()


def test_mean_field_negatives_are_a_function_of_step_and_example(tmp_path):
    run = trainer(tmp_path, num_mean_field_negatives=2, **NONE)
    alone = candidates(run, micro_batch(run, [5]))[0]
    assert candidates(run, micro_batch(run, [1, 5, 2]))[1] == alone
    run.state.global_step = 1
    assert candidates(run, micro_batch(run, [5]))[0] != alone


def test_a_draw_equal_to_the_truth_alone_has_no_gradient(tmp_path, monkeypatch):
    run = trainer(tmp_path, num_mean_field_negatives=2, alpha=1.0, **NONE)
    truth = run.train_dataset.completions[0]
    reading = Reading(torch.tensor([truth, truth]), logp=0.0, cut_logps=[])
    monkeypatch.setattr(run._negatives, "_read", lambda *_: [reading])
    monkeypatch.setattr(type(run._negatives), "_reads_with_reference", False)
    inputs = micro_batch(run, [0])
    assert candidates(run, inputs) == [[truth, truth]]
    run._forward(run.model, inputs).loss.backward()
    assert max(p.grad.abs().max() for p in run.model.parameters()) < 1e-6


@pytest.mark.parametrize("sharing", ["off", "required"])
def test_the_reference_reads_no_ground_truth_twice(tmp_path, sharing):
    """The pass that draws gives the log-likelihoods of ground truths and truncations, which are those of a full one."""
    options = {"num_mean_field_negatives": 2, "num_batch_negatives": 1, "num_truncation_negatives": 2}
    options |= {"prefix_sharing": sharing, "ref_model": tiny_models.llama(seed=1)}
    run = trainer(tmp_path, mean_field_source="reference", **options)
    rows = []
    run.ref_model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True
    )
    inputs = micro_batch(run, [0, 3, 5])
    got = run._reference_logps(inputs)
    drawn, rest = rows
    assert drawn.shape[0] == 3
    assert rest.shape[0] == 3 * 3 or sharing == "required"
    without = {name: value for name, value in inputs.items() if name not in ("ref_logps", "unknown", "unread")}
    torch.testing.assert_close(got, run._reference_logps(without), rtol=1e-5, atol=1e-5)
    assert rows[-1].numel() > rest.numel()
