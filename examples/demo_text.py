"""The demo's text: paragraphs to learn from, and continuations of paragraphs, some of which nothing is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from cpo_kernels.trainer import TokenizedExamples, tokenize_examples

VOCABULARY = 8192
MAX_LENGTH = 96
MAX_PROMPT_LENGTH = 48
EOS = "<|endoftext|>"


def paragraphs(text: str) -> list[str]:
    """The distinct paragraphs of a text, each on one line."""
    blocks = (" ".join(block.split()) for block in text.replace("\r\n", "\n").split("\n\n"))
    return list(dict.fromkeys(block for block in blocks if len(block.split()) >= 8))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is long enough to be continued, and words rather than code or tables."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph.split()) >= 24 and letters >= 0.85 * len(paragraph)


def continuations(paragraph: str) -> Iterator[dict[str, str]]:
    """A paragraph as prompt and completion, cut at a third, a half and two thirds of its words."""
    words = paragraph.split()
    for numerator, denominator in ((1, 3), (1, 2), (2, 3)):
        cut = len(words) * numerator // denominator
        yield {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}


@dataclass
class Corpus:
    """What the demo trains and tests on; no held-out paragraph is in any other part."""

    tokenizer: PreTrainedTokenizerFast
    texts: TokenizedExamples  # whole paragraphs, for MLE from scratch
    train: TokenizedExamples
    held_out: TokenizedExamples

    @property
    def eos(self) -> int:
        """Ends every completion, and pads."""
        return self.tokenizer.eos_token_id


def load_text(path: str | None) -> str:
    """The text of a file, or the language reference that comes with Python."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def make_corpus(path: str | None, seed: int) -> Corpus:
    """Cut a text up and train a tokenizer on what is not held out.

    Raises:
        SystemExit: too little prose.
    """
    blocks = paragraphs(load_text(path))
    prose = [block for block in blocks if is_prose(block)]
    if len(prose) < 50:
        raise SystemExit(f"{path}: the demo needs at least 50 paragraphs of prose of 24 words, found {len(prose)}")
    held_out = set(random.Random(seed).sample(prose, len(prose) // 8))
    seen = [block for block in blocks if block not in held_out]

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(seen, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[EOS], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)

    def tokens(examples: list[dict[str, str]]) -> TokenizedExamples:
        limits = {"max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT_LENGTH}
        return tokenize_examples(examples, tokenizer, **limits)

    def pairs(kept: bool) -> list[dict[str, str]]:
        return [pair for block in prose if (block in held_out) == kept for pair in continuations(block)]

    texts = tokens([{"prompt": "", "completion": block} for block in seen])
    return Corpus(tokenizer, texts, tokens(pairs(kept=False)), tokens(pairs(kept=True)))
