"""Batch and truncation negatives: what may be drawn, what may not, and that a truncation needs no forward pass."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from functools import partial
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
    is_wrong,
    mean_field_negatives,
    mean_pool,
    similarity_ranks,
    token_seeds,
    truncate,
    truncation_negatives,
    write_negatives,
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
    drawn = batch_negatives(POOL, 3, seed=seed)
    assert len(drawn) == len(POOL)
    for own, truth in zip(drawn, POOL, strict=True):
        assert len({*map(tuple, own)}) == 3
        assert truth not in own and all(negative in POOL for negative in own)


def test_batch_negatives_are_drawn_uniformly():
    pool = [[i, EOS] for i in range(10, 16)]
    drawn = [batch_negatives(pool, 2, seed=seed, indices=[2])[0] for seed in range(3000)]
    counts = Counter(negative[0] - 10 for own in drawn for negative in own)
    assert set(counts) == {0, 1, 3, 4, 5}
    # 3000 draws of 2 in 5: mean 1200, standard deviation 27
    assert all(abs(count - 1200) < 5 * 27 for count in counts.values())


def test_batch_negatives_depend_on_seed_step_and_index_alone():
    whole = batch_negatives(POOL, 2, seed=1, step=5)
    assert batch_negatives(POOL, 2, seed=1, step=5, indices=[4, 1]) == [whole[4], whole[1]]
    assert len({str(batch_negatives(POOL, 2, seed=seed)) for seed in range(20)}) > 1
    assert len({str(batch_negatives(POOL, 2, step=step)) for step in range(20)}) > 1


def test_batch_negatives_are_cut_and_compared_as_far_as_they_are_contrasted():
    """Where three tokens fit, a pool of five holds two different completions, whatever ends them."""
    pool = [[5, 6, 7, EOS], [5, 6, 7, 9, EOS], [8, 9, EOS], [8, 9], [5, 6, 7]]
    options = {"max_tokens": 3, "eos_token_id": EOS}
    for index, others in ((0, [[8, 9, EOS], [8, 9]]), (1, [[8, 9, EOS], [8, 9]]), (2, [[5, 6, 7]]), (3, [[5, 6, 7]])):
        ((negative,),) = batch_negatives(pool, 1, indices=[index], **options)
        assert negative in others
        with pytest.raises(ValueError, match=f"example {index} needs 2 batch negatives"):
            batch_negatives(pool, 2, indices=[index], **options)
    assert sorted(batch_negatives(pool, 4, indices=[0])[0]) == sorted(pool[1:])


def test_batch_negatives_touch_few_completions_of_a_large_pool():
    class Pool:
        reads = 0

        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            self.reads += 1
            return [index, EOS]

    pool = Pool()
    assert len({*map(tuple, batch_negatives(pool, 4, indices=[0])[0])}) == 4
    assert pool.reads <= 10


def test_too_small_a_pool_names_the_example():
    with pytest.raises(ValueError, match=r"example 1 needs 4 batch negatives, .* 6 completions .* only 3"):
        batch_negatives(POOL, 4, indices=[1])
    assert batch_negatives(POOL, 0) == [[]] * 6


@pytest.mark.parametrize("completion", [[4, 5, 6, 7, EOS], [4, 5, 6, 7]], ids=["ended", "cut off by max_length"])
def test_cuts_leave_something_out_and_keep_something(completion):
    (negatives,) = truncation_negatives([completion], 10, eos_token_id=EOS)
    assert sorted(negatives) == [[4, EOS], [4, 5, EOS], [4, 5, 6, EOS]]
    assert len(truncation_negatives([completion], 2, eos_token_id=EOS)[0]) == 2


def test_a_single_token_is_cut_to_eos_alone():
    assert truncation_negatives([[4, EOS], [EOS], [4]], 3, eos_token_id=EOS) == [[[EOS]], [], [[EOS]]]


def test_truncations_depend_on_seed_step_and_key_alone():
    completions = [[4, 5, 6, 7, 8, 9, EOS]] * 3
    whole = truncation_negatives(completions, 2, eos_token_id=EOS, seed=1, step=2)
    some = truncation_negatives(completions[:1], 2, eos_token_id=EOS, seed=1, step=2, keys=[2])
    assert some == whole[2:]
    assert len({str(truncation_negatives(completions, 1, eos_token_id=EOS, step=step)) for step in range(9)}) > 1
    with pytest.raises(ValueError, match="expected one key per completion, 3, got 1"):
        truncation_negatives(completions, 1, eos_token_id=EOS, keys=[0])


@pytest.mark.parametrize("draw", [batch_negatives, partial(truncation_negatives, eos_token_id=EOS)])
def test_a_negative_count_is_refused(draw):
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        draw(POOL, -1)


# The rule for draws equal to the truth

RIGHT = [
    ([4, 5, EOS], (4, 5, EOS)),
    ([4, 5], [4, 5, EOS]),  # cut off at the last token of the answer
    ([4, 5, EOS], [4, 5]),
    ([4, 5, 9, EOS], [4, 5, EOS]),
    ([4, 5, 9], [4, 5, EOS]),
    ([], [4, EOS]),
    ([EOS], [9, EOS]),
]
WRONG = [([4], [4, 5, EOS]), ([4, EOS, 5], [4, EOS]), ([EOS], [4, EOS]), ([5, 4, EOS], [4, 5, EOS])]


@pytest.mark.cpu
def test_the_ground_truth_is_no_negative_whatever_ends_it():
    assert not any(is_wrong(*own, [EOS, 9]) for own in RIGHT)
    assert all(is_wrong(*own, [EOS, 9]) for own in WRONG)
    # Where nothing is said to end a completion, every token counts.
    assert is_wrong([4, 5], [4, 5, EOS]) and not is_wrong([4, 5], (4, 5)) and not is_wrong([], [4])


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
    given = hidden, model.lm_head.weight, torch.tensor(completion)
    options = {"pad_token_id": 0, "sampling": Sampling(max_new_tokens=6), "completions": [completion]}
    drawn = {
        "batch": batch_negatives([completion, *POOL], 2, indices=[0]),
        "truncation": truncation_negatives([completion], 2, eos_token_id=EOS),
        "mean_field": mean_field_negatives(*given, seeds=seeds, count=2, eos_token_id=EOS),
        "autoregressive": autoregressive_negatives(model, [prompt], 3, eos_token_id=EOS, **options),
    }
    negatives = {kind: own for kind, (own,) in drawn.items()}
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


@pytest.mark.cpu
def test_every_kind_has_one_shape_that_a_file_takes(tmp_path):
    """For a sure model too, whose draws are the truth: lists of token ids by example, none of them the truth."""
    datasets = pytest.importorskip("datasets")
    model = tiny_models.sure_of(tiny_models.llama(), 7).eval()
    truths = [[7, 7, EOS], [5, 7, 7, 7, 6, EOS], [7, 7, 7]]
    examples = [{"prompt": [3, 4 + number], "completion": truth} for number, truth in enumerate(truths)]
    rows = []
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example["prompt"] + example["completion"]])
            rows.append(model.base_model(ids).last_hidden_state[0, 1:-1])
    targets, bounds = torch.tensor([token for truth in truths for token in truth]), [0, 3, 9, 12]
    given = torch.cat(rows), model.lm_head.weight, targets
    options = {"pad_token_id": 0, "sampling": Sampling(max_new_tokens=3), "completions": truths}
    drawn = {
        "batch": batch_negatives(truths, 1, eos_token_id=EOS),
        "truncation": truncation_negatives(truths, 2, eos_token_id=EOS),
        "mean_field": mean_field_negatives(*given, seeds=0, count=4, eos_token_id=EOS, cu_tokens=bounds),
        "autoregressive": autoregressive_negatives(
            model, [example["prompt"] for example in examples], 2, eos_token_id=EOS, **options
        ),
    }
    assert drawn["mean_field"][0] == drawn["mean_field"][2] == drawn["autoregressive"][2] == []
    assert drawn["autoregressive"][1] == [[7, 7, 7]] * 2
    for kind, negatives in drawn.items():
        assert isinstance(negatives, list) and len(negatives) == 3
        for own, truth in zip(negatives, truths, strict=True):
            assert all(type(token) is int for negative in own for token in negative)
            assert all(negative and negative != truth for negative in own)
        write_negatives(tmp_path / f"{kind}.parquet", examples, negatives, kind=kind)
        rows = datasets.Dataset.from_parquet(
            str(tmp_path / f"{kind}.parquet"), cache_dir=str(tmp_path / kind)
        ).to_list()
        assert [row["negatives"] for row in rows] == negatives
        assert [row["kinds"] for row in rows] == [[kind] * len(own) for own in negatives]


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
