"""The packed layout: which row predicts a token, and which candidate of which prompt the token belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .options import suggests_arguments


@suggests_arguments
@dataclass(frozen=True)
class CandidateLayout:
    """The packed form: N tokens in S segments (candidates) of G groups (prompts).

    Args:
        cu_tokens: (S + 1,) host integers; the tokens of segment s are ``cu_tokens[s]:cu_tokens[s + 1]``. A segment
            without tokens is an absent candidate.
        cu_groups: (G + 1,) host integers; the segments of group g are ``cu_groups[g]:cu_groups[g + 1]``.
        rows: (N,) int64; token n is predicted by ``hidden[rows[n]]``, and a row may predict several tokens.
            Default: ``rows[n] = n``.
        ranks: (S,) integers, 0 is best, equal ranks express no preference. Default: the first candidate of every
            group is best and the others are equal.

    The boundaries may also be int64 host tensors. A layout that is made inside a compiled function has to be made of
    tensors, since lists of integers are recompiled for each new length. It is then checked when the function runs.

    Raises:
        ValueError: boundaries that do not start at 0 or that decrease, no group, or a group without segments.
    """

    cu_tokens: Sequence[int]
    cu_groups: Sequence[int]
    rows: Tensor | None = None
    ranks: Sequence[int] | Tensor | None = None
    #: cu_tokens and cu_groups as host tensors, as compiled code takes them: for new integers it would recompile.
    boundaries: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.cu_tokens, self.cu_groups
        if any(isinstance(boundaries, Tensor) for boundaries in given):
            for name, boundaries in zip(("cu_tokens", "cu_groups"), given, strict=True):
                check_tensor(name, boundaries)
            if torch.compiler.is_compiling():
                object.__setattr__(self, "boundaries", given)
                return
            for name in ("cu_tokens", "cu_groups"):
                object.__setattr__(self, name, getattr(self, name).tolist())
        check_boundaries("cu_tokens", self.cu_tokens)
        check_boundaries("cu_groups", self.cu_groups)
        if self.num_groups == 0:
            raise ValueError(f"cu_groups must bound at least one group, got {list(self.cu_groups)}")
        if self.cu_groups[-1] != len(self.cu_tokens) - 1:
            raise ValueError(
                f"cu_groups must end at the number of segments, {len(self.cu_tokens) - 1}, got {self.cu_groups[-1]}"
            )
        for group, (start, end) in enumerate(pairwise(self.cu_groups)):
            if start == end:
                raise ValueError(f"group {group} is empty: every group needs at least one candidate")
        if self.rows is not None and self.rows.shape != (self.num_tokens,):
            raise ValueError(f"rows must have shape ({self.num_tokens},), got {tuple(self.rows.shape)}")
        if self.rows is not None and self.rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64, got {self.rows.dtype}")
        tensors = (torch.tensor(list(starts), device="cpu") for starts in (self.cu_tokens, self.cu_groups))
        object.__setattr__(self, "boundaries", tuple(tensors))

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.cu_tokens[-1]

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.cu_tokens) - 1

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.cu_groups) - 1


def check_tensor(name: str, boundaries: object) -> None:
    """Raise ``ValueError`` unless ``boundaries`` is an int64 vector on the host."""
    if not isinstance(boundaries, Tensor):
        raise ValueError(f"{name} must be a tensor where the other boundaries are, got {type(boundaries).__name__}")
    if boundaries.dtype != torch.int64 or boundaries.dim() != 1 or boundaries.device.type != "cpu":
        got = f"{boundaries.dtype} {tuple(boundaries.shape)} on {boundaries.device}"
        raise ValueError(f"{name} must be int64 of one dimension on the CPU, got {got}")


def check_boundaries(name: str, boundaries: Sequence[int]) -> None:
    """Raise ``ValueError`` unless ``boundaries`` starts at 0 and never decreases."""
    if len(boundaries) == 0 or boundaries[0] != 0:
        raise ValueError(f"{name} must start with 0, got {list(boundaries[:3])}")
    for index, (start, end) in enumerate(pairwise(boundaries)):
        if end < start:
            raise ValueError(f"{name} must not decrease, got {start} before {end} at index {index + 1}")
