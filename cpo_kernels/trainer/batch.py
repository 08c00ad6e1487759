"""The batch of a contrast: from token ids to sequences for the body and tokens for the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.layout import CandidateLayout
from cpo_kernels.models import PrefixTree, pack_groups
from cpo_kernels.negatives import Negative, truncate
from cpo_kernels.options import suggests_arguments

TRUTH = "truth"

# Rows with a tree mask run without the fastest attention kernels, so saving few tokens saves no time.
WORTH_SHARING = 1.2


@dataclass(frozen=True)
class Segment:
    """One candidate: its tokens, and the sequence of the body whose first rows predict them."""

    kind: str
    rank: int
    tokens: Sequence[int]
    sequence: int
    ref_logp: float | None = None


@suggests_arguments
@dataclass
class ContrastBatch:
    """A batch to which groups are added one by one, and which :meth:`tensors` packs.

    Every sequence is a prompt and a completion. The last prompt row of a group's ground truth predicts the first token
    of all its candidates.

    Args:
        eos_token_id: the token that ends a truncation; of several, the one that ends its ground truth, or the first.
        pad_token_id: the token that fills rows up.
        max_length: tokens of a prompt and a completion together, at most; None for no limit.
        share_prefixes: run a group's prompt and candidates as one row of the body wherever that saves enough tokens.
    """

    eos_token_id: int | Sequence[int]
    pad_token_id: int = 0
    max_length: int | None = None
    share_prefixes: bool = False
    prompts: list[Sequence[int]] = field(default_factory=list)
    # For each group, the completions that have rows of their own.
    completions: list[list[Sequence[int]]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    groups: list[int] = field(default_factory=lambda: [0])

    def add_group(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        negatives: Iterable[Negative] = (),
        conditioned_on: Sequence[int] | None = None,
        ref_logp: float | None = None,
    ) -> None:
        """Add one group: the ground truth, then its negatives.

        Args:
            prompt: token ids, at least one.
            completion: token ids of the ground truth.
            negatives: its negatives; what does not fit in ``max_length`` behind the prompt is cut off.
            conditioned_on: (T,) token ids that the body sees in place of ``completion``, whose tokens stay the targets;
                for scheduled sampling.
            ref_logp: log-likelihood of the ground truth under the reference, if it is known already.
        """
        if not len(prompt):
            raise ValueError(f"group {len(self.groups) - 1} has an empty prompt")
        limit = None if self.max_length is None else self.max_length - len(prompt)
        self.prompts.append(prompt)
        self.completions.append([])
        first = self._add_sequence(TRUTH, 0, completion, ref_logp)
        if conditioned_on is not None:
            self.completions[-1] = [conditioned_on]
        for negative in negatives:
            if negative.cut is None:
                self._add_sequence(negative.kind, negative.rank, negative.tokens[:limit], negative.ref_logp)
            else:
                tokens, _ = truncate(completion, completion, negative.cut, self.eos_token_id)
                self.segments.append(Segment(negative.kind, negative.rank, tokens, first, negative.ref_logp))
        self.groups.append(len(self.segments))

    @property
    def _num_sequences(self) -> int:
        return sum(map(len, self.completions))

    def _add_sequence(self, kind: str, rank: int, completion: Sequence[int], ref_logp: float | None) -> int:
        if not len(completion):
            raise ValueError(f"a candidate of group {len(self.groups) - 1} ({kind}) has no tokens")
        index = self._num_sequences
        self.completions[-1].append(completion)
        self.segments.append(Segment(kind, rank, completion, index, ref_logp))
        return index

    @property
    def num_groups(self) -> int:
        """The number G of groups."""
        return len(self.groups) - 1

    @property
    def num_target_tokens(self) -> int:
        """Tokens of the candidates of rank 0, which the MLE part averages over."""
        return sum(len(segment.tokens) for segment in self.segments if segment.rank == 0)

    def tensors(self) -> dict[str, Any]:
        """Pack the batch.

        Returns:
            input_ids (B, L) int64, right-padded, with attention_mask (B, L) int64 or, for shared prefixes, the parts
            of a :class:`~cpo_kernels.models.PrefixTree` as tree_groups, tree_branches, tree_positions, tree_readers
            (B, L); targets, rows (N,) int64, with rows into the flattened (B * L) positions; and host lists: cu_tokens
            (S + 1), cu_groups (G + 1), ranks (S), kinds (S).
        """
        body, rows_of = self._shared() if self._saves_by_sharing() else self._separate()
        cu_tokens, rows, targets = [0], list[int](), list[int]()
        for segment in self.segments:
            cu_tokens.append(cu_tokens[-1] + len(segment.tokens))
            rows += rows_of[segment.sequence][: len(segment.tokens)]
            targets += segment.tokens
        return body | {
            "targets": torch.tensor(targets),
            "rows": torch.tensor(rows),
            "cu_tokens": cu_tokens,
            "cu_groups": list(self.groups),
            "ranks": [segment.rank for segment in self.segments],
            "kinds": [segment.kind for segment in self.segments],
        }

    def reference_tensors(self) -> dict[str, Any]:
        """Pack what the reference has yet to read, where it has read the ground truths to draw along them.

        Returns:
            An empty dictionary where it has read none. Else ref_logps (S,) float32, 0 for unknown ones; unknown, the
            indices of these; and unread, the :meth:`tensors` of their candidates alone, if there are any.
        """
        unknown = [place for place, segment in enumerate(self.segments) if segment.ref_logp is None]
        if len(unknown) == len(self.segments):
            return {}
        rest = ContrastBatch(self.eos_token_id, self.pad_token_id, self.max_length, self.share_prefixes)
        for prompt, (start, end) in zip(self.prompts, pairwise(self.groups), strict=True):
            own = [segment for segment in self.segments[start:end] if segment.ref_logp is None]
            if own:
                others = [Negative(segment.kind, segment.tokens) for segment in own[1:]]
                rest.add_group(prompt, own[0].tokens, others)
        known = {"ref_logps": torch.tensor([segment.ref_logp or 0.0 for segment in self.segments])}
        if not unknown:
            return known
        return known | {"unknown": torch.tensor(unknown), "unread": rest.tensors()}

    def _saves_by_sharing(self) -> bool:
        if not self.share_prefixes or self._num_sequences == self.num_groups:
            return False
        separate = sum(len(p) + len(c) - 1 for p, own in zip(self.prompts, self.completions, strict=True) for c in own)
        shared = separate - sum(len(p) * (len(c) - 1) for p, c in zip(self.prompts, self.completions, strict=True))
        return separate >= WORTH_SHARING * shared

    def _separate(self) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Pack the inputs of the body without sharing; find for each sequence the rows that predict its completion."""
        # The last token predicts nothing, so the body does not see it.
        sequences = [[*p, *c[:-1]] for p, own in zip(self.prompts, self.completions, strict=True) for c in own]
        longest = max(map(len, sequences))
        input_ids = torch.full((len(sequences), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, sequence in enumerate(sequences):
            input_ids[i, : len(sequence)] = torch.tensor(sequence)
            attention_mask[i, : len(sequence)] = 1
        rows_of: list[list[int]] = []
        for prompt, own in zip(self.prompts, self.completions, strict=True):
            first = len(rows_of) * longest + len(prompt) - 1
            for completion in own:
                start = len(rows_of) * longest + len(prompt)
                rows_of.append([first, *range(start, start + len(completion) - 1)])
        return {"input_ids": input_ids, "attention_mask": attention_mask}, rows_of

    def _shared(self) -> tuple[dict[str, Any], list[list[int]]]:
        shared = pack_groups(self.prompts, self.completions, pad_token_id=self.pad_token_id)
        tree = {
            "tree_groups": shared.tree.groups,
            "tree_branches": shared.tree.branches,
            "tree_positions": shared.tree.positions,
            "tree_readers": shared.tree.readers,
        }
        return {"input_ids": shared.input_ids, **tree}, [rows for own in shared.rows for rows in own]


def layout_of(inputs: Mapping[str, Any]) -> CandidateLayout:
    """Make the layout of a batch's tensors."""
    return CandidateLayout(inputs["cu_tokens"], inputs["cu_groups"], rows=inputs["rows"], ranks=inputs["ranks"])


def body_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the keywords of a model's forward from a batch's tensors."""
    if "tree_groups" not in inputs:
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    tree = PrefixTree(*(inputs[f"tree_{part}"] for part in ("groups", "branches", "positions", "readers")))
    return {"input_ids": inputs["input_ids"], "prefix_tree": tree}
