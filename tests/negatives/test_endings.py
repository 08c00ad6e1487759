"""Every token that ends a completion, and that none is taken for another."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from cpo_kernels.negatives import Sampling, autoregressive_negatives, finish, truncation_negatives
from cpo_kernels.negatives.endings import end_of, end_token_ids, special_tokens, turn_end, until_end, without_end

pytestmark = pytest.mark.cpu

EOS, TURN_END, OTHER = 2, tiny_models.VOCAB, 7
ENDS = (EOS, TURN_END, OTHER)


def chat_tokenizer(behind: str = "<|im_end|>\n"):
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} " + behind + "{% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    ("behind", "expected"),
    [("<|im_end|>\n", TURN_END), (" <|im_end|> </s>", TURN_END), ("</s>", EOS), ("\n", None), ("the <|im_end|>", None)],
)
def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(behind, expected):
    assert turn_end(chat_tokenizer(behind)) == expected


def test_a_template_that_takes_no_conversation_has_no_end():
    tokenizer = tiny_models.tokenizer()
    assert turn_end(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('only with images') }}"
    assert turn_end(tokenizer) is None


def test_all_ends_of_tokenizer_template_and_model():
    model = tiny_models.llama(eos_token_id=2)
    assert end_token_ids(tiny_models.tokenizer(), model) == (EOS,)
    model.generation_config.eos_token_id = [OTHER, EOS]
    assert end_token_ids(chat_tokenizer(), model) == ENDS
    assert end_token_ids(tiny_models.tokenizer(), tiny_models.adapted(model)) == (EOS, OTHER)
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        end_token_ids(tiny_models.tokenizer(eos_token=None))


def test_a_default_of_the_configuration_class_is_no_end():
    """Llama's default of 2 is an ordinary word where another token is the tokenizer's EOS."""
    model = tiny_models.llama()
    assert model.generation_config.eos_token_id == 2
    words = tiny_models.tokenizer(eos_token="<pad>", pad_token="<pad>")
    assert end_token_ids(words, model) == (0,)
    # As transformers.Trainer leaves it behind.
    model.generation_config.eos_token_id = [0, 2]
    assert end_token_ids(words, model) == (0,)
    model.generation_config.eos_token_id = [OTHER, 2]
    assert end_token_ids(words, model) == (0, OTHER)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (2, 2, (2,)),  # Llama's default, which nothing contradicts
        (9, 2, (9,)),
        (2, 9, (9,)),
        ([9, 7], 2, (9, 7)),
        ([7, 9], 9, (7, 9)),
        (None, 9, (9,)),
        (None, [9, 50000], (9,)),
        (50000, 9, (9,)),
        (-1, 2, (2,)),
    ],
)
def test_without_a_tokenizer_the_model_names_the_ends(generation, config, ends):
    model = tiny_models.llama()
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    model.generation_config.pad_token_id = model.config.bos_token_id = model.generation_config.bos_token_id = None
    assert special_tokens(None, model) == (ends, ends[0], None)
    assert special_tokens(None, tiny_models.adapted(model)) == (ends, ends[0], None)
    model.generation_config.pad_token_id, model.config.bos_token_id = 0, 4
    assert special_tokens(None, model) == (ends, 0, 4)


def test_special_tokens_of_a_tokenizer():
    model = tiny_models.gpt2()
    assert special_tokens(tiny_models.tokenizer(), model) == ((EOS,), 0, 1)
    assert special_tokens(tiny_models.tokenizer(pad_token=None, bos_token=None), model) == ((EOS,), EOS, None)


@pytest.mark.parametrize("end", [[], [EOS], [TURN_END], [TURN_END, EOS]])
def test_a_completion_its_end_and_what_is_before_it(end):
    assert without_end([3, EOS, 4, *end], ENDS) == [3, EOS, 4]
    assert end_of([3, 4, *end], ENDS) == (end[0] if end else EOS)
    assert until_end([3, 4, *end, 9], ENDS) == [3, 4, *end[:1]] if end else [3, 4, 9]


@pytest.mark.parametrize("end", [[EOS], [TURN_END], [TURN_END, EOS]])
def test_a_truncation_is_never_the_whole_answer_and_ends_as_it_does(end):
    completion = [3, 4, 5, *end]
    (negatives,) = truncation_negatives([completion], 10, eos_token_id=ENDS)
    assert sorted(negatives, key=len) == [[3, end[0]], [3, 4, end[0]]]


def test_drawn_sequences_stop_at_any_end():
    samples = torch.tensor([[3, OTHER, 5], [TURN_END, 4, 5], [3, 4, 5], [3, -100, EOS]])
    assert finish(samples, [6, 7, EOS], ENDS) == [[3, OTHER], [TURN_END], [3, 4, 5], [3, 7, EOS]]


def test_generation_stops_at_any_end():
    model = tiny_models.gpt2()
    prompts = [[3], [4, 5], [6]]
    options = {"pad_token_id": 0, "sampling": Sampling(max_new_tokens=20)}
    free = autoregressive_negatives(model, prompts, 4, eos_token_id=EOS, **options)
    first = free[0][0][1]
    stopped = autoregressive_negatives(model, prompts, 4, eos_token_id=[EOS, first], **options)
    assert stopped == [[until_end(ids, [EOS, first]) for ids in own] for own in free]
    assert stopped != free
