"""The demo's text: paragraphs of prose, each a prompt and its continuation, some of them held out."""

from __future__ import annotations

import ast
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from cpo_kernels.trainer import TokenizedExamples, tokenize_examples

VOCABULARY = 1024
MAX_LENGTH, MAX_PROMPT_LENGTH = 64, 24
LEAST_WORDS, LEAST_PARAGRAPHS = 12, 48
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}  # folders of the library
EOS = "<|endoftext|>"


@dataclass
class Corpus:
    """A tokenizer, and the texts to train on and to test on, no paragraph of which is in both."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenizedExamples
    held_out: TokenizedExamples

    @property
    def eos(self) -> int:
        """Ends every completion that is not cut off, and pads."""
        return self.tokenizer.eos_token_id


def load_text(path: Path | None) -> str:
    """Return the text of a file, or what comes with Python: its language reference, and its library's docstrings."""
    if path is not None:
        return path.read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & {*path.relative_to(library).parts}]
    return "\n\n".join([*topics.values(), *(text for module in modules for text in docstrings(module))])


def docstrings(module: Path) -> list[str]:
    nodes = ast.walk(ast.parse(module.read_bytes()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]


def paragraphs(text: str) -> list[str]:
    """Return the distinct paragraphs of a text that are prose rather than code or tables, each on one line."""
    blocks = (" ".join(block.split()) for block in text.replace("\r\n", "\n").split("\n\n"))
    return [block for block in dict.fromkeys(blocks) if is_prose(block)]


def is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return len(paragraph.split()) >= LEAST_WORDS and letters >= 0.85 * len(paragraph)


def as_example(paragraph: str) -> dict[str, str]:
    """Cut a paragraph behind a third of its words."""
    words = paragraph.split()
    cut = len(words) // 3
    return {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}


def make_corpus(path: Path | None, held_out: int, seed: int) -> Corpus:
    """Cut a text up, hold out so many paragraphs or a quarter of them, and train a tokenizer on the others.

    Raises:
        SystemExit: too little prose.
    """
    prose = paragraphs(load_text(path))
    if len(prose) < LEAST_PARAGRAPHS:
        raise SystemExit(
            f"{path}: the demo needs at least {LEAST_PARAGRAPHS} paragraphs of prose of {LEAST_WORDS} words, found "
            f"{len(prose)}"
        )
    random.Random(seed).shuffle(prose)
    cut = min(held_out, len(prose) // 4)
    train = prose[cut:]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(train, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[EOS], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)
    parts = (
        tokenize_examples(
            [as_example(paragraph) for paragraph in part],
            tokenizer,
            max_length=MAX_LENGTH,
            max_prompt_length=MAX_PROMPT_LENGTH,
        )
        for part in (train, prose[:cut])
    )
    return Corpus(tokenizer, *parts)
