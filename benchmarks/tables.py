"""Tables as Markdown that also read as plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table, padded so that it also reads as plain text; the columns in `left` are words, not numbers."""
    table = [list(header), *map(list, rows)]
    widths = [max(2, *(len(row[i]) for row in table)) for i in range(len(header))]  # a rule needs "-:" at least
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    pad = [str.ljust if i in left else str.rjust for i in range(len(header))]
    lines = [[pad[i](cell, widths[i]) for i, cell in enumerate(row)] for row in (table[0], rule, *table[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
