"""What the models of the study learn: tasks whose outcomes can be decided, and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cpo_kernels.trainer import TokenizedExamples

Ids = Sequence[int]
Example = tuple[list[int], list[int]]  # prompt and completion


class Task(Protocol):
    """A kind of text, with parts of it to train on and parts that nothing is trained on.

    Attributes:
        name: of the task.
        quality_name: of what :meth:`quality` measures.
        vocab_size: number of tokens.
        eos: the token that ends a completion, which pads too.
        max_length: tokens of prompt and completion together, at most.
        width, layers: sizes of the models.
    """

    name: str
    quality_name: str
    vocab_size: int
    eos: int
    max_length: int
    width: int
    layers: int

    def examples(self, part: str, seed: int) -> TokenizedExamples:
        """Return a part of the data: ``train``, ``few`` (drawn by the seed), ``other``, ``validation`` or ``test``."""

    def quality(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]:
        """Measure completions, each ended with EOS unless it was cut off: the higher, the better."""


def tokenized(examples: Sequence[Example]) -> TokenizedExamples:
    """Make the data of a trainer."""
    return TokenizedExamples([prompt for prompt, _ in examples], [completion for _, completion in examples])
