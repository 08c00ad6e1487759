"""Negatives in training: who draws, writes and ranks them, and when."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from trainer_runs import parameters, steps, trainer
from trainer_steps import GIVEN, NONE, candidates, micro_batch

from cpo_kernels import contrastive_loss, linear_token_statistics
from cpo_kernels.negatives import (
    Completion,
    finish,
    is_wrong,
    mean_field_negatives,
    token_seeds,
    write_negatives,
)
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
    """The loop of docs/training.md: training on its file has the candidates that a trainer draws itself."""
    reference, tokenizer = tiny_models.llama(seed=1), tiny_models.tokenizer()
    drawing = trainer(tmp_path, ref_model=reference, num_mean_field_negatives=4, **NONE)
    data = drawing.train_dataset
    examples = [{"prompt": p, "completion": c} for p, c in zip(data.prompts, data.completions, strict=True)]
    written = []
    for index, example in enumerate(examples):
        prompt, truth = example["prompt"], example["completion"]
        with torch.no_grad():
            hidden = reference.base_model(torch.tensor([prompt + truth])).last_hidden_state[0, len(prompt) - 1 : -1]
        seeds = token_seeds(drawing.args.seed, 0, index, len(truth))
        drawn = mean_field_negatives(
            hidden, reference.lm_head.weight, torch.tensor(truth), seeds=seeds, count=4, eos_token_id=2
        )
        texts = finish(drawn.samples, truth, tokenizer.eos_token_id)
        written.append([text for text in texts if is_wrong(text, truth)])
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


# Ranking


def drawn_kinds(*kinds: str) -> dict:
    return NONE | {f"num_{kind}_negatives": 3 for kind in kinds}


@pytest.mark.parametrize("sharing", ["off", "required"])
@pytest.mark.parametrize(
    ("examples", "counts"),
    [
        pytest.param(GIVEN, NONE, id="given"),
        pytest.param(None, drawn_kinds("batch"), id="BNR"),
        pytest.param(None, drawn_kinds("truncation"), id="TNR"),
        pytest.param(None, drawn_kinds("mean_field"), id="MNR"),
        pytest.param(None, drawn_kinds("autoregressive"), id="ANR"),
        pytest.param(None, drawn_kinds("batch", "truncation", "mean_field", "autoregressive"), id="all"),
    ],
)
def test_every_kind_is_ranked_by_mean_hidden_states_of_the_reference(tmp_path, examples, counts, sharing):
    reference = tiny_models.llama(seed=1)
    options = {"ranking": "similarity", "prefix_sharing": sharing, **counts}
    run = trainer(tmp_path, examples=examples, ref_model=reference, **options)
    inputs = micro_batch(run, [0, 1])
    out = run._forward(run.model, inputs)
    ranks, losses = [], []
    scores = iter((out.rewards / 0.1).split([len(group) for group in candidates(run, inputs)]))
    for index, group in enumerate(candidates(run, inputs)):
        prompt = run.train_dataset.prompts[index]
        embeddings = []
        for completion in group:
            hidden = reference.model(torch.tensor([[*prompt, *completion[:-1]]])).last_hidden_state[0]
            embeddings.append(hidden[len(prompt) - 1 :].mean(0))
        similarity = torch.cosine_similarity(embeddings[0], torch.stack(embeddings[1:]), dim=-1).tolist()
        places = {}
        for _, text in sorted(zip(similarity, map(tuple, group[1:]), strict=True), key=lambda own: -own[0]):
            places.setdefault(text, len(places) + 1)
        own = [0, *(places[tuple(negative)] for negative in group[1:])]
        assert max(own) > 1, "something is ranked"
        ranks += own
        losses.append(contrastive_loss(next(scores)[None], ranks=torch.tensor([own]), beta=0.1))
    assert inputs["ranks"] == ranks
    torch.testing.assert_close(out.contrastive_loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


class WordEmbedder:
    """In place of a sentence encoder: how often a text has each word of the tests' vocabulary, and one more for all."""

    def __init__(self, name, device=None):
        self.words = tiny_models.WORDS

    def embed(self, texts):
        return torch.tensor([[*(text.split().count(word) for word in self.words), 1.0] for text in texts])


@pytest.mark.parametrize("kind", ["batch", "truncation", "mean_field", "autoregressive"])
def test_every_kind_is_ranked_by_a_sentence_encoder(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("cpo_kernels.trainer.ranking.SentenceEmbedder", WordEmbedder)
    run = trainer(tmp_path, ranking="similarity", embedding_model="words", **drawn_kinds(kind))
    inputs = micro_batch(run, [0, 1, 2])
    run._forward(run.model, inputs)
    tokenizer, want = run.processing_class, []
    for group in candidates(run, inputs):
        vectors = WordEmbedder("words").embed(tokenizer.batch_decode(group, skip_special_tokens=True)).double()
        likeness = [round(float(torch.cosine_similarity(vectors[0], own, dim=0)), 9) for own in vectors[1:]]
        want += [0, *(1 + sorted(set(likeness), reverse=True).index(own) for own in likeness)]
    assert inputs["ranks"] == want
    assert max(want) > 1


def test_similarity_orders_only_what_the_data_ranks_equal(tmp_path):
    examples = [example | {"ranks": [0, 2, 1]} for example in GIVEN]
    run = trainer(tmp_path, examples=examples, ranking="similarity", **NONE)
    inputs = micro_batch(run, [0, 1])
    run._forward(run.model, inputs)
    assert inputs["ranks"] == [0, 0, 2, 1] * 2


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
