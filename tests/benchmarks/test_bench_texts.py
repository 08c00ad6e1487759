"""Real text cut into prompts and completions."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tokenizers")

from benchmarks import texts
from benchmarks.setting import Setting

pytestmark = pytest.mark.cpu

WORDS = " ".join(f"word{i % 37}" for i in range(60))
SHORT = "too short to be cut"


def corpus(tmp_path, longest: int = 1000, **setting: object) -> texts.Corpus:
    file = tmp_path / "text.txt"
    file.write_text("\n".join([SHORT, *(f"{i} {WORDS}" for i in range(20))]))
    return texts.load(Setting(texts=(file,), **setting), longest)


def test_prompt_and_completion_make_the_paragraph(tmp_path):
    found = corpus(tmp_path)
    assert len(found.examples) == 20
    decoded = {found.tokenizer.decode(e.prompt + e.completion[:-1]) for e in found.examples}
    assert decoded == {f"{i} {WORDS}" for i in range(20)}
    assert all(
        e.completion[-1] == found.tokenizer.eos_token_id not in e.prompt + e.completion[:-1] for e in found.examples
    )
    assert len({len(e.prompt) for e in found.examples}) > 1


def test_long_texts_lose_beginning_or_end(tmp_path):
    whole, cut = corpus(tmp_path), corpus(tmp_path, 8)
    for long, short in zip(whole.examples, cut.examples, strict=True):
        assert short.prompt == long.prompt[-8:]
        assert short.completion == [*long.completion[:7], cut.tokenizer.eos_token_id]


def test_the_same_seed_is_the_same_order(tmp_path):
    assert corpus(tmp_path).examples == corpus(tmp_path).examples


def test_the_tokenizer_is_read_from_its_files(tmp_path):
    letters = sorted({chr(c) for c in range(33, 127)} | {"Ġ"})
    vocabulary = {token: i for i, token in enumerate([*letters, texts.EOS])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    found = corpus(tmp_path, tokenizer=tmp_path)
    assert len(found.tokenizer) == len(vocabulary) and found.tokenizer.eos_token_id == len(letters)
    assert {i for e in found.examples for i in e.prompt} <= set(vocabulary.values())


def test_without_files_the_text_is_that_of_python():
    text = texts.read(Setting())
    assert "expression" in text and len([p for p in text.split("\n") if len(p.split()) >= texts.SHORTEST]) > 500
