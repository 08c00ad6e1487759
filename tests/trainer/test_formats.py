"""Every shape that an example may have, against TRL's own reading of it where TRL has one."""

from __future__ import annotations

import json

import pytest
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import PreTrainedTokenizerFast

from cpo_kernels.trainer.formats import Example, normalize_example, without_none

pytestmark = pytest.mark.cpu

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>"]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, so that decoding gives the text back; BOS before every text, as Llama's has."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["what color is the sky? it is blue."], vocab_size=300, special_tokens=SPECIAL)
    bos = SPECIAL.index("<|bos|>")
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    special = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=TEMPLATE, **special)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SKY = user("What color is the sky?")
BLUE, GREEN, RED = assistant("It is blue."), assistant("It is green."), assistant("Red.")


def plain(example):
    return normalize_example(example, 0, None)


# Texts and token ids


def test_prompt_and_completion_pass_through():
    assert plain({"prompt": "a", "completion": "b", "id": 3}) == Example("a", ["b"], None, [])
    ids = plain({"prompt": [1, 2], "completion": (3,), "negatives": [[4, 5], "text"]})
    assert ids == Example([1, 2], [[3], [4, 5], "text"], None, ["given", "given"])


def test_ranks_and_kinds_are_kept_beside_their_negatives():
    example = {"prompt": "a", "completion": "b", "negatives": ["c", "d"]}
    given = plain(example | {"ranks": [0, 2], "kinds": ["autoregressive", "given"]})
    assert (given.ranks, given.kinds) == ([0, 2], ["autoregressive", "given"])


def test_none_is_absent():
    """A column of a table has None where an example says nothing."""
    example = {"prompt": "a", "completion": "b", "negatives": None, "ranks": None, "kinds": None, "chosen": None}
    assert plain(example) == plain({"prompt": "a", "completion": "b"})


@pytest.mark.parametrize("rejected", ["c", "", ["c"], ["c", "d", ""]])
def test_preference_texts(rejected):
    got = plain({"prompt": "a", "chosen": "b", "rejected": rejected})
    negatives = [rejected] if isinstance(rejected, str) else rejected
    assert got == Example("a", ["b", *negatives], None, ["given"] * len(negatives))


@pytest.mark.parametrize(("rejected", "negatives"), [([4, 5], [[4, 5]]), ([[4, 5], [6]], [[4, 5], [6]])])
def test_preference_token_ids(rejected, negatives):
    assert plain({"prompt": [1], "chosen": [2, 3], "rejected": rejected}).candidates == [[2, 3], *negatives]


def test_preference_ranks():
    example = {"prompt": "a", "chosen": "b", "rejected": ["c", "d"], "ranks": [2, 1]}
    assert plain(example).ranks == [2, 1]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),  # a space before the first difference goes to the completions
        ("The sky is blue.", "The sky isn't."),
        ("The sky", "The sky is green."),  # one begins with all of the other
        ("same", "same"),
        ([1, 2, 3, 4], [1, 2, 5]),
        ([SKY, BLUE], [SKY, GREEN]),
        ([SKY, BLUE, SKY, RED], [SKY, BLUE, SKY, GREEN]),
    ],
)
def test_implicit_prompt_is_that_of_trl(chosen, rejected, tokenizer):
    trl = pytest.importorskip("trl")
    expected = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    got = normalize_example({"chosen": chosen, "rejected": rejected}, 0, tokenizer)
    assert got == normalize_example(expected, 0, tokenizer)
    if not isinstance(chosen[0], dict):
        prompt = expected["prompt"]
        assert (got.prompt, got.candidates) == (prompt, [expected["chosen"], rejected[len(prompt) :]])


def test_implicit_prompt_of_several_rejected():
    got = plain({"chosen": "The sky is blue", "rejected": ["The sky is green", "The sea"]})
    assert (got.prompt, got.candidates) == ("The s", ["ky is blue", "ky is green", "ea"])


@pytest.mark.parametrize(("chosen", "rejected"), [("blue ", "green"), ("blue", ""), ("", "green")])
def test_implicit_prompt_of_nothing(chosen, rejected):
    """TRL looks at the last character of ``chosen`` here; there is no prompt to take a space from."""
    got = plain({"chosen": chosen, "rejected": rejected})
    assert (got.prompt, got.candidates) == ("", [chosen, rejected])


# Conversations


def texts_of_trl(example, tokenizer):
    """TRL's templated texts: the prompt, then each candidate behind it."""
    trl = pytest.importorskip("trl")
    texts = trl.apply_chat_template(example, tokenizer)
    return [texts["prompt"], *(texts["prompt"] + text for name, text in texts.items() if name != "prompt")]


def texts_of(example, tokenizer):
    got = normalize_example(example, 0, tokenizer)
    assert got.rendered
    return [got.prompt, *got.candidates]


@pytest.mark.parametrize("prompt", [[SKY], [SKY, RED, user("And now?")], [SKY, assistant("It ")]])
def test_templates_are_applied_as_by_trl(prompt, tokenizer):
    pair = {"prompt": prompt, "completion": [BLUE]}
    assert texts_of(pair, tokenizer) == texts_of_trl(pair, tokenizer)
    preference = {"prompt": prompt, "chosen": [BLUE], "rejected": [GREEN]}
    assert texts_of(preference, tokenizer) == texts_of_trl(preference, tokenizer)


def test_one_rejected_conversation_needs_no_list_around_it(tokenizer):
    example = {"prompt": [SKY], "chosen": [BLUE]}
    one = normalize_example(example | {"rejected": [GREEN]}, 0, tokenizer)
    assert one == normalize_example(example | {"rejected": [[GREEN]]}, 0, tokenizer)
    assert one == normalize_example({"prompt": [SKY], "completion": [BLUE], "negatives": [[GREEN]]}, 0, tokenizer)


def test_a_text_prompt_that_conversations_repeat_is_left_to_them(tokenizer):
    trl = pytest.importorskip("trl")
    example = {"prompt": SKY["content"], "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}
    expected = normalize_example(trl.data_utils.maybe_extract_prompt(example), 0, tokenizer)
    assert normalize_example(example, 0, tokenizer) == expected


def with_template(tokenizer, template):
    return type(tokenizer)(tokenizer_object=tokenizer._tokenizer, chat_template=template, eos_token="<|im_end|>")


def test_arguments_of_the_template_come_from_the_example(tokenizer):
    tokenizer = with_template(
        tokenizer, TEMPLATE + "{% if thinking is defined and add_generation_prompt %}<think>{% endif %}"
    )
    example = {"prompt": [SKY], "completion": [assistant("<think>No.")], "chat_template_kwargs": {"thinking": True}}
    assert texts_of(example, tokenizer)[0] == texts_of_trl(example, tokenizer)[0]
    assert texts_of(example, tokenizer)[0].endswith("<think>")


# A template that writes out all that it is given, as templates of models with tools do.
WRITES_ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% for key in m %}{% if key != 'role' %} {{ key }}: {{ m[key] | tojson }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}"
)


def call(**arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def tool(**properties):
    kinds = {name: {"type": kind} for name, kind in properties.items()}
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": kinds}}}


TOOL_ROWS = [
    {"prompt": [SKY], "completion": [call(city="Rome")], "tools": [tool(city="string")]},
    {"prompt": [SKY | {"name": "Ann"}], "completion": [call(day={"month": 5})], "tools": [tool(day="object")]},
    {"prompt": [SKY], "completion": [BLUE], "tools": None},
]


@pytest.mark.parametrize("form", ["dataset", "parquet", "jsonl"])
def test_tables_and_lists_give_the_same_texts(form, tokenizer, tmp_path):
    """A table fills every key that some row has with None, at any depth."""
    datasets = pytest.importorskip("datasets")
    tokenizer = with_template(tokenizer, WRITES_ALL)
    table = datasets.Dataset.from_list(TOOL_ROWS)
    assert table[0]["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "day": None}
    if form == "parquet":
        table.to_parquet(str(tmp_path / "rows.parquet"))
        table = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    elif form == "jsonl":
        table = [json.loads(json.dumps(row)) for row in table]
    got = [texts_of(row, tokenizer) for row in table]
    assert got == [texts_of(row, tokenizer) for row in TOOL_ROWS]
    written = "".join(text for texts in got for text in texts)
    assert '"arguments": {"city": "Rome"}' in written and '"arguments": {"day": {"month": 5}}' in written
    assert "null" not in written


def test_messages_that_a_table_has_filled_are_still_the_same_message(tokenizer):
    example = {"chosen": [SKY, BLUE], "rejected": [SKY | {"name": None, "tool_calls": None}, GREEN]}
    assert texts_of(example, tokenizer)[0] == texts_of({"prompt": [SKY], "completion": [BLUE]}, tokenizer)[0]


def test_none_within_a_list_stays():
    assert without_none({"a": [1, None, {"b": None}], "c": None}) == {"a": [1, None, {}]}


# What cannot be read names itself

PAIR = {"prompt": "a", "completion": "b"}
BAD = {
    "no prompt": ({"completion": "b"}, r"example 7 has no 'prompt', only \['completion'\]"),
    "no completion": ({"prompt": "a"}, "example 7 has no 'completion'"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "example 7 has no 'rejected'"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "example 7 has no 'chosen'"),
    "both forms": (PAIR | {"chosen": "b", "rejected": "c"}, "example 7 has both 'chosen' and 'completion'"),
    "number": (PAIR | {"completion": 3.5}, "'completion' of example 7 must be a string, .* got float 3.5"),
    "bool ids": (PAIR | {"completion": [True]}, r"'completion' of example 7 .* got list \[True\]"),
    "no role": (PAIR | {"prompt": [{"content": "x"}]}, "'prompt' of example 7 must be"),
    "negatives text": (
        PAIR | {"negatives": "c"},
        "'negatives' of example 7 must be a list of completions, got str 'c'",
    ),
    "negative": (PAIR | {"negatives": ["c", None]}, "'negatives' of example 7 .* got NoneType None at 1"),
    "no negatives": ({"prompt": "a", "chosen": "b", "rejected": []}, "'rejected' of example 7 is an empty list"),
    "rank count": (
        PAIR | {"negatives": ["c"], "ranks": [1, 2]},
        "'ranks' of example 7 .* each of 1 'negatives', got 2",
    ),
    "rank sign": (PAIR | {"negatives": ["c"], "ranks": [-1]}, "'ranks' of example 7 .* at least 0, got int -1 at 0"),
    "rank type": (PAIR | {"negatives": ["c"], "ranks": [1.0]}, "'ranks' of example 7 .* got float 1.0 at 0"),
    "ranks alone": (PAIR | {"ranks": [1]}, "'ranks' of example 7 must have one entry for each of 0 'negatives', got 1"),
    "kind": (PAIR | {"negatives": ["c"], "kinds": ["made"]}, "'kinds' of example 7 .* got str 'made' at 0"),
    "kinds": (PAIR | {"negatives": ["c"], "kinds": "given"}, "'kinds' of example 7 must be a list, got str 'given'"),
    "mixed": ({"prompt": [SKY], "completion": "b"}, "example 7 mixes .*'prompt' has messages, 'completion' has no"),
    "mixed negatives": (PAIR | {"negatives": ["c", [GREEN]]}, "example 7 mixes messages with plain texts"),
    "implicit mixed": ({"chosen": "b", "rejected": [1]}, "'chosen' and 'rejected' of example 7 have no 'prompt' and"),
    "surrogate": (
        PAIR | {"completion": "b\ud800"},
        r"'completion' of example 7 holds half .* '\\ud800' at character 1",
    ),
    "surrogate in a message": (
        {"prompt": [SKY], "completion": [assistant("\udfff")]},
        "'completion' of example 7 holds half of a surrogate pair",
    ),
    "surrogate in a tool": (
        {"prompt": [SKY], "completion": [BLUE], "tools": [{"name": "\ud801"}]},
        "'tools' or 'chat_template_kwargs' of example 7 holds half of a surrogate pair",
    ),
    "negative id": (
        PAIR | {"prompt": [3, -100]},
        "'prompt' of example 7 has the token id -100; expected .* at least 0",
    ),
    "no common message": ({"chosen": [BLUE], "rejected": [GREEN]}, "conversations of example 7 do not begin with"),
    "role": ({"prompt": [{"role": "system", "content": ""}], "completion": [BLUE]}, "'prompt' .* 7 .* got 'system'"),
}


@pytest.mark.parametrize(("example", "message"), BAD.values(), ids=BAD)
def test_bad_fields_name_themselves(example, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        normalize_example(example, 7, tokenizer)


def test_a_tokenizer_without_a_template_is_named(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="example 7 is a conversation, but the tokenizer has no chat template"):
        normalize_example({"prompt": [SKY], "completion": [BLUE]}, 7, bare)


def test_what_a_template_refuses_names_the_example(tokenizer):
    refuses = "{{ raise_exception('roles must alternate') }}"
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, chat_template=refuses, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="messages of example 7: roles must alternate"):
        normalize_example({"prompt": [SKY], "completion": [BLUE]}, 7, tokenizer)


def test_a_token_id_without_an_embedding_names_itself():
    example = {"prompt": [1], "chosen": [2], "rejected": [[3], [4, 50]]}
    with pytest.raises(ValueError, match=r"'rejected' of example 7 has the token id 50; .* below 50, the number of"):
        normalize_example(example, 7, None, vocab_size=50)
    assert normalize_example(example, 7, None, vocab_size=51).candidates == [[2], [3], [4, 50]]
