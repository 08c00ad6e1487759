"""From examples to tokens, and from tokens to batches whose rows predict every candidate."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from cpo_kernels.trainer import ContrastBatch, NegativeSampler, tokenize_examples

pytestmark = pytest.mark.cpu  # batches are made on the host

EOS = 2
EMPTY_PROMPT = {"prompt": "", "completion": "sat"}
LIMITS = {"max_length": 32, "max_prompt_length": 8}


# Tokens


def tokenized(examples, tokenizer=None, **limits):
    return tokenize_examples(examples, tokenizer or tiny_models.tokenizer(), **(LIMITS | limits))


def test_tokens_of_an_example():
    words = tiny_models.tokenizer().convert_tokens_to_ids
    data = tokenized([{"prompt": "the cat", "completion": "sat on"}, {"prompt": [5, 6], "completion": [7, EOS]}])
    assert data.prompts == [words(["the", "cat"]), [5, 6]]
    assert data.completions == [[*words(["sat", "on"]), EOS], [7, EOS]]


def test_an_empty_prompt_becomes_bos():
    assert tokenized([EMPTY_PROMPT]).prompts == [[1]]


def test_special_tokens_of_the_tokenizer_go_before_the_prompt_only():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    data = tokenized([{"prompt": "the cat", "completion": "sat"}, {"prompt": "", "completion": "sat"}], tokenizer)
    assert data.prompts[0][0] == 1 and EOS not in data.prompts[0]
    assert data.prompts[1] == [1]
    assert 1 not in data.completions[0] and data.completions[0][-1] == EOS


def test_what_does_not_fit_is_cut():
    data = tokenized([{"prompt": list(range(3, 13)), "completion": [20] * 9}], max_length=12, max_prompt_length=6)
    assert data.prompts == [list(range(7, 13))], "the end of the prompt is kept"
    assert data.completions == [[20] * 6], "a completion that was cut off does not end with EOS"
    data = tokenized([{"prompt": [1, *range(3, 13)], "completion": [20]}], max_prompt_length=4)
    assert data.prompts == [[1, 10, 11, 12]], "BOS stays in front"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"completion": "sat"}, r"example 2 has no 'prompt', only \['completion'\]"),
        ({"prompt": "the"}, r"example 2 has no 'completion'"),
        ({"prompt": "the", "completion": ""}, "completion of example 2 is empty"),
        ({"prompt": "the", "completion": [EOS]}, "completion of example 2 is empty"),
        ({"prompt": 7, "completion": "sat"}, "'prompt' of example 2 must be a string or a list of token ids, got int"),
    ],
)
def test_errors_name_the_example(example, message):
    with pytest.raises(ValueError, match=message):
        tokenized([*tiny_models.examples(2), example])


def test_an_empty_prompt_without_bos_names_the_example():
    with pytest.raises(ValueError, match="prompt of example 1 is empty and the tokenizer has no BOS"):
        tokenized([{"prompt": "the", "completion": "sat"}] + 2 * [EMPTY_PROMPT], tiny_models.tokenizer(bos_token=None))


def test_data_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="no EOS token"):
        tokenized(tiny_models.examples(1), tiny_models.tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="at least one example"):
        tokenized([])
    with pytest.raises(TypeError, match="generator; streams are not supported"):
        tokenized(example for example in tiny_models.examples(1))


# Batches


def batch_of(count: int, num_batch: int, num_truncation: int, step: int = 0, seed: int = 0) -> ContrastBatch:
    sampler = NegativeSampler(tokenized(tiny_models.examples(16)), EOS, num_batch, num_truncation, seed)
    batch = ContrastBatch(EOS, max_length=32)
    for index in range(count):
        sampler.add_to(batch, index, step)
    return batch


def test_truncation_negatives_cost_the_body_nothing():
    without, with_them = batch_of(4, 1, 0).tensors(), batch_of(4, 1, 3).tensors()
    assert torch.equal(without["input_ids"], with_them["input_ids"])
    assert len(with_them["cu_tokens"]) == len(without["cu_tokens"]) + 4 * 3
    assert set(with_them["rows"].tolist()) == set(without["rows"].tolist())


def test_every_token_is_predicted_by_the_row_before_it():
    """Each candidate, read back from rows and targets, is its prompt continued: row r saw input_ids up to r."""
    batch = batch_of(4, 2, 2)
    tensors = batch.tensors()
    ids, length = tensors["input_ids"], tensors["input_ids"].shape[1]
    for (targets, _), start, end in zip(batch.segments, tensors["cu_tokens"], tensors["cu_tokens"][1:], strict=False):
        sequences, positions = tensors["rows"][start:end] // length, tensors["rows"][start:end] % length
        for t, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            seen = ids[sequence, : position + 1].tolist()
            assert seen[len(seen) - t :] == list(targets[:t])
            assert tensors["attention_mask"][sequence, position] == 1


def test_the_last_prompt_row_predicts_the_first_token_of_every_candidate():
    tensors = batch_of(3, 2, 2).tensors()
    first = tensors["rows"][torch.tensor(tensors["cu_tokens"][:-1])]
    for start, end in zip(tensors["cu_groups"], tensors["cu_groups"][1:], strict=False):
        assert len(set(first[start:end].tolist())) == 1


def test_negatives_are_a_function_of_seed_step_and_example():
    alone = batch_of(1, 2, 2, step=5).segments
    assert [s[0] for s in batch_of(4, 2, 2, step=5).segments[: len(alone)]] == [s[0] for s in alone]
    assert [s[0] for s in batch_of(1, 2, 2, step=6).segments] != [s[0] for s in alone]
    assert [s[0] for s in batch_of(1, 2, 2, step=5, seed=1).segments] != [s[0] for s in alone]


def test_a_negative_too_long_for_the_prompt_is_cut():
    batch = ContrastBatch(EOS, max_length=6)
    batch.add_group([3, 4, 5, 6], [7, EOS], negatives=[[8, 9, 10, EOS]])
    assert batch.sequences[1] == [3, 4, 5, 6, 8]
    assert batch.segments[1][0] == [8, 9]


def test_an_empty_prompt_names_the_group():
    batch = ContrastBatch(EOS)
    batch.add_group([3], [4, EOS])
    with pytest.raises(ValueError, match="group 1 has an empty prompt"):
        batch.add_group([], [4, EOS])
