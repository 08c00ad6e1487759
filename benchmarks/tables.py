"""Shows records: a heading with the unit and a format for every value, and tables as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.records import Part, Record, by_case

COLUMNS: dict[str, tuple[str, str]] = {
    "seconds": ("s", "{:.4g}"),
    "of_peak": ("of the peak", "{:.0%}"),
    "milliseconds": ("ms", "{:.3f}"),
    "spread": ("spread", "{:.0%}"),
    "rounds": ("rounds", "{:.0f}"),
    "floor": ("x floor", "{:.3f}"),
    "floor_ours": ("x our products", "{:.3f}"),
    "of_ours": ("x ours", "{:.2f}"),
    "of_trl": ("TRL's time over it", "{:.2f}"),
    "of_bound_at_peak": ("bound, head at the peak", "{:.0%}"),
    "of_mle": ("x MLE", "{:.2f}"),
    "of_base": ("x without", "{:.3f}"),
    "ratio": ("ratio", "{:.2f}"),
    "total": ("all batches, s", "{:.2f}"),
    "batches": ("batches", "{:.0f}"),
    "first": ("first, s", "{:.2f}"),
    "steady_of_ours": ("x ours, after ten", "{:.2f}"),
    "of_product": ("x one product", "{:.3f}"),
    "of_triton": ("Triton's time over it", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.3f}"),
    "gbs": ("GB/s", "{:.1f}"),
    "of_gbs": ("of a copy", "{:.0%}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "tokens": ("tokens", "{:.0f}"),
    "positions": ("positions", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:.1f}"),
    "planned_mib": ("planned MiB", "{:.1f}"),
    "of_plan": ("of the plan", "{:.3f}"),
    "budget_mib": ("budget MiB", "{:.1f}"),
    "of_budget": ("of the budget", "{:.3f}"),
    "loss": ("loss", "{:.5g}"),
    "error_loss": ("error of loss", "{:.1e}"),
    "error_grad_hidden": ("of grad_hidden", "{:.1e}"),
    "error_grad_weight": ("of grad_weight", "{:.1e}"),
    "products": ("products", "{:.2f}"),
    "error_worst": ("worst error", "{:.1e}"),
    "error_filter": ("error of the filter", "{:.1e}"),
    "dropped": ("dropped", "{:.1e}"),
    "candidate_eps": ("candidate_eps", "{:.2g}"),
    "grad_filter_eps": ("grad_filter_eps", "{:.2g}"),
    "shared_bytes": ("shared bytes", "{:.0f}"),
    "nats_largest": ("largest error, nats", "{:.1e}"),
    "nats_mean": ("mean error, nats", "{:.1e}"),
}


def shown(name: str, value: float | None) -> str:
    """Return a value in its format, nothing where there is none."""
    return "" if value is None else COLUMNS.get(name, ("", "{:.4g}"))[1].format(value)


def heading(name: str) -> str:
    """Return what stands above a value."""
    return COLUMNS.get(name, (name.replace("_", " "), ""))[0]


def condition(value: object) -> str:
    """Return a condition as it stands in a cell."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def in_a_sentence(conditions: Mapping[str, Any]) -> str:
    """Return conditions as a sentence has them."""
    return ", ".join(f"{key}={condition(value)}" for key, value in conditions.items())


def common_conditions(records: Sequence[Record]) -> dict[str, Any]:
    """Return the conditions that all records have, with the same value."""
    first = records[0].conditions
    return {key: first[key] for key in first if all(r.conditions.get(key) == first[key] for r in records)}


def case_table(records: Sequence[Record]) -> str:
    """Return a row a record: its contestant, the conditions in which the records differ, its values and its note."""
    common, known = common_conditions(records), list(COLUMNS)
    varying = list(dict.fromkeys(key for r in records for key in r.conditions if key not in common))
    names = {name for record in records for name in record.values}
    ordered = sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))
    notes = any(record.note for record in records)
    header = ["", *varying, *map(heading, ordered), *["note"] * notes]
    rows = []
    for record in records:
        conditions = [condition(record.conditions.get(key)) for key in varying]
        cells = [shown(name, record.values.get(name)) for name in ordered]
        rows.append([record.contestant, *conditions, *cells, *[record.note] * notes])
    return markdown(header, rows, left=(0, len(header) - 1) if notes else (0,))


def part_tables(part: Part) -> list[str]:
    """Return a heading, the common conditions and a table for every case."""
    lines = []
    for case, records in by_case(part.records).items():
        line = in_a_sentence(common_conditions(records))
        lines += [f"### {case}", *[line] * bool(line), case_table(records)]
    return lines


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Make a Markdown table that also reads as plain text; the columns in `left` are words, not numbers."""
    table = [list(header), *map(list, rows)]
    widths = [max(2, *(len(row[i]) for row in table)) for i in range(len(header))]  # a rule needs "-:" at least
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    pad = [str.ljust if i in left else str.rjust for i in range(len(header))]
    lines = [[pad[i](cell, widths[i]) for i, cell in enumerate(row)] for row in (table[0], rule, *table[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
