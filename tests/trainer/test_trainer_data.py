"""From examples to tokens, and from tokens to batches whose rows predict every candidate."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from cpo_kernels.trainer import ContrastBatch, Negative, NegativeSampler, TokenizedExamples, tokenize_examples

pytestmark = pytest.mark.cpu  # batches are made on the host

EOS = 2
EMPTY_PROMPT = {"prompt": "", "completion": " sat"}
LIMITS = {"max_length": 32, "max_prompt_length": 8}


# Tokens


def tokenized(examples, tokenizer=None, **limits):
    return tokenize_examples(examples, tokenizer or tiny_models.tokenizer(), **(LIMITS | limits))


def test_tokens_of_an_example():
    words = tiny_models.tokenizer().convert_tokens_to_ids
    data = tokenized([{"prompt": "the cat", "completion": " sat on"}, {"prompt": [5, 6], "completion": [7, EOS]}])
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
    data = tokenized([{"prompt": "the cat", "completion": " sat"}, {"prompt": "", "completion": " sat"}], tokenizer)
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
        ({"completion": " sat"}, r"example 2 has no 'prompt', only \['completion'\]"),
        ({"prompt": "the"}, r"example 2 has no 'completion'"),
        (
            {"prompt": 7, "completion": " sat"},
            "'prompt' of example 2 must be a string, a list of token ids .*, got int 7",
        ),
    ],
)
def test_errors_name_the_example(example, message):
    with pytest.raises(ValueError, match=message):
        tokenized([*tiny_models.examples(2), example])


def test_an_empty_prompt_without_bos_names_the_example():
    with pytest.raises(ValueError, match="prompt of example 1 has no token of its own and the tokenizer has no BOS"):
        tokenized([{"prompt": "the", "completion": " sat"}] + 2 * [EMPTY_PROMPT], tiny_models.tokenizer(bos_token=None))


def test_data_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="no EOS token"):
        tokenized(tiny_models.examples(1), tiny_models.tokenizer(eos_token=None))
    with pytest.raises(ValueError, match="at least one example"):
        tokenized([])
    with pytest.raises(TypeError, match="generator; streams are not supported"):
        tokenized(example for example in tiny_models.examples(1))


# Batches


def batch_of(
    count: int, num_batch: int, num_truncation: int, step: int = 0, seed: int = 0, share_prefixes: bool = False
) -> ContrastBatch:
    examples = tokenized(tiny_models.examples(16))
    sampler = NegativeSampler(examples, EOS, num_batch, num_truncation, seed)
    batch = ContrastBatch(EOS, max_length=32, share_prefixes=share_prefixes)
    for index in range(count):
        batch.add_group(examples.prompts[index], examples.completions[index], sampler.draw(index, step))
    return batch


def tokens_of(batch: ContrastBatch) -> list[list[int]]:
    return [list(segment.tokens) for segment in batch.segments]


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
    for targets, start, end in zip(tokens_of(batch), tensors["cu_tokens"], tensors["cu_tokens"][1:], strict=False):
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
    alone = tokens_of(batch_of(1, 2, 2, step=5))
    assert tokens_of(batch_of(4, 2, 2, step=5))[: len(alone)] == alone
    assert tokens_of(batch_of(1, 2, 2, step=6)) != alone
    assert tokens_of(batch_of(1, 2, 2, step=5, seed=1)) != alone


def test_a_negative_too_long_for_the_prompt_is_cut():
    batch = ContrastBatch(EOS, max_length=6)
    batch.add_group([3, 4, 5, 6], [7, EOS], [Negative("batch", [8, 9, 10, EOS])])
    assert batch.tensors()["input_ids"][1].tolist() == [3, 4, 5, 6, 8]
    assert batch.segments[1].tokens == [8, 9]


def test_an_empty_prompt_names_the_group():
    batch = ContrastBatch(EOS)
    batch.add_group([3], [4, EOS])
    with pytest.raises(ValueError, match="group 1 has an empty prompt"):
        batch.add_group([], [4, EOS])


def test_a_shared_row_shows_every_token_its_prompt_and_its_own_candidate():
    batch = batch_of(5, 3, 2, share_prefixes=True)
    tensors = batch.tensors()
    ids, length = tensors["input_ids"], tensors["input_ids"].shape[1]
    prompts = [prompt for prompt, size in zip(batch.prompts, group_sizes(tensors), strict=True) for _ in range(size)]
    assert ids.numel() < batch_of(5, 3, 2).tensors()["input_ids"].numel()
    bounds = zip(tensors["cu_tokens"], tensors["cu_tokens"][1:], strict=False)
    for prompt, targets, (start, end) in zip(prompts, tokens_of(batch), bounds, strict=True):
        for t, row in enumerate(tensors["rows"][start:end].tolist()):
            own = {name: tensors[f"tree_{name}"][row // length] for name in ("groups", "branches", "positions")}
            here = row % length
            seen = (own["groups"] == own["groups"][here]) & (own["positions"] <= own["positions"][here])
            seen &= (own["branches"] == 0) | (own["branches"] == own["branches"][here])
            assert ids[row // length][seen].tolist() == [*prompt, *targets[:t]]


def group_sizes(tensors) -> list[int]:
    return torch.tensor(tensors["cu_groups"]).diff().tolist()


def test_rows_are_shared_only_where_that_saves_tokens():
    """Behind a prompt of one token, three candidates of many have nothing to share."""
    batch = ContrastBatch(EOS, share_prefixes=True)
    batch.add_group([3], [*range(4, 20), EOS], [Negative("batch", [*range(20, 4, -1), EOS])])
    assert "attention_mask" in batch.tensors()
    batch.add_group([*range(3, 20)], [4, 5, EOS], [Negative("batch", [5, EOS]), Negative("batch", [6, EOS])])
    assert "tree_groups" in batch.tensors()


# Negatives that the data brings


def test_given_negatives_keep_their_ranks_and_drawn_ones_come_behind():
    example = {"prompt": "the cat", "completion": " sat", "negatives": [" ran", " slept"], "ranks": [2, 1]}
    examples = tokenized([example, *tiny_models.examples(4)])
    drawn = NegativeSampler(examples, EOS, 1, 1, seed=0).draw(0, step=0)
    assert [(own.kind, own.rank) for own in drawn] == [("given", 2), ("given", 1), ("batch", 3), ("truncation", 3)]
    assert [own.rank for own in NegativeSampler(examples, EOS, 1, 1, seed=0).draw(1, step=0)] == [1, 1]


def test_preference_data_are_groups_with_their_own_negatives():
    given = {"prompt": "the cat", "chosen": " sat", "rejected": [" ran", " slept on"]}
    examples = tokenized([given, {"prompt": "a dog", "chosen": " ran", "rejected": " flew"}])
    words = tiny_models.tokenizer()
    assert examples.completions[0] == [*words("sat")["input_ids"], EOS]
    assert examples.negatives[0] == [[*words(text)["input_ids"], EOS] for text in ("ran", "slept on")]
    assert len(examples.negatives[1]) == 1


@pytest.mark.parametrize("empty", ["", [EOS]], ids=["text", "token ids"])
def test_an_empty_negative_is_a_model_that_ended_at_once(empty):
    example = {"prompt": "the", "completion": " sat", "negatives": [" ran", empty]}
    assert tokenized([example]).negatives[0][1] == [EOS]


def test_drawn_token_ids_are_taken_as_they_are():
    """A draw may have been cut off; what a user writes is a whole text."""
    example = {
        "prompt": "the",
        "completion": " sat",
        "negatives": [[5, 6], [5, 6]],
        "kinds": ["autoregressive", "given"],
    }
    assert tokenized([example]).negatives[0] == [[5, 6], [5, 6, EOS]]


def test_batch_negatives_differ_in_what_fits_behind_the_prompt():
    prompts, completions = [[3] * 4, [3], [3]], [[7, 8], [7, 8, 9, EOS], [9, EOS]]
    sampler = NegativeSampler(TokenizedExamples(prompts, completions), EOS, 1, 0, seed=0, max_length=6)
    assert {tuple(sampler.draw(0, step)[0].tokens) for step in range(20)} == {(9, EOS)}


def test_the_digest_tells_data_apart():
    def digest(**changed):
        example = {"prompt": "the", "completion": " sat", "negatives": [" ran"], "ranks": [1]}
        return tokenized([example | changed]).digest

    assert digest() == digest()
    others = [digest(prompt="a"), digest(completion=" ran on"), digest(negatives=[" sat on"]), digest(ranks=[2])]
    assert len({digest(), *others}) == 5
