"""Renders the report as Markdown: bars first, then every figure behind them."""

from __future__ import annotations

from benchmarks import bars, records, scaling, tables
from benchmarks.contestants import FLOOR
from benchmarks.records import Part, Parts, Record
from benchmarks.suite import PARTS
from benchmarks.tables import markdown


def render(parts: Parts, name: str, plots: dict[str, str]) -> str:
    """Return the whole page; `plots` are file names by part."""
    lines = [f"# Benchmarks: {name}", "## Bars", bars.table(bars.verdicts(parts))]
    if "heads" in parts:
        lines += ["## Times over the floor", MATRIX, matrix(records.heads(parts))]
    for part in ordered(parts):
        lines += [f"## {part.name}: {PARTS[part.name]}"]
        if part.name in plots:
            lines.append(f"![{PARTS[part.name]}]({plots[part.name]})")
        lines += tables.part_tables(part)
        if part.error:
            lines.append(f"Not finished: {part.error}")
        lines.append(conditions(part))
    found = list(scaling.points(parts))
    if found:
        lines += ["## The cost model against these points (benchmarks/scaling.py)", scaling.check(found)]
    return "\n\n".join(lines) + "\n"


def ordered(parts: Parts) -> list[Part]:
    """Return the parts in the order of the suite."""
    return [parts[name] for name in PARTS if name in parts]


MATRIX = """\
Seconds over those of the bare `torch.mm` products of the same rows, chunks and dtype, in the same process and in turn;
the floor's own row is in seconds. Below 1 is possible because the products are our own."""


def matrix(part: Part) -> str:
    """Return times over the floor: a row a contestant, a column a case."""
    timed = [r for r in part.records if "floor" in r.values]
    cases = list(dict.fromkeys(record.case for record in timed))
    names = list(dict.fromkeys(record.contestant for record in timed))
    cells = {(record.contestant, record.case): cell(record) for record in timed}
    return markdown(["", *cases], [[name, *(cells.get((name, case), "") for case in cases)] for name in names])


def cell(record: Record) -> str:
    """Return seconds of the floor, multiples of it for the others."""
    if record.contestant == FLOOR:
        return f"{record.values['seconds']:.3g} s"
    return f"{record.values['floor']:.2f}"


def conditions(part: Part) -> str:
    """Say what the figures of a part depend on, with its command."""
    env = part.environment
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number)
    device = env["gpu"]["name"] if "gpu" in env else env["device"]
    return (
        f"`{env['command']}`; {device}, {env['threads']} threads, load average {env['load_average']:.1f} at the "
        f"start; {env['backends'].get('cpu', '')}; commit {env['commit']}; Python {env['python']}, {versions}; "
        f"{part.seconds:.0f} s"
    )


def headline(parts: Parts) -> str:
    """Return what is printed at the end of a run."""
    lines = [bars.table(bars.verdicts(parts))]
    lines += [f"{part.name} did not finish: {part.error}" for part in parts.values() if part.error]
    return "\n\n".join(lines)
