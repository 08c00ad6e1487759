"""Reads real text for the benchmarks: files that the user names, or the reference text that comes with Python."""

from __future__ import annotations

import random
from typing import NamedTuple

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.setting import Setting

EOS = "<|endoftext|>"
TRAINED_VOCABULARY = 8192
SHORTEST = 24  # words of a paragraph that can be cut into prompt and completion


class Example(NamedTuple):
    """Holds a paragraph as token ids, cut in two; `completion` ends with EOS."""

    prompt: list[int]
    completion: list[int]


class Corpus(NamedTuple):
    """Holds examples of natural lengths in a random but repeatable order, and their tokenizer."""

    examples: list[Example]
    tokenizer: PreTrainedTokenizerFast


def load(setting: Setting, longest: int, seed: int = 0) -> Corpus:
    """Return every paragraph of at least 24 words, cut at a third, a half or two thirds of its words.

    What is longer than `longest` tokens loses its beginning, as a prompt, or its end; `seed` is of order and cuts.
    """
    paragraphs = [p for p in read(setting).split("\n") if len(p.split()) >= SHORTEST]
    draw = random.Random(seed)
    draw.shuffle(paragraphs)
    tokenizer = make_tokenizer(setting, paragraphs)
    examples = []
    for paragraph in paragraphs:
        words = paragraph.split()
        cut = len(words) * draw.choice((2, 3, 4)) // 6
        prompt, completion = (tokenizer.encode(" ".join(part)) for part in (words[:cut], ["", *words[cut:]]))
        examples.append(Example(prompt[-longest:], [*completion[: longest - 1], tokenizer.eos_token_id]))
    return Corpus(examples, tokenizer)


def read(setting: Setting) -> str:
    """Read one paragraph a line."""
    if setting.texts:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in setting.texts)
    from pydoc_data.topics import topics

    blocks = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n".join(dict.fromkeys(" ".join(block.split()) for block in blocks))


def make_tokenizer(setting: Setting, paragraphs: list[str]) -> PreTrainedTokenizerFast:
    """Make GPT-2's from its files, or one trained on the text."""
    if setting.tokenizer:
        files = [str(setting.tokenizer / name) for name in ("vocab.json", "merges.txt")]
        bpe = ByteLevelBPETokenizer(*files, add_prefix_space=False)
    else:
        bpe = ByteLevelBPETokenizer()
        options = {"min_frequency": 2, "special_tokens": [EOS], "show_progress": False}
        bpe.train_from_iterator(paragraphs, vocab_size=TRAINED_VOCABULARY, **options)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)
