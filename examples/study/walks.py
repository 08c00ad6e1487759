"""Walks of a given length between two nodes of a fixed graph; pairs of nodes that are tested were never seen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from tasks import Example, Ids, tokenized

from cpo_kernels.trainer import TokenizedExamples

NODES, DEGREE = 64, 4
LENGTHS, OTHER_LENGTHS = (4, 5), (2, 3)  # edges of a walk; in the other distribution, walks are shorter
VALIDATION, TEST = 256, 1024  # pairs
WALKS_OF_PAIR, FEW = 4, 512  # examples to train on: of each pair, and of all where there are few


def _graph(rng: random.Random) -> list[list[int]]:
    """Draw a directed graph in which each node has as many edges out as in: the sum of random permutations."""
    while True:
        orders = [rng.sample(range(NODES), NODES) for _ in range(DEGREE)]
        edges = [sorted({order[node] for order in orders} - {node}) for node in range(NODES)]
        if all(len(own) == DEGREE for own in edges):
            return edges


class Walks:
    """The task: a prompt is a start, a goal and a length; a completion is the nodes behind the start, and EOS."""

    name, quality_name = "walks", "valid walks"
    width, layers = 64, 2

    def __init__(self) -> None:
        rng = random.Random(0)
        self.edges = _graph(rng)
        self.first_length = NODES
        self.eos = NODES + max(LENGTHS) + 1
        self.vocab_size = self.eos + 1
        self.max_length = 3 + max(LENGTHS) + 1
        # counts[l][goal][node]: how many walks of l edges lead from the node to the goal.
        self.counts = [[[int(node == goal) for node in range(NODES)] for goal in range(NODES)]]
        for _ in range(max(LENGTHS)):
            last = self.counts[-1]
            self.counts.append([[sum(own[n] for n in self.edges[node]) for node in range(NODES)] for own in last])
        pairs = [(start, goal) for start in range(NODES) for goal in range(NODES)]
        rng.shuffle(pairs)
        cut = VALIDATION + TEST
        parts = {
            "validation": (pairs[:VALIDATION], LENGTHS),
            "test": (pairs[VALIDATION:cut], LENGTHS),
            "train": (pairs[cut:] * WALKS_OF_PAIR, LENGTHS),
            "other": (pairs[cut:] * WALKS_OF_PAIR, OTHER_LENGTHS),
        }
        self.parts = {part: list(self._walks(own, lengths, rng)) for part, (own, lengths) in parts.items()}

    def examples(self, part: str, seed: int) -> TokenizedExamples:
        """Return a part of the data."""
        if part == "few":
            return tokenized(random.Random(f"{part} {seed}").sample(self.parts["train"], FEW))
        return tokenized(self.parts[part])

    def _walks(self, pairs: Sequence[tuple[int, int]], lengths: Sequence[int], rng: random.Random) -> Iterator[Example]:
        """Draw one walk between each pair, of a length at which there is one, uniformly among those of its length."""
        for start, goal in pairs:
            possible = [length for length in lengths if self.counts[length][goal][start]]
            if not possible:
                continue
            length, node, walk = rng.choice(possible), start, []
            for left in range(length - 1, -1, -1):
                onward = self.edges[node]
                (node,) = rng.choices(onward, [self.counts[left][goal][n] for n in onward])
                walk.append(node)
            yield [start, goal, self.first_length + length], [*walk, self.eos]

    def quality(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]:
        """Return 1 for a walk along edges, of the right length, that ends at the goal and is ended; else 0."""
        return [float(self._valid(prompt, own)) for prompt, own in zip(prompts, completions, strict=True)]

    def _valid(self, prompt: Ids, completion: Ids) -> bool:
        (start, goal, length), walk = prompt, list(completion[:-1])
        ends = completion[-1] == self.eos and len(walk) == length - self.first_length and walk[-1] == goal
        return ends and all(to in self.edges[node] for node, to in zip([start, *walk], walk, strict=False))
