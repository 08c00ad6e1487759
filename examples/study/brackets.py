"""Balanced brackets of several types within a budget; the beginnings that are tested were never seen."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tasks import Example, Ids, tokenized

from cpo_kernels.trainer import TokenizedExamples

TYPES = 3
BUDGETS, OTHER_BUDGETS = (12, 14, 16), (6, 8, 10)  # characters in all; in the other distribution, texts are shorter
PREFIX = 6  # characters of the prompt
VALIDATION, TEST, TRAIN, FEW = 256, 1024, 12000, 512


class Brackets:
    """The task: a prompt is a budget and a beginning; a completion closes what is open when the budget is used up."""

    name, quality_name = "brackets", "balanced texts"
    width, layers = 64, 2

    def __init__(self) -> None:
        # Openings are 0, 1, 2 and their closings 3, 4, 5; then the budgets and EOS.
        self.first_budget = 2 * TYPES
        self.eos = self.first_budget + max(BUDGETS) + 1
        self.vocab_size = self.eos + 1
        self.max_length = 1 + max(BUDGETS) + 1
        rng = random.Random(0)
        self.parts: dict[str, list[Example]] = {}
        held_out: set[tuple[int, ...]] = set()
        for part, count in (("validation", VALIDATION), ("test", TEST)):
            drawn: dict[tuple[int, ...], Example] = {}
            while len(drawn) < count:
                example = self._draw(BUDGETS, rng)
                if tuple(example[0]) not in held_out:
                    drawn.setdefault(tuple(example[0]), example)
            self.parts[part] = list(drawn.values())
            held_out |= set(drawn)
        self.parts["train"], self.parts["other"] = [], []
        while len(self.parts["train"]) < TRAIN:
            example = self._draw(BUDGETS, rng)
            if tuple(example[0]) not in held_out:
                self.parts["train"].append(example)
        # Of shorter texts, the prompt is shorter too.
        self.parts["other"] = [self._draw(OTHER_BUDGETS, rng, PREFIX // 2) for _ in range(TRAIN)]

    def examples(self, part: str, seed: int) -> TokenizedExamples:
        """Return a part of the data."""
        if part == "few":
            return tokenized(random.Random(f"{part} {seed}").sample(self.parts["train"], FEW))
        return tokenized(self.parts[part])

    def _draw(self, budgets: Sequence[int], rng: random.Random, prefix: int = PREFIX) -> Example:
        """Draw a balanced text: at each place an opening or a closing, either if both are possible."""
        budget = rng.choice(budgets)
        text: list[int] = []
        is_open: list[int] = []
        for left in range(budget, 0, -1):
            opens = not is_open or (len(is_open) < left and rng.random() < 0.5)
            if opens:
                is_open.append(rng.randrange(TYPES))
            text.append(is_open[-1] if opens else is_open.pop() + TYPES)
        return [self.first_budget + budget, *text[:prefix]], [*text[prefix:], self.eos]

    def quality(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]:
        """Return 1 for a balanced text that uses up the budget and is ended; else 0."""
        return [float(self._valid(prompt, own)) for prompt, own in zip(prompts, completions, strict=True)]

    def _valid(self, prompt: Ids, completion: Ids) -> bool:
        text = [*prompt[1:], *completion[:-1]]
        if completion[-1] != self.eos or len(text) != prompt[0] - self.first_budget:
            return False
        is_open: list[int] = []
        for token in text:
            if token < TYPES:
                is_open.append(token)
            elif not (token < 2 * TYPES and is_open and is_open.pop() == token - TYPES):
                return False
        return not is_open
