"""Turn a prefix tree into the blocks in which its attention is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import Gather, TreeBlocks
from .tree import PrefixTree

HOST = torch.device("cpu")  # named, since the default device may be a GPU


@dataclass(frozen=True)
class Segments:
    """Where the branches of a tree lie, as host integers: (start, length) in the B * L flattened positions."""

    shape: tuple[int, int]
    prompts: list[tuple[int, int]]
    candidates: list[list[tuple[int, int]]]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """G groups, C candidates each, P positions of a prompt, T positions of a candidate, at most."""
        lengths = [length for spans in self.candidates for _, length in spans]
        most = max(map(len, self.candidates))
        return len(self.prompts), most, max(length for _, length in self.prompts), max(lengths, default=0)


def find_segments(tree: PrefixTree) -> Segments | None:
    """Find the branches of a tree; return None where a group is not one run of its prompt and its candidates.

    A tree on a GPU is copied to the host, which waits for the GPU once.
    """
    groups, branches = torch.stack([tree.groups, tree.branches]).cpu()
    batch, length = groups.shape
    change = torch.ones(batch, length, dtype=torch.bool, device=HOST)
    change[:, 1:] = (groups[:, 1:] != groups[:, :-1]) | (branches[:, 1:] != branches[:, :-1])
    starts = change.flatten().nonzero().flatten().tolist()
    names = torch.stack([groups.flatten()[starts], branches.flatten()[starts]], dim=1).tolist()
    prompts: list[tuple[int, int]] = []
    candidates: list[list[tuple[int, int]]] = []
    current, seen = None, set()
    for start, stop, (group, branch) in zip(starts, [*starts[1:], batch * length], names, strict=True):
        if group < 0:
            current = None
        elif branch == 0:
            current = (start // length, group)
            if current in seen:
                return None
            seen.add(current)
            prompts.append((start, stop - start))
            candidates.append([])
        elif current != (start // length, group) or (current, branch) in seen:
            return None
        else:
            seen.add((current, branch))
            candidates[-1].append((start, stop - start))
    return Segments((batch, length), prompts, candidates) if prompts else None


def block_pairs(segments: Segments) -> int:
    """Count the scores that :class:`TreeBlocks` computes; a dense mask takes B * L * L."""
    G, C, P, T = segments.sizes
    return G * (P * P + C * T * (P + T))


def make_gather(segments: Segments, device: torch.device) -> Gather | None:
    """Make the rearrangement from positions to the slots of padded branches; None where nothing moves."""
    G, C, P, T = segments.sizes
    batch, length = segments.shape
    slots = torch.full((G, P + C * T), -1, device=HOST)
    for g, ((start, size), spans) in enumerate(zip(segments.prompts, segments.candidates, strict=True)):
        slots[g, :size] = torch.arange(start, start + size, device=HOST)
        for c, (start, size) in enumerate(spans):
            at = P + c * T
            slots[g, at : at + size] = torch.arange(start, start + size, device=HOST)
    slots = slots.flatten()
    taken = (slots >= 0).nonzero().flatten()
    positions = torch.full((batch * length,), -1, device=HOST)
    positions[slots[taken]] = taken
    empty, padded = (slots < 0).nonzero().flatten(), (positions < 0).nonzero().flatten()
    gather = Gather(slots.clamp(min=0), empty, positions.clamp(min=0), padded)
    if gather.identity and torch.equal(gather.slots, torch.arange(len(gather.slots), device=HOST)):
        return None
    return gather.to(device)


def make_blocks(segments: Segments, gather: Gather | None, window: int | None, device: torch.device) -> TreeBlocks:
    """Make the branches and their masks; with a window, a query sees the last ``window`` positions, its own included.

    The positions of a prompt and one of its candidates are consecutive, so each mask is that of a causal row.
    """
    _, _, P, T = sizes = segments.sizes
    lengths = [length for _, length in segments.prompts]
    alike = len(set(lengths)) == 1
    prompt = torch.tensor(lengths[:1] if alike else lengths, device=HOST).view(-1, 1, 1)
    query = prompt + torch.arange(T, device=HOST)[:, None]
    column = torch.arange(P + T, device=HOST)
    key = torch.where(column < P, column, prompt + column - P)
    allowed = (key <= query) & ((column >= P) | (column < prompt))
    prompt_mask = None
    if window is not None:
        allowed &= query - key < window
        distance = column[:P, None] - column[:P]
        prompt_mask = ((distance >= 0) & (distance < window)).to(device)
    return TreeBlocks(gather, sizes, prompt_mask, allowed[:, None, None].to(device), alike and window is None)
