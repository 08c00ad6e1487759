"""Negatives in training: who writes them, and when, and where they end."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from trainer_runs import parameters, steps, trainer
from trainer_steps import NONE, candidates, micro_batch

from cpo_kernels.negatives import Completion, batch_negatives
from cpo_kernels.trainer import TokenizedExamples

pytestmark = pytest.mark.cpu


def test_drawing_leaves_generators_and_modes_alone(tmp_path):
    model = tiny_models.gpt2(resid_pdrop=0.5)
    run = trainer(
        tmp_path, model, num_mean_field_negatives=1, num_autoregressive_negatives=1, mean_field_source="model"
    )
    run.model.train()
    before = torch.random.get_rng_state()
    first = candidates(run, micro_batch(run, [0, 1]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in run.model.modules())
    run._negatives.store.negatives.clear()
    assert candidates(run, micro_batch(run, [0, 1])) == first, "dropout takes no part"


# The rule for draws equal to the truth


def test_a_draw_equal_to_the_truth_is_left_out_whatever_ends_it_and_as_far_as_it_fits(tmp_path):
    """With two ends, and a second example whose completion is cut to the two tokens behind its prompt that fit."""
    model = tiny_models.llama()
    model.generation_config.eos_token_id = [2, 9]
    examples = [
        {"prompt": [3, 4], "completion": [5, 6, 7, 2]},
        {"prompt": [3] * 30, "completion": [5, 6, 7, 2]},
    ]
    run = trainer(tmp_path, model, examples, num_autoregressive_negatives=5, max_prompt_length=30, **NONE)
    right = [[5, 6, 7, 2], [5, 6, 7], [5, 6, 7, 9], [5, 6, 7, 9, 2]], [[5, 6], [5, 6, 2], [5, 6, 8, 8]]
    wrong = [[5, 6, 7, 8], [5, 6], [2]], [[5, 7], [5], [9]]
    assert run.train_dataset.completions == [[5, 6, 7, 2], [5, 6]]
    run._negatives.store.negatives = {(0, index): [*right[index], *wrong[index]] for index in range(2)}
    drawn = run._negatives.draw(run.train_dataset, [0, 1], 0)
    assert [[negative.tokens for negative in own.negatives] for own in drawn] == [*wrong]


def test_completions_that_differ_in_their_ends_are_one_batch_negative(tmp_path):
    examples = TokenizedExamples([[3]] * 3, [[5, 6, 2], [5, 6], [7, 2]])
    options = {"num_batch_negatives": 1, "num_truncation_negatives": 0}
    run = trainer(tmp_path, examples=examples, **options)
    drawn = run._negatives.draw(examples, range(3), 0)
    assert [[negative.tokens for negative in own.negatives] for own in drawn[:2]] == [[[7, 2]]] * 2
    with pytest.raises(ValueError, match=r"2 batch negatives .* 3 examples have 2 distinct ones"):
        trainer(tmp_path, examples=examples, **(options | {"num_batch_negatives": 2}))


def test_batch_negatives_of_a_plain_loop_are_those_of_training(tmp_path):
    run = trainer(tmp_path, num_batch_negatives=2, num_truncation_negatives=0, seed=7)
    completions, indices = run.train_dataset.completions, [3, 0, 11]
    drawn = run._negatives.draw(run.train_dataset, indices, 5)
    own = batch_negatives(completions, 2, indices=indices, seed=7, step=5, eos_token_id=2)
    assert [[list(negative.tokens) for negative in group.negatives] for group in drawn] == own


# Autoregressive


def test_autoregressive_negatives_are_written_for_several_steps_at_once(tmp_path, monkeypatch):
    run = trainer(
        tmp_path,
        num_autoregressive_negatives=2,
        autoregressive_every=3,
        max_steps=5,
        gradient_accumulation_steps=2,
        **NONE,
    )
    calls = []
    write = run._negatives._write
    monkeypatch.setattr(run._negatives, "_write", lambda e, i, s: calls.append((s, len(i))) or write(e, i, s))
    run.train()
    # 16 examples are 2 steps of 8 an epoch: the window of 3 steps ends with the epoch.
    assert [step for step, _ in calls] == [0, 2, 3, 4]
    assert calls[0] == (0, 16)
    assert len(steps(run)) == 5


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(12, [(0, 12), (3, 4), (4, 4)]), (7, [(step, 4) for step in range(5)]), (3, [(step, 4) for step in range(5)])],
)
def test_steps_whose_texts_fill_a_batch_are_written_at_once_by_default(tmp_path, monkeypatch, batch_size, expected):
    """Four texts a step, four steps an epoch; a window of three steps ends with the epoch, and with the run."""
    options = {"autoregressive_batch_size": batch_size, "num_autoregressive_negatives": 1, "max_steps": 5, **NONE}
    run = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    calls = []
    write = run._negatives._write
    monkeypatch.setattr(run._negatives, "_write", lambda e, i, s: calls.append((s, len(i))) or write(e, i, s))
    run.train()
    assert calls == expected


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumed_within_a_window_has_the_negatives_of_the_uninterrupted_one(tmp_path, stop):
    kwargs = {
        "num_autoregressive_negatives": 1,
        "autoregressive_every": 3,
        "num_mean_field_negatives": 1,
        "max_steps": 5,
    }
    kwargs |= {"save_strategy": "steps", "save_steps": stop, "per_device_train_batch_size": 2, **NONE}
    kwargs |= {"mean_field_source": "model"}
    whole = trainer(tmp_path, **kwargs)
    whole.train()
    resumed = trainer(tmp_path, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert steps(resumed) == steps(whole)


def test_negatives_that_are_not_resampled_are_written_once(tmp_path, monkeypatch):
    run = trainer(
        tmp_path, num_autoregressive_negatives=1, num_batch_negatives=1, resample_negatives=False, max_steps=6
    )
    seen: dict[int, list] = {}
    build = run._batches.build

    def record(examples, indices, step, contrast):
        batch = build(examples, indices, step, contrast)
        for index, (start, end) in zip(indices, zip(batch.groups, batch.groups[1:], strict=False), strict=True):
            own = [list(segment.tokens) for segment in batch.segments[start:end]]
            assert seen.setdefault(index, own) == own
        return batch

    monkeypatch.setattr(run._batches, "build", record)
    run.train()
    assert len(seen) == 16


def test_a_server_writes_in_place_of_the_model(tmp_path, monkeypatch):
    asked = []

    class Endpoint:
        def __init__(self, url, model, api_key=None):
            asked.append((url, model, api_key))

        def negatives(self, prompts, count, sampling):
            asked.append(list(prompts))
            return [[Completion("river tree", ended=True), Completion("mat", ended=False)] for _ in prompts]

    monkeypatch.setattr("cpo_kernels.trainer.writing.CompletionsEndpoint", Endpoint)
    monkeypatch.setenv("CPO_KERNELS_COMPLETIONS_KEY", "secret")
    options = {"autoregressive_url": "http://localhost/v1", "autoregressive_model": "writer"}
    run = trainer(tmp_path, num_autoregressive_negatives=2, **options, **NONE)
    words = tiny_models.tokenizer()
    for truth, *written in candidates(run, micro_batch(run, [0, 1])):
        assert truth not in written
        assert written == [[*words("river tree")["input_ids"], words.eos_token_id], words("mat")["input_ids"]]
    assert asked[0] == ("http://localhost/v1", "writer", "secret")
    assert asked[1] == [example["prompt"] for example in tiny_models.examples(2)]


# Logs


def test_logs_of_negatives_are_plain_json(tmp_path):
    run = trainer(tmp_path, num_mean_field_negatives=1, num_autoregressive_negatives=1, max_steps=2)
    run.train()
    assert json.loads(json.dumps(steps(run))) == steps(run)


# Conversations, whose turns have an end of their own


def chat_tokenizer():
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


def talk(question: str, answer: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


TALKS = [talk("the cat", "sat on the mat"), talk("a dog", "ran"), talk("a bird", "flew over the tree")]


def test_every_candidate_of_a_conversation_ends_as_a_turn_ends(tmp_path):
    """A truncation that ended with another token than the answer once was the whole right answer and one token more."""
    tokenizer = chat_tokenizer()
    turn_end, words = len(tokenizer) - 1, tokenizer.convert_tokens_to_ids
    model = tiny_models.llama(vocab_size=len(tokenizer))
    counts = {"num_batch_negatives": 1, "num_truncation_negatives": 3}
    run = trainer(tmp_path, model, TALKS, tokenizer=tokenizer, **counts)
    groups = candidates(run, micro_batch(run, [0, 1, 2]))
    assert [group[0] for group in groups] == [
        [*words(answer.split()), turn_end] for answer in ("sat on the mat", "ran", "flew over the tree")
    ]
    for truth, batch, *truncations in groups:
        assert batch[-1] == turn_end
        content = truth[:-1]
        proper = [content[:cut] for cut in range(1, len(content))] or [[]]
        assert sorted(truncations) == sorted([*own, turn_end] for own in proper)


def test_models_stop_at_the_end_of_a_turn(tmp_path):
    """One that is sure of the turn's end after anything draws nothing else, by itself or along the truth."""
    tokenizer = chat_tokenizer()
    turn_end = len(tokenizer) - 1
    model = tiny_models.sure_of(tiny_models.llama(vocab_size=len(tokenizer)), turn_end)
    kinds = {"num_mean_field_negatives": 1, "num_autoregressive_negatives": 1, "mean_field_source": "model", **NONE}
    run = trainer(tmp_path, model, TALKS, tokenizer=tokenizer, **kinds)
    for truth, mean_field, autoregressive in candidates(run, micro_batch(run, [0, 2])):
        assert autoregressive == [turn_end]
        assert mean_field == [*truth[: len(mean_field) - 1], turn_end] and len(mean_field) < len(truth)


def test_an_answer_of_nothing_is_contrasted_with_what_differs(tmp_path):
    """It has no truncation; alone, it is contrasted with itself, which has no gradient."""
    data = [{"prompt": "the cat", "completion": ""}, {"prompt": "a dog", "completion": " ran"}]
    run = trainer(tmp_path, examples=data, num_batch_negatives=0, num_truncation_negatives=2, alpha=1.0, mle_weight=0.0)
    inputs = micro_batch(run, [0, 1])
    assert candidates(run, inputs)[0] == [[2], [2]]
    loss = run.compute_loss(run.model, inputs)
    loss.backward()
    alone = micro_batch(run, [0])
    run.model.zero_grad()
    run.compute_loss(run.model, alone).backward()
    assert all(not p.grad.abs().max() > 1e-6 for p in run.model.parameters() if p.grad is not None)


def test_what_the_model_has_no_embedding_for_is_named(tmp_path):
    tokenizer = chat_tokenizer()
    data = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a dog", "completion": " ran<|im_end|>"}]
    with pytest.raises(ValueError, match=r"the completion of example 1 has the token id 24, but the model has 24 emb"):
        trainer(tmp_path, examples=data, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"'completion' of example 1 has the token id 999; expected .* below 24"):
        trainer(tmp_path, examples=[data[0], {"prompt": "a", "completion": [999]}])
