"""Renders the report as Markdown: bars first, then every figure behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import bars, environment, records, tables
from benchmarks.contestants import FLOOR
from benchmarks.records import Part, Parts, Record
from benchmarks.suite import PARTS
from benchmarks.tables import markdown

MATRIX = """\
Seconds over those of the bare `torch.mm` products of the same rows, chunks and dtype, in the same process and in turn,
and in brackets the share of the machine's peak, where that was measured; the floor's own row is in seconds. Below 1 is
possible because the products are our own."""


def render(parts: Parts, name: str, plots: Mapping[str, str]) -> str:
    """Return the whole page; `plots` are file names by part."""
    lines = [f"# Benchmarks: {name}", "## Bars", bars.table(bars.verdicts(parts))]
    if (part := parts.get("heads", records.NOTHING)).records:
        lines += ["## Times over the floor", MATRIX, matrix(part)]
    for part in (parts[name] for name in PARTS if name in parts):
        lines.append(f"## {part.name}: {PARTS[part.name]}")
        if part.name in plots:
            lines.append(f"![{PARTS[part.name]}]({plots[part.name]})")
        lines += [*tables.part_tables(part), *[f"Not finished: {part.error}"] * bool(part.error), conditions(part)]
    return "\n\n".join(lines) + "\n"


def matrix(part: Part, cases: Sequence[str] = ()) -> str:
    """Return times over the floor, a row a contestant and a column a case; of some cases, with the fastest in bold."""
    timed = part.select(having="floor")
    if cases:
        timed = [r for case in cases for r in timed if r.case == case and not r.is_floor]
    columns = cases or list(records.by_case(timed))
    same_work = [r for r in timed if r.conditions.get("work") == "cpo"]  # as most: K negatives with a reference
    best = {case: min(records.value(own, "floor")) for case, own in records.by_case(same_work).items() if cases}
    cells = {(r.contestant, r.case): cell(r, best.get(r.case)) for r in timed}
    names = dict.fromkeys(record.contestant for record in timed)
    ran = environment.processor(part.environment) if cases else ""
    return markdown([ran, *columns], [[name, *(cells.get((name, case), "") for case in columns)] for name in names])


def cell(record: Record, best: float | None) -> str:
    """Return seconds of the floor, multiples of it for the others, the best in bold, and the share of the peak."""
    share = f" ({record.values['of_peak']:.0%})" if "of_peak" in record.values else ""
    if record.contestant == FLOOR:
        return f"{record.values['seconds']:.3g} s{share}"
    text = f"{record.values['floor']:.2f}"
    return (f"**{text}**" if record.values["floor"] == best else text) + share


def conditions(part: Part) -> str:
    """Say what the figures of a part depend on, with its command."""
    return f"{environment.in_a_line(part.environment)}; {part.seconds:.0f} s"
