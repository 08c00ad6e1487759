"""Examples from files, directories and names: what is read, and what is said of what cannot be."""

from __future__ import annotations

import csv
import json
import logging
import re

import pytest
import tiny_models

from cpo_kernels.trainer.loading import load_examples

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.cpu

PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "negatives": ["e", "f"]}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def table(rows):
    """Every field of every row: a data set takes its columns from the first."""
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


# Files


def test_json_lines(tmp_path):
    assert load_examples(write(tmp_path / "a.jsonl", PAIRS)) == PAIRS


def test_blank_lines_hold_no_example(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(PAIRS[0]) + "\n\n")
    assert load_examples(str(path)) == PAIRS[:1]


def test_json_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PAIRS))
    assert load_examples(str(path)) == PAIRS


def test_several_files_in_order_of_their_names(tmp_path):
    write(tmp_path / "b.jsonl", PAIRS[1:])
    write(tmp_path / "a.jsonl", PAIRS[:1])
    assert load_examples(str(tmp_path / "*.jsonl")) == PAIRS


def test_parquet(tmp_path):
    table(PAIRS).to_parquet(str(tmp_path / "a.parquet"))
    (row, other) = load_examples(str(tmp_path / "a.parquet"))
    assert row == PAIRS[0] | {"negatives": None}
    assert other == PAIRS[1]
    datasets.Dataset.from_list(PAIRS[1:]).to_parquet(str(tmp_path / "b.parquet"))
    assert [row["prompt"] for row in load_examples(str(tmp_path / "*.parquet"))] == ["a", "c", "c"]


def test_csv(tmp_path):
    """Written by Python's own writer and by hand: quotes, commas and line breaks in cells, and a byte order mark."""
    path = tmp_path / "a.csv"
    rows = [
        {"prompt": 'say "a, b"', "completion": " two\nlines\r\n", "note": ""},
        {"prompt": "NA", "completion": "None", "note": "0.10"},
    ]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion", "note"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_examples(str(path)) == [rows[0] | {"note": None}, rows[1]]
    path.write_bytes(b'prompt , chosen,rejected,\n\n"a\n\nb", c,d,\n')
    assert load_examples(str(path)) == [{"prompt": "a\n\nb", "chosen": " c", "rejected": "d"}]


def test_lists_in_cells_are_json(tmp_path):
    """Also under the name that the file has for them; texts that look like lists stay texts."""
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion,wrong,ranks\n[1],[2],"[""e"", ""f""]","[1, 2]"\nc,d,,\n')
    assert load_examples(str(path), columns={"negatives": "wrong"}) == [
        {"prompt": "[1]", "completion": "[2]", "negatives": ["e", "f"], "ranks": [1, 2]},
        {"prompt": "c", "completion": "d", "negatives": None, "ranks": None},
    ]


def test_long_cells_and_other_readers(tmp_path):
    """Python's reader refuses cells beyond a limit, which belongs to the process."""
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text(f"text,title\n{'word ' * limit},t\n")
    (row,) = load_examples(str(path))
    assert len(row["prompt"]) + len(row["completion"]) == 5 * limit - 1
    assert csv.field_size_limit() == limit


def test_a_csv_file_meets_templates_and_texts(tmp_path):
    """An empty cell is an empty text in a template, and a column of texts is cut as everywhere."""
    path = tmp_path / "a.csv"
    path.write_text("question,context,answer\nWhy?,,So.\n")
    templates = {"prompt_template": "{{ question }}{{ context }}", "completion_template": " {{ answer }}"}
    assert load_examples(str(path), **templates)[0] == {"question": "Why?", "context": None, "answer": "So."} | {
        "prompt": "Why?",
        "completion": " So.",
    }
    path.write_text("text\none two\n")
    assert load_examples(str(path)) == [{"prompt": "one", "completion": " two"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv has no header"),
        ("prompt,completion\n", "a.csv has no examples"),
        ("question,answer\na,b\n", "a.csv:2: example 0 has no 'prompt', only ['answer', 'question']"),
        ('prompt,completion\n"a\n\nb",c\nd,\n', "a.csv:5: example 1 has no 'completion', only ['prompt']"),
        ("prompt,completion\na,b\n\nc\n", "a.csv:4 has 1 cells; expected 2, those of 'prompt', 'completion'"),
        ("prompt,completion\na, b, and c\n", "a.csv:2 has 3 cells; expected 2"),
        ('prompt,completion\na,b\nc,"d\n', "a.csv:3 is not CSV: unexpected end of data"),
        ('prompt,completion\na,"b" c\n', "a.csv:2 is not CSV: "),
        ("prompt,prompt\na,b\n", "a.csv:1 names the column 'prompt' twice"),
        ("prompt,completion,negatives\na,b,c\n", "a.csv:2: 'negatives' of example 0 must be a list"),
        ('prompt,completion,negatives,ranks\na,b,"[""c""]",[-1]\n', "a.csv:2: 'ranks' of example 0"),
        ("prompt,completion\na,\udcff\n", "a.csv is not UTF-8"),
    ],
)
def test_a_bad_line_of_a_csv_file_names_itself(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_examples(str(tmp_path / "a.csv"))


def test_saved_data_set(tmp_path):
    table(PAIRS).save_to_disk(str(tmp_path / "one"))
    assert load_examples(str(tmp_path / "one"))[1] == PAIRS[1]
    parts = {"train": datasets.Dataset.from_list(PAIRS[:1]), "test": datasets.Dataset.from_list(PAIRS[1:])}
    splits = datasets.DatasetDict(parts)
    splits.save_to_disk(str(tmp_path / "splits"))
    assert list(load_examples(str(tmp_path / "splits"), split="test")) == PAIRS[1:]
    with pytest.raises(ValueError, match=r"has no split 'dev', only \['test', 'train'\]"):
        load_examples(str(tmp_path / "splits"), split="dev")


def test_the_first_examples_only(tmp_path):
    assert load_examples(write(tmp_path / "a.jsonl", PAIRS), max_examples=1) == PAIRS[:1]
    datasets.Dataset.from_list(PAIRS).to_parquet(str(tmp_path / "a.parquet"))
    assert len(load_examples(str(tmp_path / "a.parquet"), max_examples=1)) == 1


# Columns and templates

ROWS = [{"question": "Why?", "context": "", "answer": "So."}, {"question": "Who?", "context": "Here.", "answer": "Me."}]


def test_columns_are_renamed(tmp_path):
    got = load_examples(write(tmp_path / "a.jsonl", ROWS), columns={"prompt": "question", "completion": "answer"})
    assert got[0] == {"prompt": "Why?", "completion": "So.", "context": ""}


def test_templates_are_filled_in(tmp_path):
    prompt = "{{ question }}\n{% if context %}\n{{ context }}\n{% endif %}\nAnswer:"
    templates = {"prompt_template": prompt, "completion_template": " {{ answer }}"}
    got = load_examples(write(tmp_path / "a.jsonl", ROWS), **templates)
    assert [row["prompt"] for row in got] == ["Why?\nAnswer:", "Who?\nHere.\nAnswer:"]
    assert [row["completion"] for row in got] == [" So.", " Me."]


def test_templates_see_the_names_of_the_row(tmp_path):
    """Both may name one field: a template reads the row as it is in the file."""
    options = {"columns": {"completion": "answer"}, "prompt_template": "{{ answer }}?"}
    assert load_examples(write(tmp_path / "a.jsonl", ROWS), **options)[0]["prompt"] == "So.?"


# Texts

TEXT = "one two  three\nfour five six\n\n\n\nseven eight\n"


def test_documents_are_cut_by_words(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    first, second = load_examples(str(tmp_path / "a.txt"), prompt_fraction=1 / 3)
    assert first == {"prompt": "one two", "completion": "  three\nfour five six"}
    assert second == {"prompt": "seven", "completion": " eight"}


@pytest.mark.parametrize(("fraction", "words"), [(0.01, 1), (0.5, 3), (0.7, 4), (0.99, 5)])
def test_a_cut_leaves_words_on_both_sides(tmp_path, fraction, words):
    (tmp_path / "a.txt").write_text("one two three four five six")
    (got,) = load_examples(str(tmp_path / "a.txt"), prompt_fraction=fraction)
    assert len(got["prompt"].split()) == words
    assert got["prompt"] + got["completion"] == "one two three four five six"


def test_documents_are_cut_by_tokens(tmp_path):
    tokenizer = tiny_models.tokenizer()
    words = tiny_models.WORDS[:13]
    (tmp_path / "a.txt").write_text(" ".join(words) + "\n\nthe cat\n")
    got = load_examples(str(tmp_path / "a.txt"), prompt_tokens=2, completion_tokens=3, tokenizer=tokenizer)
    ids = tokenizer(" ".join(words))["input_ids"]
    assert got == [
        {"prompt": ids[:2], "completion": ids[2:5]},
        {"prompt": ids[5:7], "completion": ids[7:10]},
        {"prompt": ids[10:12], "completion": ids[12:13]},
    ]


def test_texts_of_a_table_and_texts_too_short(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [{"body": "word"}, {"body": "two words"}])
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        assert load_examples(path, text_column="body") == [{"prompt": "two", "completion": " words"}]
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert "1 of 2 texts are too short to cut and left out, the first at" in caplog.text
    assert "a.jsonl:1" in caplog.text
    with pytest.raises(ValueError, match="all 1 texts are too short to cut"):
        load_examples(path, text_column="body", max_examples=1)


# What cannot be read names itself


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "a.jsonl:3 is not JSON: Expecting property name"),
        ('{"prompt": "x"', "a.jsonl:3 is not JSON"),
        ("[1, 2]", "a.jsonl:3 must be an object with fields, got list"),
        ('{"prompt": "x"}', "a.jsonl:3: example 2 has no 'completion'"),
        ('{"prompt": "x", "completion": 4}', "a.jsonl:3: 'completion' of example 2 must be a string"),
        ('{"prompt": "x", "completion": "y", "negatives": ["z"], "ranks": [-1]}', "a.jsonl:3: 'ranks' of example 2"),
        ("\udcff", "a.jsonl:3 is not JSON"),
        ('{"prompt": "x", "completion": "\\ud800"}', "a.jsonl:3: 'completion' of example 2 holds half of a surrogate"),
        ('{"text": "a \\ud800"}', "a.jsonl:3: 'text' holds half of a surrogate pair"),
        ('{"prompt": "x", "completion": [3, 50]}', "a.jsonl:3: 'completion' of example 2 has the token id 50"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS) + line + "\n"
    path.write_bytes(lines.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_examples(str(path), vocab_size=50)


def test_a_bad_line_of_the_second_file_is_found(tmp_path):
    write(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "b.jsonl").write_text(json.dumps(PAIRS[0]) + "\n\n{}\n")
    with pytest.raises(ValueError, match=r"b.jsonl:3: example 3 has no 'prompt'"):
        load_examples(str(tmp_path / "*.jsonl"))


def test_a_bad_row_of_a_table_names_file_and_row(tmp_path):
    datasets.Dataset.from_list(PAIRS[:1]).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list([*PAIRS[:1], {"prompt": "c"}]).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match=r"b.parquet, row 1: example 2 has no 'completion'"):
        load_examples(str(tmp_path / "*.parquet"))


def test_a_template_that_does_not_fit_names_itself(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"prompt_template does not fit .*a.jsonl:1, .*'nothing' is undefined"):
        load_examples(path, prompt_template="{{ nothing }}", completion_template="{{ answer }}")
    with pytest.raises(ValueError, match="completion_template is not a Jinja template"):
        load_examples(path, prompt_template="x", completion_template="{{ answer ")
    with pytest.raises(ValueError, match=r"a.jsonl:1 has no 'reply', which columns takes 'completion' from"):
        load_examples(path, columns={"completion": "reply"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_fraction": 1.0}, r"prompt_fraction must be in \(0, 1\), got 1.0"),
        ({"prompt_tokens": 4}, "prompt_tokens=4 and completion_tokens=None"),
        ({"prompt_tokens": 0, "completion_tokens": 4}, "prompt_tokens must be at least 1, got 0"),
        ({"prompt_tokens": 4, "completion_tokens": 4}, "pass the tokenizer"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "a.jsonl", PAIRS), **options)


@pytest.mark.parametrize("source", ["nothing.jsonl", "./nothing", "no/*/such", "/nowhere/at/all"])
def test_files_that_are_not_there(source):
    with pytest.raises(ValueError, match=re.escape(f"there is no file {source}")):
        load_examples(source)


def test_files_of_unknown_kinds(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\n")
    with pytest.raises(ValueError, match=r"a.tsv: expected a file of type .jsonl, .json, .csv, .*, .txt, got .tsv"):
        load_examples(str(tmp_path / "a.tsv"))
    with pytest.raises(ValueError, match="is not a directory that datasets saved"):
        load_examples(str(tmp_path))
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"a.parquet is not Parquet"):
        load_examples(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a.jsonl has no examples"):
        load_examples(str(tmp_path / "a.jsonl"))


def test_a_name_on_the_hub_without_a_network_says_what_was_asked_for(monkeypatch):
    def refuse(*args, **kwargs):
        assert (args, kwargs) == (("someone/some-data", "en"), {"split": "train[:5]"})
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    asked = r"the data set 'someone/some-data' \(configuration 'en', split 'train\[:5\]'\): ConnectionError: Couldn't"
    with pytest.raises(RuntimeError, match=asked):
        load_examples("someone/some-data", name="en", split="train[:5]")


def test_a_name_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(PAIRS))
    assert isinstance(load_examples("someone/some-data"), datasets.Dataset)  # as it came: nothing had to be changed
