"""Two result files side by side: `python -m benchmarks.compare BEFORE.json AFTER.json`.

Of every contestant on every shape that both files have, the time as a multiple of the floor's in each, and the ratio of
the two: below 1, the second file is faster. Multiples and not seconds, so that files of different days can be compared;
of different devices the ratio says who profits, not who is faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contestants import FLOOR
from benchmarks.tables import markdown

Multiples = dict[tuple[str, str], float]  # (shape, contestant) -> times the floor's fewest seconds


def multiples(results: Mapping[str, Any]) -> Multiples:
    """What a result file says of each contestant on each shape."""
    found: Multiples = {}
    for case in results["cases"]:
        fastest = {row["contestant"]: min(row["timing"]["seconds"]) for row in case["rows"]}
        for contestant, seconds in fastest.items():
            if contestant != FLOOR:
                found[case["shape"]["name"], contestant] = seconds / fastest[FLOOR]
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The table, and what only one of the files has."""
    first, second = multiples(before), multiples(after)
    common = [key for key in first if key in second]
    rows = [[*key, f"{first[key]:.2f}", f"{second[key]:.2f}", f"{second[key] / first[key]:.3f}"] for key in common]
    header = ["shape", "contestant", "before, x floor", "after, x floor", "after / before"]
    lines = [markdown(header, rows)] if rows else ["the files have nothing in common"]
    for name, own, other in (("before", first, second), ("after", second, first)):
        alone = sorted({shape for shape, _ in own} - {shape for shape, _ in other})
        if alone:
            lines.append(f"only in {name}: {', '.join(alone)}")
    devices = [results["environment"]["device"] for results in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"different devices: {devices[0]} and {devices[1]}")
    return "\n\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the comparison of two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="JSON of a run of benchmarks.report")
    parser.add_argument("after", type=Path, help="JSON of another")
    args = parser.parse_args(argv)
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (args.before, args.after))
    print(compare(before, after))


if __name__ == "__main__":
    main()
