"""Negatives of every kind in the order of their likeness to the ground truth."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from trainer_runs import trainer
from trainer_steps import GIVEN, NONE, candidates, micro_batch

from cpo_kernels import contrastive_loss

pytestmark = pytest.mark.cpu


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
    """In place of a sentence encoder: how often a text has each word of the tests' vocabulary; 0 for no text."""

    def __init__(self, name, device=None):
        self.words = [*tiny_models.WORDS, tiny_models.tokenizer().eos_token]

    def embed(self, texts):
        return torch.tensor([[float(text.split().count(word)) for word in self.words] for text in texts])


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


def test_a_candidate_that_ends_at_once_is_ranked(tmp_path, monkeypatch):
    """A truncation of one word is its end alone, whose text is empty and has no embedding."""
    monkeypatch.setattr("cpo_kernels.trainer.ranking.SentenceEmbedder", WordEmbedder)
    data = [
        {"prompt": "the cat", "completion": " sat", "negatives": [" sat on"]},
        {"prompt": "a dog", "completion": " ran", "negatives": [" and then"]},
    ]
    options = NONE | {"num_truncation_negatives": 1}
    run = trainer(tmp_path, examples=data, ranking="similarity", embedding_model="words", **options)
    inputs = micro_batch(run, [0, 1])
    assert [group[2] for group in candidates(run, inputs)] == [[2], [2]]
    assert inputs["ranks"] == [0, 1, 2, 0, 1, 1]
