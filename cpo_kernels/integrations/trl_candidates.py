"""K negatives per prompt through TRL's own preparation of preference data, which takes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, arange, tensor

from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.layout import CandidateLayout

from .padded_rows import candidate_rows

GROUP = "candidate_group"


def has_lists(example: Mapping[str, Any]) -> bool:
    """Tell whether ``rejected`` is a list of texts or of conversations; one conversation is a list of messages."""
    rejected = example.get("rejected", "")  # TRL says what is wrong with data that have none
    return not isinstance(rejected, str) and not (rejected and isinstance(rejected[0], Mapping))


def to_pairs(columns: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
    """Turn a batch of examples into one row per negative, with the index of its example."""
    for index, negatives in zip(indices, columns["rejected"], strict=True):
        if not negatives:
            raise ValueError(f"example {index} has no negatives: rejected is {negatives!r}, expected at least one")
    repeats = [len(negatives) for negatives in columns["rejected"]]
    pairs = {
        name: [value for value, times in zip(column, repeats, strict=True) for _ in range(times)]
        for name, column in columns.items()
    }
    pairs["rejected"] = [negative for negatives in columns["rejected"] for negative in negatives]
    pairs[GROUP] = [index for index, times in zip(indices, repeats, strict=True) for _ in range(times)]
    return pairs


def from_pairs(pairs: Any) -> Iterator[dict[str, Any]]:
    """Yield examples of token ids from tokenized rows in the order of :func:`to_pairs`; ``rejected_ids`` is a list.

    TRL ends the prompt of a pair where its two texts first differ in tokens; an example gets its shortest prompt.
    """
    for _, group in groupby(pairs, itemgetter(GROUP)):
        rows = list(group)
        start = min(len(row["prompt_ids"]) for row in rows)
        yield {
            "prompt_ids": rows[0]["prompt_ids"][:start],
            "chosen_ids": (rows[0]["prompt_ids"] + rows[0]["chosen_ids"])[start:],
            "rejected_ids": [(row["prompt_ids"] + row["rejected_ids"])[start:] for row in rows],
        }


def regrouped(pairs: Any) -> Any:
    """Make a data set or stream of examples from one of pairs by :func:`from_pairs`; cache a data set on disk."""
    options = {}
    if isinstance(pairs, Dataset):
        name = [Hasher.hash(pairs)]  # differs between processes, which in TRL share one cache
        options["fingerprint"] = broadcast_object_list(name)[0]
    return type(pairs).from_generator(from_pairs, gen_kwargs={"pairs": pairs}, **options)


class CandidateCollator:
    """A collator that puts the candidates of an example in consecutive rows, the chosen one first.

    Args:
        collate: TRL's collator of pairs, which truncates and pads. Of tokenized text, only the first row of each of its
            pairs is used; text with images is its own batch, with one negative an example.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some examples.

        It has ``input_ids``, ``attention_mask`` and ``completion_mask`` (S, L); ``group_sizes``, a list of G integers;
        ``ref_logps`` (S,), if they are precomputed; and ``order`` (S,), the rows in the order of the candidates, unless
        that is theirs.
        """
        if "prompt_ids" not in examples[0]:  # the rows of images cannot be moved, so they stay in TRL's order
            if any(map(has_lists, examples)):
                raise ValueError("rejected is a list, which examples with images cannot have; expected one answer")
            order = arange(2 * len(examples)).view(2, -1).T.flatten()
            return {**self.collate(examples), "group_sizes": [2] * len(examples), "order": order}
        rows: list[dict[str, Any]] = []
        sizes, ref_logps = [], []
        for example in examples:
            negatives = as_list(example["rejected_ids"], of=list)
            candidates = [example["chosen_ids"], *negatives]
            rows += [{"prompt_ids": example["prompt_ids"], "chosen_ids": c, "rejected_ids": []} for c in candidates]
            sizes.append(len(candidates))
            if "ref_chosen_logps" in example:
                ref = [example["ref_chosen_logps"], *as_list(example["ref_rejected_logps"], of=float)]
                ref_logps += ref[: len(candidates)]
        batch = {name: value[: len(rows)] for name, value in self.collate(rows).items()}
        return batch | {"group_sizes": sizes} | ({"ref_logps": tensor(ref_logps)} if ref_logps else {})


def as_list(value: Any, of: type) -> list[Any]:
    """Return ``value`` if it is a list of elements of type ``of``, else a list with ``value`` in it."""
    return value if isinstance(value, list) and value and isinstance(value[0], of) else [value]


def body_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of the body of a model from a batch."""
    others = ("completion_mask", "group_sizes", "ref_logps", "order")
    return {name: value for name, value in batch.items() if name not in others}


def scored_rows(batch: Mapping[str, Any]) -> tuple[Tensor, CandidateLayout]:
    """Find the completions of a batch as targets (N,), and their layout."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    return candidate_rows(labels, batch["group_sizes"], batch.get("order"))
