"""Batch and truncation negatives: what may be drawn, what may not, and that a truncation needs no forward pass."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import tiny_models
import torch

from cpo_kernels import CandidateLayout, linear_sequence_logps
from cpo_kernels.negatives import batch_negatives, truncate, truncation_negatives

POOL = [[5, 6, 2], [7, 2], [5, 6, 2], [8, 9, 2], [7, 2], [4, 2]]  # 0 and 2 are equal, so are 1 and 4
EOS = 2


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
