"""Randomness: every draw is a function of a key, such as (seed, step, example), and of nothing else.

A key names the draw and its example: never the place in a batch, the process, or how often something was drawn before.
There are three ways to make randomness of a key:

- :func:`generator`: a ``random.Random`` for choices on the host (which completions, where to cut, what to hold out);
- :func:`token_seeds`: 64-bit seeds, one for each token, for draws of kernels and of ``generate``;
- :func:`call_seed` and :func:`request_seed`: the seed of one call, and of one request to a server.

They hash their keys in different ways only because recorded runs have to stay repeatable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels import counter_random
from cpo_kernels.options import suggests_arguments

REQUEST_MASK = 2**31 - 1  # Servers differ in how many bits of a seed they take; all take 31.


def generator(*key: Any) -> Random:
    """Make the generator of a key; parts of the same text count as equal."""
    return Random("/".join(map(str, key)))


def chosen(seed: int, total: int, count: int) -> list[int]:
    """Choose ``count`` of ``range(total)`` by a seed, in ascending order; all if ``total`` is no larger."""
    return list(range(total)) if count >= total else sorted(Random(seed).sample(range(total), count))


@suggests_arguments
def token_seeds(seed: int, step: int, example: int | Sequence[int], length: int | Sequence[int]) -> Tensor:
    """Derive seeds (N,), int64 on the CPU, for the N tokens of one or more examples; all bits of them are mixed.

    Args:
        seed: any integer.
        step: step of training, any integer; -1, say, for an evaluation.
        example: index of the example, any integer, or those of several, whose seeds come one after the other.
        length: tokens of a ground truth, or of each; the seeds of a longer one begin with those of a shorter one.

    Raises:
        ValueError: another number of lengths than of examples.
    """
    examples = example if isinstance(example, Sequence) else [example]
    lengths = length if isinstance(length, Sequence) else [length] * len(examples)
    if len(lengths) != len(examples):
        raise ValueError(f"expected one length for each of {len(examples)} examples, got {len(lengths)}")
    digests = [hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest() for index in examples]
    keys = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    repeats = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    firsts = (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    key = torch.tensor(keys, dtype=torch.int64, device="cpu").repeat_interleave(repeats)
    return counter_random.counted(key, torch.arange(len(key), device="cpu") - firsts)


def pass_seed(seed: int, number: int) -> int:
    """Derive the seed of one of several sampling passes over the same examples; the first keeps ``seed``."""
    return seed + (number << 64)


def call_seed(*key: int) -> int:
    """Derive the seed, of 32 bits, of a call that samples for many examples."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def request_seed(seed: int, first: int) -> int:
    """Derive the seed of a request to a server from that of the call and the place of its first prompt."""
    return int(token_seeds(seed, 0, first, 1)) & REQUEST_MASK


def part_seed(seed: int, first: int) -> int:
    """Derive the seed of a call for a part of the data from the number of the part's first example.

    The seeds sent to a server depend on the place in a call, so without this two parts would ask for the same draws.
    """
    return seed + first
