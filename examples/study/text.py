"""English text, continued by models of it and judged by a larger model that was trained on more of it.

Paragraphs are divided once for all: what the arms see, what the judge sees, and what neither does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measures import scored
from tasks import Example, Ids, tokenized
from tokenizers import ByteLevelBPETokenizer

from cpo_kernels.trainer import TokenizedExamples

VOCABULARY = 1024
PROMPT, COMPLETION = 12, 24  # tokens, at most
JUDGE_SHARE, HELD_OUT_SHARE = 0.5, 0.15
LETTERS = 0.85  # the least share of letters and spaces in prose, as opposed to code and tables


def paragraphs(path: str | None) -> list[str]:
    """Return the distinct paragraphs of at least 8 words of a file, or of the language reference within Python."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = Path(path).read_text(encoding="utf-8")
    blocks = (" ".join(block.split()) for block in text.split("\n\n"))
    return list(dict.fromkeys(block for block in blocks if len(block.split()) >= 8))


class Text:
    """The task: a prompt is the beginning of a piece of a paragraph, a completion what follows.

    Args:
        data: a file of plain text, paragraphs separated by blank lines. None: Python's language reference.
        judge_data: another one, for the judge. None: a part of ``data`` that no arm sees.

    Attributes:
        judge: the model that :meth:`quality` asks; set before that is called.
    """

    name, quality_name = "text", "judge's log-likelihood per token"
    width, layers = 64, 2
    judge_width, judge_layers = 128, 3
    max_length = PROMPT + COMPLETION

    def __init__(self, data: str | None = None, judge_data: str | None = None) -> None:
        blocks = paragraphs(data)
        random.Random(0).shuffle(blocks)
        held_out, rest = _split(blocks, HELD_OUT_SHARE)
        validation, test = _split([block for block in held_out if _is_prose(block)], 0.25)
        judged, seen = _split(rest, JUDGE_SHARE) if judge_data is None else (paragraphs(judge_data), rest)
        judged = [block for block in judged if block not in {*held_out}]
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(rest, vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
        self.tokenizer, self.eos, self.vocab_size = bpe, bpe.token_to_id("<end>"), bpe.get_vocab_size()
        self.judge: Any = None
        prose = [block for block in seen if _is_prose(block)]
        texts = {"train": prose, "judge": judged, "validation": validation, "test": test}
        texts["other"] = [block for block in seen if not _is_prose(block)]
        self.parts: dict[str, list[Example]] = {}
        taken: set[tuple[int, ...]] = set()
        for part in ("train", "other", "judge", "validation", "test"):  # a piece that comes again is in the first alone
            own = list(self._pieces(texts[part]))
            self.parts[part] = [piece for piece in own if (*piece[0], *piece[1]) not in taken]
            taken |= {(*prompt, *completion) for prompt, completion in own}
        self.parts["few"] = self.parts["train"]
        for part, own in self.parts.items():
            if len(own) < 32:
                raise SystemExit(f"{data}: too little text, {len(own)} pieces of it for the part {part!r}")

    def examples(self, part: str, seed: int) -> TokenizedExamples:
        """Return a part of the data, or ``judge``, that of the judge."""
        return tokenized(self.parts[part])

    def _pieces(self, blocks: Sequence[str]) -> Iterator[Example]:
        """Cut texts into consecutive pieces; the last of a paragraph is ended."""
        size = PROMPT + COMPLETION
        for block in blocks:
            ids = [*self.tokenizer.encode(block).ids, self.eos]
            for start in range(0, len(ids), size):
                piece = ids[start : start + size]
                if len(piece) >= 2 * PROMPT:
                    yield piece[:PROMPT], piece[PROMPT:]

    def quality(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]:
        """Return the judge's log-likelihood per token."""
        return [score.logp / score.tokens for score in scored(self.judge, prompts, completions, self.eos)]


def _is_prose(block: str) -> bool:
    return sum(char.isalpha() or char == " " for char in block) >= LETTERS * len(block)


def _split(blocks: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    cut = round(share * len(blocks))
    return list(blocks[:cut]), list(blocks[cut:])
