"""Tokens of prompts and completions: those of the joined text, split as TRL splits them, and ended once."""

from __future__ import annotations

import random

import pytest
import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpo_kernels.trainer import tokenize_examples
from cpo_kernels.trainer.encoding import continuations, text_behind

pytestmark = pytest.mark.cpu

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS, EOS, TURN_END = 1, 2, 4
TEXT = ["Hello world, what color is the sky?\nThe answer is 12 and it is blue. The answer is 13."] * 4
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>NL{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def make_tokenizer(scheme: str, adds_bos: bool = False, line_break: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE, or a BPE of words with Metaspace's ``prepend_scheme``; its turns end with <|im_end|>."""
    options = {"special_tokens": SPECIAL, "show_progress": False}
    if scheme == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, **options)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(vocab_size=120, **options)
    backend.train_from_iterator(TEXT, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=TURN.replace("NL", "\n" if line_break else "") + HEADER,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )


def table(examples, tokenizer):
    """Prompt, completion and first negative of each example, as token ids."""
    data = tokenize_examples(examples, tokenizer, max_length=500, max_prompt_length=250)
    own = data.negatives or [[[]]] * len(data)
    return [(list(p), list(c), list(n[0])) for p, c, n in zip(data.prompts, data.completions, own, strict=True)]


PROMPTS = ["Hello ", "Hello", "The answer is", "The answer is 1", "what color?\n", "  Hello ", "", "Hel"]
ANSWERS = [("world", " sky"), (" world", "12"), ("2", "3"), (" blue.\n", "s"), ("", "x"), ("lo", "lo 12</s>")]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p in PROMPTS for c, r in ANSWERS]
IMPLICIT = [
    {"chosen": "<|im_start|>hi<|im_end|><|im_start|>yes", "rejected": "<|im_start|>hi<|im_end|><|im_end|>no"},
    {"chosen": "The answer is 12", "rejected": "The answer is 13"},
    {"chosen": "The answer is 12 and", "rejected": "The answer is 12 or"},
    {"chosen": "blue", "rejected": "sky"},
    {"chosen": "Hello", "rejected": "Hello world"},
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALKS = [
    {"prompt": [user("what color?")], "chosen": [assistant("blue.")], "rejected": [assistant("12 ")]},
    {
        "prompt": [user("Hello "), assistant("world"), user("12")],
        "chosen": [assistant("\nblue.")],
        "rejected": [assistant("")],
    },
    {"chosen": [user("sky?"), assistant("blue")], "rejected": [user("sky?"), assistant("Hello")]},
    {
        "prompt": [user("sky?")],
        "chosen": [assistant("blue"), user("is it"), assistant("12")],
        "rejected": [assistant("13")],
    },
]


def table_of_trl(examples, tokenizer, directory):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    config = trl.DPOConfig(output_dir=str(directory), report_to=[], use_cpu=True, max_length=None)
    rows = trainer._prepare_dataset(datasets.Dataset.from_list(examples), tokenizer, config, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


def with_bos(prompt):
    """TRL leaves the first token of a completion without a row that predicts it where a prompt has no tokens."""
    return prompt or [BOS]


def until_turn_end(ids):
    """TRL keeps the line break that a template puts behind a turn, where nothing is ever generated."""
    return ids[: len(ids) - ids[::-1].index(TURN_END)]


@pytest.mark.parametrize("line_break", [False, True], ids=["", "line break"])
@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("scheme", ["bytes", "first", "always", "never"])
def test_the_table_is_that_of_trl(scheme, adds_bos, line_break, tmp_path):
    tokenizer = make_tokenizer(scheme, adds_bos, line_break)
    for examples in (PAIRS, IMPLICIT):
        expected = table_of_trl(examples, tokenizer, tmp_path)
        assert table(examples, tokenizer) == [(with_bos(p), c, r) for p, c, r in expected]
    trl = pytest.importorskip("trl")
    talks = [trl.data_utils.maybe_extract_prompt(talk) for talk in TALKS]
    expected = [row for talk in talks for row in table_of_trl([talk], tokenizer, tmp_path)]
    assert table(TALKS, tokenizer) == [(p, until_turn_end(c), until_turn_end(r)) for p, c, r in expected]


@pytest.mark.parametrize("scheme", ["bytes", "first", "always", "never"])
def test_the_tokens_are_those_of_the_whole_text(scheme):
    tokenizer = make_tokenizer(scheme)
    whole = tokenizer("Hello world")["input_ids"]
    for prompt, completion in (("Hello ", "world"), ("Hello", " world"), ("Hel", "lo world")):
        ((p, c, _),) = table([{"prompt": prompt, "completion": completion}], tokenizer)
        assert [token for token in p + c if token not in (BOS, EOS)] == whole
        assert tokenizer.decode(p + c, skip_special_tokens=True) == "Hello world"


def test_text_boundaries_of_preferences_are_not_token_boundaries():
    tokenizer = make_tokenizer("bytes")
    ((prompt, chosen, rejected),) = table([{"chosen": "The answer is 12", "rejected": "The answer is 13"}], tokenizer)
    assert prompt == tokenizer("The answer is")["input_ids"]
    assert chosen == [*tokenizer(" 12")["input_ids"], EOS] and rejected == [*tokenizer(" 13")["input_ids"], EOS]
    ((prompt, chosen, _),) = table(IMPLICIT[:1], tokenizer)
    assert prompt == tokenizer("<|im_start|>hi<|im_end|>")["input_ids"]
    assert chosen[0] == SPECIAL.index("<|im_start|>")


def test_tokens_do_not_depend_on_the_neighbours():
    tokenizer = make_tokenizer("bytes", adds_bos=True)
    examples = [*PAIRS, *({"prompt": [5, 6], "chosen": "world", "rejected": [7]},), *TALKS]
    order = random.Random(0).sample(range(len(examples)), len(examples))
    alone = [table([example], tokenizer)[0] for example in examples]
    assert table([examples[i] for i in order], tokenizer) == [alone[i] for i in order]


def test_one_bos_and_no_eos_of_the_tokenizer():
    tokenizer = make_tokenizer("bytes")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    hello, world = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hello", " world"))
    for prompt in ("Hello", "<s>Hello"):
        assert table([{"prompt": prompt, "completion": " world"}], tokenizer) == [([BOS, *hello], [*world, EOS], [])]
    assert table([{"prompt": "", "completion": " world"}], tokenizer) == [([BOS], [*world, EOS], [])]


# Ends


@pytest.mark.parametrize("scheme", ["bytes", "first"])
@pytest.mark.parametrize("text", [" world<|im_end|>", " world<|im_end|>\n", " world</s>", " world</s> \n"])
def test_what_ends_a_text_is_not_ended_again(text, scheme):
    tokenizer = make_tokenizer(scheme)
    ((_, completion, negative),) = table([{"prompt": "Hello", "chosen": text, "rejected": text}], tokenizer)
    assert completion == negative
    assert completion[-1] == (TURN_END if "<|im_end|>" in text else EOS)
    assert sum(token in (EOS, TURN_END) for token in completion) == 1
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if scheme == "bytes":  # the other has no token for a line break
        assert table([{"prompt": [5], "completion": ids}], tokenizer)[0][1] == completion


def test_every_empty_completion_is_eos_alone():
    tokenizer = make_tokenizer("bytes")
    for empty in ("", [], [EOS]):
        ((_, completion, negative),) = table([{"prompt": "Hello", "chosen": empty, "rejected": " world"}], tokenizer)
        assert completion == [EOS] and negative[-1] == EOS
        example = {"prompt": "Hello", "chosen": " world", "rejected": [empty]}
        assert table([example], tokenizer)[0][2] == [EOS]
    assert table([{"chosen": "Hello", "rejected": ""}], tokenizer)[0][2] == [EOS]


# Texts of drawn tokens


@pytest.mark.parametrize("scheme", ["bytes", "first", "always", "never"])
def test_a_continuation_keeps_its_space_both_ways(scheme):
    tokenizer = make_tokenizer(scheme)
    prompt, ids = (tokenizer(text)["input_ids"] for text in ("Hello", "Hello world"))
    assert ids[: len(prompt)] == prompt
    assert text_behind(tokenizer, prompt, ids[len(prompt) :]) == " world"
    assert continuations(tokenizer, [prompt], [" world"]) == [ids[len(prompt) :]]
    alone = continuations(tokenizer, [[5, 6]], [" world"])
    assert tokenizer.decode([5, 6, *alone[0]]).endswith("world")


def test_the_text_behind_a_prompt_that_ends_within_a_token():
    tokenizer = make_tokenizer("bytes")
    hello, world, comma = (tokenizer(text)["input_ids"] for text in ("Hello", " world", ","))
    assert text_behind(tokenizer, hello, world, "Hello ") == "world"
    assert text_behind(tokenizer, hello, comma, "Hello ") is None
    assert text_behind(tokenizer, hello, comma, "Well. Hello") == ","  # of a prompt whose beginning was cut off
    assert text_behind(tokenizer, [BOS], world, "wor") is None
    assert text_behind(tokenizer, [BOS], world, " wor") == "ld"


def test_what_a_vocabulary_cannot_say_is_written_as_it_can():
    tokenizer = tiny_models.tokenizer()
    assert text_behind(tokenizer, [0, 3], [4, EOS], "ein Haus") == " a"
