"""The plan of a call: which groups share a chunk of logits, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from cpo_kernels.kernels.device import DEFAULT_LOGITS_BYTES

from .tokens import Tokens

MIB = 2**20
# What surrounds the logits of a small call (pages of products, rows of hidden states, statistics) may come on top of a
# small explicit budget, where all of it together is no larger than this: a process does not notice.
SMALL_CHANGE = 2**20
LEAST_TILE = 1024  # words, below which a tile of all rows at once would make the products thin


@dataclass(frozen=True)
class Chunk:
    """Whole groups processed together.

    Attributes:
        groups: their indices.
        num_rows: rows of ``hidden`` that enter the GEMMs.
        rows_per_block: rows of logits held at once.
        recomputed: whether the logits are computed a second time for the gradient.
    """

    groups: range
    num_rows: int
    rows_per_block: int
    recomputed: bool


class Tiles(NamedTuple):
    """The tiles of the vocabulary in which the gradient of the weight is made, one after the other.

    Attributes:
        words: vocabulary entries of a tile.
        rows: rows of ``hidden`` whose logits in a tile are held at once.
        bytes: what that takes, with the sum of a tile over blocks of rows.
    """

    words: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The chunks and bytes of a call; returned by :func:`cpo_kernels.plan`, and printed as a few lines.

    Attributes:
        chunks: the chunks, in order.
        num_rows: rows that enter the GEMMs (rows that predict nothing do not).
        num_tokens: tokens that count.
        logits_bytes: size of the one logits buffer.
        accumulator_bytes: memory beyond a half-precision gradient of the weight when it is summed over several chunks:
            for its low halves, or on a GPU for a float32 sum.
        workspace_bytes: the most that the backend's products take beyond their operands, and filters beyond the logits.
        gathered_bytes: what rows of one chunk take besides their logits: partial sums, and copies of the hidden states,
            or of their gradient, where rows that predict nothing lie between those that do, where rows serve several
            groups, where a filter may leave rows out, or where they are multiplied by a number each.
        budget_bytes: the budget that was asked for. The default is 256 MiB for logits (on a GPU up to 2 GiB, by
            its memory; a row, if that is more) plus the accumulator, the workspace and the copies that go with them.
        gemms: products of (rows, V, H) over all rows: 3 for a trainable head, 2 for a frozen one, 1 without
            gradients, up to one more for the share of rows whose logits are recomputed, and one for tiles.
        note: why logits are recomputed or the budget is exceeded, or "".
        buffers: blocks of rows whose logits are held at once.
        tiles: how the gradient of the weight is made where an explicit budget has no room for its accumulator: from
            logits that are computed once more, a tile of the vocabulary at a time; None: with the other gradients.
    """

    chunks: tuple[Chunk, ...]
    num_rows: int
    num_tokens: int
    logits_bytes: int
    accumulator_bytes: int
    workspace_bytes: int
    gathered_bytes: int
    budget_bytes: int
    gemms: float
    note: str = ""
    buffers: int = 1
    tiles: Tiles | None = None

    @property
    def rows_held(self) -> int:
        """Rows of logits held at once."""
        return max(min(chunk.num_rows, self.buffers * chunk.rows_per_block) for chunk in self.chunks)

    @property
    def bytes(self) -> int:
        """Bytes held at the peak beyond inputs and gradients, index tensors of the tokens aside."""
        in_chunks = self.logits_bytes + self.accumulator_bytes + self.gathered_bytes
        return self.workspace_bytes + max(in_chunks, self.tiles.bytes if self.tiles else 0)

    def __str__(self) -> str:
        """Return the sum that the peak of memory is, and what it is held against."""
        terms = {"logits": self.logits_bytes, "accumulator": self.accumulator_bytes, "workspace": self.workspace_bytes}
        terms["beside the rows"] = self.gathered_bytes
        total = " + ".join(f"{name} {size / MIB:.1f}" for name, size in terms.items() if size)
        lines = [f"{len(self.chunks)} chunks of {self.num_rows} rows in all, {self.gemms:.3g} GEMMs"]
        lines.append(
            f"memory: {total or 'nothing'} = {self.bytes / MIB:.1f} MiB, budget {self.budget_bytes / MIB:.1f} MiB"
        )
        return "\n".join([*lines, *([self.note] if self.note else [])])


class Share(NamedTuple):
    """How a budget is divided: rows of logits held at once, bytes of the accumulator, and whether tiles replace it."""

    rows: int
    accumulator: int
    tiled: bool = False


@dataclass(frozen=True)
class Needs:
    """What the parts of a call take, in bytes.

    Attributes:
        row: of logits.
        gathered_row: of hidden states, where rows are copied.
        accumulator: of the gradient of the weight over several chunks.
        workspace: of products and filters.
        vocab: V where the gradient of the weight may be made in tiles of the vocabulary, else 0.
        logit: of one in a tile.
        sums_row: of a row's partial sums, where its logits are not kept.
    """

    row: int
    gathered_row: int
    accumulator: int
    workspace: int
    vocab: int
    logit: int
    sums_row: int = 0

    @property
    def whole_row(self) -> int:
        """Bytes of a row of logits with what is copied and summed for it."""
        return self.row + self.gathered_row + self.sums_row

    @property
    def word(self) -> int:
        """Bytes of a word of the vocabulary in the sum of a tile."""
        return -(-self.accumulator // self.vocab)

    def rows_within(self, size: int) -> int:
        """Count the rows of logits, with what is copied for them, that so many bytes hold."""
        return max(0, size) // self.whole_row

    def share(self, asked: int, *, explicit: bool, total: int, largest: int) -> Share:
        """Divide ``asked`` bytes for ``total`` rows, of which the ``largest`` group should be held at once.

        Raises:
            ValueError: an explicit budget that no way can keep; the message names the smallest that works.
        """
        alone = self.rows_within(asked - self.workspace)
        if total <= alone:  # a single chunk needs no accumulator, so that its logits may take that memory too
            return Share(max(1, alone), 0)
        rows = self.rows_within(asked - self.workspace - self.accumulator)
        if not explicit or rows >= max(largest, asked // 2 // self.row):
            return Share(rows, self.accumulator)
        if loose := self.rows_beside_small_change(asked):
            return Share(loose, 0 if total <= loose else self.accumulator)
        if self.vocab and self.accumulator and alone and self.tile_fits(asked - self.workspace):
            return Share(alone, 0, tiled=True)
        if rows:
            return Share(rows, self.accumulator)
        raise ValueError(
            f"max_logits_bytes={asked} does not hold one row of logits, which takes {self.row} bytes, and what a call "
            f"needs beside it; the smallest that works is {self.smallest(total)}"
        )

    def kept_to(self, asked: int, least_workspace: int, total: int) -> Needs:
        """Return these needs with a workspace of at most half of an explicit budget, if it can be as small.

        It is no smaller than ``least_workspace``, and leaves room for what ``total`` rows need at least.
        """
        if self.rows_beside_small_change(asked):
            return self
        room = asked - (self.smallest(total) - self.workspace)
        return replace(self, workspace=max(least_workspace, min(self.workspace, asked // 2, room)))

    def rows_beside_small_change(self, asked: int) -> int:
        """Count the rows that a budget holds if all the rest comes on top, which is no more than small change."""
        rows, left = asked // self.row, SMALL_CHANGE - self.workspace - self.accumulator
        beside = self.whole_row - self.row
        if left < beside:
            return 0
        return min(rows, left // beside) if beside else rows

    def tile_fits(self, size: int) -> bool:
        """Tell whether so many bytes hold a word of the vocabulary for a row, with its sum."""
        return self.word + self.logit + self.gathered_row <= size

    def smallest(self, total: int) -> int:
        """Return the smallest budget that can be kept for ``total`` rows."""
        if self.rows_beside_small_change(self.row):
            return self.row
        one, beside = self.whole_row, self.accumulator
        if self.vocab and self.accumulator:
            beside = min(beside, max(0, self.word + self.logit + self.gathered_row - one))
        return self.workspace + min(one + beside, total * one)

    def tiles(self, size: int, total: int) -> Tiles:
        """Return the tiles of ``total`` rows that so many bytes hold: of all rows at once, if that leaves them wide."""
        words = min(self.vocab, max(0, size - total * self.gathered_row) // (total * self.logit))
        if words >= min(LEAST_TILE, self.vocab):
            words = -(-self.vocab // -(-self.vocab // words))
            return Tiles(words, total, total * (words * self.logit + self.gathered_row))
        most = (size - self.gathered_row) // (self.word + self.logit)
        words = max(1, min(self.vocab, most, size // 2 // self.word))
        rows = min(total, (size - words * self.word) // (words * self.logit + self.gathered_row))
        return Tiles(words, rows, words * self.word + rows * (words * self.logit + self.gathered_row))


def make_plan(
    tokens: Tokens,
    *,
    row_bytes: int,
    needs: tuple[bool, bool, bool],
    max_logits_bytes: int | None,
    default_bytes: int = DEFAULT_LOGITS_BYTES,
    accumulator_bytes: int = 0,
    gathered_row_bytes: int = 0,
    workspace_bytes: int = 0,
    least_workspace_bytes: int | None = None,
    whole_groups: bool = True,
    waits: bool = True,
    buffers: int = 1,
    block_rows: int | None = None,
    tiled_vocab: int = 0,
    logit_bytes: int = 0,
    sums_row_bytes: int = 0,
) -> Plan:
    """Plan whole groups into chunks that keep to a budget, of which logits are the largest part.

    An explicit budget holds logits, accumulator, workspace and copies of rows together. Where the accumulator would
    take more than half of it, or the room of the largest group, the gradient of the weight is made in tiles of the
    vocabulary, which need none. The default is 256 MiB for logits, and what goes with them.

    Args:
        tokens: the tokens that count.
        row_bytes: what a row takes in the logits buffer.
        needs: whether hidden, weight and bias need gradients.
        max_logits_bytes: the budget; None for the default.
        default_bytes: the default for logits.
        accumulator_bytes: what the gradient of the weight takes besides itself if there are several chunks.
        gathered_row_bytes: bytes of a row of hidden where rows must be gathered for the products, else 0.
        workspace_bytes: memory of the backend's products beyond their operands, and of filters beyond the logits.
        least_workspace_bytes: the least of that with which they can do, for a small budget; None: all of it.
        whole_groups: whether the rows of a group must be held together to be computed only once.
        waits: whether gradients wait for the coefficients of a whole chunk, so that logits may be recomputed; if none
            does, all groups are one chunk.
        buffers: blocks of rows whose logits are held at once, if they fit.
        block_rows: the most rows of a block; None for what fits.
        tiled_vocab: V where the gradient of the weight may be made in tiles of the vocabulary, else 0.
        logit_bytes: of a logit in such a tile.
        sums_row_bytes: bytes of a row's partial sums, where its logits are not kept, else 0.

    Raises:
        ValueError: a budget that no way can keep.
    """
    waits = waits and any(needs)
    total = (tokens if waits else tokens.as_one_group()).num_rows
    accumulator_bytes *= needs[1]
    sizes = Needs(
        row_bytes, gathered_row_bytes, accumulator_bytes, workspace_bytes, tiled_vocab, logit_bytes, sums_row_bytes
    )
    default = max(default_bytes, row_bytes)
    beside = sizes.accumulator + workspace_bytes + default * (gathered_row_bytes + sums_row_bytes) // row_bytes
    explicit, asked = max_logits_bytes is not None, max_logits_bytes or default + beside
    if explicit and least_workspace_bytes is not None:
        sizes = sizes.kept_to(asked, least_workspace_bytes, total)
        workspace_bytes = sizes.workspace
    largest = max(tokens.rows_per_group, default=0) if whole_groups and waits else 1
    rows_per_chunk, accumulator, tiled = sizes.share(asked, explicit=explicit, total=total, largest=largest)
    buffers = buffers if rows_per_chunk >= buffers else 1
    at_once = min(rows_per_chunk // buffers, block_rows or rows_per_chunk)
    all_groups = [(range(len(tokens.rows_per_group)), total)]
    chunks = tuple(
        Chunk(groups, rows, even_share(rows, at_once), recomputed=waits and rows > rows_per_chunk)
        for groups, rows in (fill_chunks(tokens.rows_per_group, rows_per_chunk) if waits else all_groups)
    )
    tiles = sizes.tiles(asked - workspace_bytes, total) if tiled else None
    recomputed, notes = sum(chunk.num_rows for chunk in chunks if chunk.recomputed), []
    if recomputed:
        notes.append(f"a group of {largest} rows does not fit the budget of {rows_per_chunk}: logits are recomputed")
    if tiles:
        notes.append(
            f"the budget has no room for an accumulator of {sizes.accumulator} bytes: the gradient of the weight is "
            f"made in tiles of {tiles.words} words, from logits that are computed once more"
        )
    held = max(min(chunk.num_rows, buffers * chunk.rows_per_block) for chunk in chunks)
    gathered = held * (gathered_row_bytes + sums_row_bytes)
    on_top = held * row_bytes + accumulator + workspace_bytes + gathered - asked
    if on_top > 0:
        notes.append(
            f"{on_top} bytes come on top of the budget, with {accumulator} for the accumulator of grad_weight, "
            f"{workspace_bytes} for products and filters and {gathered} for rows that are gathered"
        )
    return Plan(
        chunks=chunks,
        num_rows=total,
        num_tokens=tokens.targets.numel(),
        logits_bytes=held * row_bytes,
        accumulator_bytes=accumulator,
        workspace_bytes=workspace_bytes,
        gathered_bytes=gathered,
        budget_bytes=asked,
        gemms=1 + needs[0] + needs[1] + (recomputed / total if recomputed else 0.0) + (tiles is not None),
        note="; ".join(notes),
        buffers=buffers,
        tiles=tiles,
    )


def even_share(total: int, limit: int) -> int:
    """Return the size, at least 1, of the fewest equal parts of at most ``limit`` that make up ``total``."""
    parts = max(1, -(-total // limit))
    return max(1, -(-total // parts))


def fill_chunks(rows_per_group: list[int], rows_per_chunk: int) -> list[tuple[range, int]]:
    """Split groups into runs, with their rows, filled evenly: a last run of few rows would waste a pass over V x H."""
    fair_share = even_share(sum(rows_per_group), rows_per_chunk)
    chunks: list[tuple[range, int]] = []
    start, rows = 0, 0
    for group, more in enumerate(rows_per_group):
        if rows and (rows + more > rows_per_chunk or rows >= fair_share):
            chunks.append((range(start, group), rows))
            start, rows = group, 0
        rows += more
    chunks.append((range(start, len(rows_per_group)), rows))
    return chunks
