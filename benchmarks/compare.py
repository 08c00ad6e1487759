"""Puts two result files side by side: `python -m benchmarks.compare BEFORE.json AFTER.json`.

Of everything that both files have measured, the value in each and the ratio of the two. Where a contestant has a
multiple (of the floor, of an MLE step, of TRL's step) that is what is compared and not seconds, so that files of
different days can be; of different devices the ratio says who profits, not who is faster.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import records
from benchmarks.records import Parts
from benchmarks.tables import heading, in_a_sentence, markdown, shown

# The first of these that a record has is compared; of the floor itself it is the seconds.
COMPARED = ("floor", "of_trl", "of_mle", "of_base", "ratio", "total", "of_plan", "of_product")
COMPARED += ("nats_largest", "tflops", "gbs", "seconds")
Key = tuple[str, str, str]  # part, case with its conditions, contestant


def figures(parts: Parts) -> dict[Key, tuple[str, float]]:
    """Return what a result file says, as the name of a value and the value."""
    found = {}
    for name, part in parts.items():
        for record in part.records:
            case = "; ".join(filter(None, (record.case, in_a_sentence(record.conditions))))
            for value in ("seconds",) if record.is_floor else COMPARED:
                if value in record.values:
                    found[name, case, record.contestant] = value, record.values[value]
                    break
    return found


def compare(before: Parts, after: Parts) -> str:
    """Return the table, and what only one of the files has."""
    first, second = figures(before), figures(after)
    rows = []
    for key in (key for key in first if key in second and first[key][0] == second[key][0]):
        (name, old), (_, new) = first[key], second[key]
        rows.append([*key, heading(name), shown(name, old), shown(name, new), f"{new / old:.3f}" if old else ""])
    header = ["part", "case", "contestant", "what", "before", "after", "after / before"]
    lines = [markdown(header, rows, left=range(4))] if rows else ["the files have nothing in common"]
    cases = [{f"{part}: {case}" for part, case, _ in found} for found in (first, second)]
    for name, alone in (("before", cases[0] - cases[1]), ("after", cases[1] - cases[0])):
        if alone:
            lines.append("\n".join([f"only in {name}:", *(f"- {case}" for case in sorted(alone))]))
    devices = [{str(part.environment.get("device")) for part in parts.values()} for parts in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"different devices: {' and '.join(', '.join(sorted(names)) for names in devices)}")
    return "\n\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the comparison of two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="JSON of a run of benchmarks.report")
    parser.add_argument("after", type=Path, help="JSON of another")
    args = parser.parse_args(argv)
    for path in (args.before, args.after):
        if not path.exists():
            parser.error(f"there is no {path}")
    print(compare(records.load(args.before), records.load(args.after)))


if __name__ == "__main__":
    main()
