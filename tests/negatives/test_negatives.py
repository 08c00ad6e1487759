"""Batch and truncation negatives: what may be drawn, what may not, and that a truncation needs no forward pass."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
import tiny_models
import torch

from cpo_kernels import CandidateLayout, contrastive_loss, linear_sequence_logps, linear_sequence_loss
from cpo_kernels.negatives import (
    KINDS,
    Sampling,
    autoregressive_negatives,
    batch_negatives,
    finish,
    is_wrong,
    mean_field_negatives,
    mean_pool,
    similarity_ranks,
    token_seeds,
    truncate,
    truncation_negatives,
)
from cpo_kernels.negatives.kinds import Task

POOL = [[5, 6, 2], [7, 2], [5, 6, 2], [8, 9, 2], [7, 2], [4, 2]]  # 0 and 2 are equal, so are 1 and 4
EOS = 2


@pytest.mark.cpu
def test_importing_negatives_imports_nothing_heavy():
    """What a kind of negatives needs besides torch is imported when it is used."""
    code = "import sys, cpo_kernels.negatives; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"transformers", "openai", "sentence_transformers", "datasets", "peft", "accelerate"}
    assert not heavy & set(modules)


@pytest.mark.parametrize("seed", range(20))
def test_batch_negatives_are_wrong_and_differ_from_each_other(seed):
    drawn = batch_negatives(POOL, 0, 3, Random(seed))
    texts = [tuple(POOL[i]) for i in drawn]
    assert len(set(texts)) == 3
    assert tuple(POOL[0]) not in texts


def test_batch_negatives_are_drawn_uniformly():
    pool = [[i, EOS] for i in range(10, 16)]
    counts = Counter(i for seed in range(3000) for i in batch_negatives(pool, 2, 2, Random(seed)))
    assert set(counts) == {0, 1, 3, 4, 5}
    # 3000 draws of 2 in 5: mean 1200, standard deviation 27
    assert all(abs(count - 1200) < 5 * 27 for count in counts.values())


def test_batch_negatives_depend_on_the_generator_alone():
    assert batch_negatives(POOL, 3, 3, Random(1)) == batch_negatives(POOL, 3, 3, Random(1))
    assert len({tuple(batch_negatives(POOL, 3, 3, Random(seed))) for seed in range(20)}) > 1


def test_batch_negatives_touch_few_completions_of_a_large_pool():
    class Pool:
        reads = 0

        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            self.reads += 1
            return [index, EOS]

    pool = Pool()
    assert len(set(batch_negatives(pool, 0, 4, Random(0)))) == 4
    assert pool.reads <= 6


def test_too_small_a_pool_names_the_example():
    with pytest.raises(ValueError, match=r"example 1 needs 4 batch negatives, .* 6 completions .* only 3"):
        batch_negatives(POOL, 1, 4, Random(0))
    assert batch_negatives(POOL, 1, 0, Random(0)) == []


@pytest.mark.parametrize("completion", [[4, 5, 6, 7, EOS], [4, 5, 6, 7]], ids=["ended", "cut off by max_length"])
def test_cuts_leave_something_out_and_keep_something(completion):
    cuts = truncation_negatives(completion, EOS, 10, Random(0))
    assert sorted(cuts) == [1, 2, 3]
    assert len(truncation_negatives(completion, EOS, 2, Random(0))) == 2


def test_a_single_token_is_cut_to_eos_alone():
    assert truncation_negatives([4, EOS], EOS, 3, Random(0)) == [0]
    with pytest.raises(ValueError, match="without tokens besides EOS"):
        truncation_negatives([EOS], EOS, 1, Random(0))


def test_truncate_reuses_rows():
    assert truncate([4, 5, 6, EOS], [10, 11, 12, 13], 2, EOS) == ([4, 5, EOS], [10, 11, 12])
    with pytest.raises(ValueError, match=r"cut must be in \[0, 4\), got 4"):
        truncate([4, 5, 6, EOS], [10, 11, 12, 13], 4, EOS)
    with pytest.raises(ValueError, match="one entry per token, 4, got 3"):
        truncate([4, 5, 6, EOS], [10, 11, 12], 2, EOS)


@pytest.mark.parametrize("make_model", [tiny_models.gpt2, tiny_models.llama])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_truncation_scores_as_the_truncated_text_does(make_model, cut):
    """The plain loop of the documentation, against a forward pass over the truncated text itself."""
    model = make_model().eval()
    prompt, completion = [3, 4, 5], [6, 7, 8, 9, EOS]
    hidden = model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
    rows = list(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
    targets, target_rows = truncate(completion, rows, cut, EOS)
    layout = CandidateLayout([0, len(targets)], [0, 1], rows=torch.tensor(target_rows))
    got = linear_sequence_logps(hidden, model.lm_head.weight, torch.tensor(targets), layout=layout)

    text = torch.tensor([[*prompt, *completion[:cut], EOS]])
    logps = model(text).logits[0, :-1].log_softmax(-1)
    want = logps[len(prompt) - 1 :].gather(-1, text[0, len(prompt) :, None]).sum()
    torch.testing.assert_close(got, want.reshape(1), rtol=1e-5, atol=1e-5)


WEIGHTS = {"batch": 1.0, "truncation": 0.25, "mean_field": 0.5, "autoregressive": 2.0}


@pytest.mark.cpu
def test_a_weighted_mixture_in_a_plain_loop():
    """Every kind for one prompt, a contrast a kind, the autoregressive ones ranked; against dense log-softmax."""
    model = tiny_models.llama().eval()
    prompt, completion, last = [3, 4, 5], [6, 7, 8, 9, EOS], 2
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0, last:-1]
    seeds = token_seeds(0, 0, 0, len(completion))
    drawn = mean_field_negatives(
        hidden, model.lm_head.weight, torch.tensor(completion), seeds=seeds, count=2, eos_token_id=EOS
    )
    own = autoregressive_negatives(
        model, [prompt], 3, eos_token_id=EOS, pad_token_id=0, sampling=Sampling(max_new_tokens=6)
    )[0]
    pool = [completion, *POOL]
    negatives = {
        "batch": [pool[i] for i in batch_negatives(pool, 0, 2, Random(0))],
        "truncation": [
            truncate(completion, completion, cut, EOS)[0] for cut in truncation_negatives(completion, EOS, 2, Random(0))
        ],
        "mean_field": [
            negative for negative in finish(drawn.samples, completion, EOS) if is_wrong(negative, completion)
        ],
        "autoregressive": [negative for negative in own if is_wrong(negative, completion)],
    }
    assert all(negatives.values())

    # One row of hidden states a candidate; the ground truth's serves all groups, and its truncations.
    texts, groups = [completion], []
    for kind, others in negatives.items():
        groups.append([0, *(0 if kind == "truncation" else len(texts) + i for i in range(len(others)))])
        texts += [] if kind == "truncation" else others
    width = len(prompt) + max(map(len, texts))
    ids = torch.tensor([prompt + text + [0] * (width - len(prompt) - len(text)) for text in texts])
    candidates = [[completion, *others] for others in negatives.values()]
    rows = [
        torch.arange(len(c)) + text * width + last
        for texts_of, of_kind in zip(groups, candidates, strict=True)
        for text, c in zip(texts_of, of_kind, strict=True)
    ]
    targets = torch.tensor([token for of_kind in candidates for c in of_kind for token in c])
    cu_tokens = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
    cu_groups = torch.tensor([0, *map(len, groups)]).cumsum(0).tolist()

    states = model.base_model(ids).last_hidden_state.flatten(0, 1)
    ranks = [[0] + [1] * len(others) for others in negatives.values()]
    embeddings = mean_pool(states, torch.cat(rows), cu_tokens)[cu_groups[-2] :]
    ranks[-1] = similarity_ranks(embeddings, [0, len(embeddings)])

    def mixture(logps: torch.Tensor, of_groups: range) -> torch.Tensor:
        starts = [cu_groups[g] - cu_groups[of_groups[0]] for g in (*of_groups, of_groups[-1] + 1)]
        return sum(
            weight * contrastive_loss(logps[None, a:b], ranks=torch.tensor([ranks[g]]), beta=0.3)
            for g, (a, b) in zip(of_groups, pairwise(starts), strict=True)
            for weight in [list(WEIGHTS.values())[g]]
        )

    layout = CandidateLayout(cu_tokens, cu_groups, rows=torch.cat(rows))
    budget = 4 * tiny_models.VOCAB * 24  # a few groups at a time
    loss = linear_sequence_loss(states, model.lm_head.weight, targets, mixture, layout=layout, max_logits_bytes=budget)
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    expected = 0.0
    for (kind, others), of_kind in zip(negatives.items(), ranks, strict=True):
        scores = []
        for candidate in (completion, *others):
            text = torch.tensor([prompt + candidate])
            logps = model(text).logits[0, last:-1].log_softmax(-1)
            scores.append(0.3 * logps.gather(-1, text[0, len(prompt) :, None]).sum())
        for i, rank in enumerate(of_kind):
            lower = [scores[j] for j, other in enumerate(of_kind) if other > rank]
            if lower:
                expected = expected + WEIGHTS[kind] * (torch.stack([scores[i], *lower]).logsumexp(0) - scores[i])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# The table of kinds


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_kind_has_its_fields_and_their_texts(kind):
    """The configuration has a number and a weight for every kind, with the table's defaults and texts."""
    pytest.importorskip("transformers")
    from cpo_kernels import CPOConfig

    fields = {item.name: item for item in dataclasses.fields(CPOConfig)}
    assert fields[kind.weight_field].default == 1.0
    assert (kind.count_field is None) == (kind.name == "given")
    if kind.count_field is not None:
        field = fields[kind.count_field]
        assert field.default == kind.default
        assert kind.text in field.metadata["help"]
        assert kind.cost in field.metadata["help"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.draw], ids=lambda kind: kind.name)
def test_what_a_kind_draws_from_the_data_is_wrong_and_of_its_kind(kind):
    task = Task(POOL, 0, EOS, rank=3)
    drawn = kind.draw(task, 1, Random(0))
    assert [(own.kind, own.rank) for own in drawn] == [(kind.name, 3)]
    tokens = list(drawn[0].tokens) if drawn[0].cut is None else [*POOL[0][: drawn[0].cut], EOS]
    assert tokens != POOL[0]
    assert kind.draw(task, 1, Random(0)) == drawn
