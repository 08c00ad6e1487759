"""Takes figures of README and docs from the result files: `python -m benchmarks.publish`, --check changes nothing.

A figure stands between `<!-- from FILE: BLOCK -->` and `<!-- end -->`, where FILE is the name of a file in
`benchmarks/results` and BLOCK says what of it; for one number `value: PART | CASE | CONTESTANT | VALUE`. With --check
the exit status is 1 if a document does not say what the files say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from benchmarks import bars, page, records, scaling, tables
from benchmarks.records import Parts, Record
from benchmarks.suite import ON_REQUEST
from benchmarks.tables import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/results.md", "docs/plugging-in.md", "docs/training.md", "docs/design.md")
BLOCK = re.compile(r"<!-- from ([\w-]+): (.+?) -->(.*?)<!-- end -->", re.DOTALL)


@lru_cache
def results(path: Path) -> Parts:
    """Read a result file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    return records.load(path)


def one_value(parts: Parts, where: str) -> str:
    """Return a number, by `PART | CASE | CONTESTANT | VALUE`, of the one record of that name."""
    part, case, contestant, name = (word.strip() for word in where.split("|"))
    record = records.only(parts[part].select(contestant, case=case), where)
    return tables.shown(name, record.values[name])


def short_matrix(parts: Parts, where: str) -> str:
    """Return times over the floor of the cases whose names are given, separated by `|`; contestants that ran in one."""
    part, cases = records.heads(parts), [word.strip() for word in where.split("|")]
    timed = [r for case in cases for r in part.select(case=case) if "floor" in r.values and not is_floor(r)]
    names = list(dict.fromkeys(record.contestant for record in timed))
    best = {case: min(r.values["floor"] for r in timed if r.case == case and same_work(r)) for case in cases}
    cells = {(r.contestant, r.case): emphasised(r, best[r.case]) for r in timed}
    return markdown(["", *cases], [[name, *(cells.get((name, case), "") for case in cases)] for name in names])


def same_work(record: Record) -> bool:
    """Return whether a record is of the work of most: K negatives with a reference."""
    return record.conditions.get("work") == "cpo"


def is_floor(record: Record) -> bool:
    """Return whether a record is of bare products."""
    return record.contestant.startswith("floor")


def emphasised(record: Record, best: float) -> str:
    """Write the fastest in bold."""
    text = f"{record.values['floor']:.2f}"
    return f"**{text}**" if record.values["floor"] == best else text


def lives(parts: Parts, case: str) -> str:
    """Return batches of varying lengths in a few columns; those that were stopped show how far they had come."""
    records = [r for r in parts["lengths"].select(case=case.strip()) if "total" in r.values and not is_floor(r)]
    names = ("total", "batches", "first")
    rows = [
        [r.contestant, *(tables.shown(name, r.values.get(name)) for name in names)]
        for r in records
        if r.conditions.get("run") != "last"
    ]
    return markdown(["", "seconds", "batches done", "first call, s"], rows)


def minutes(parts: Parts, _: str) -> str:
    """Return the minutes of all parts of a usual run."""
    return f"{sum(part.seconds for part in parts.values() if part.name not in ON_REQUEST) / 60:.0f}"


def case_of(parts: Parts, where: str) -> str:
    """Return the table of a case, by `PART | CASE`."""
    part, case = (word.strip() for word in where.split("|"))
    return tables.case_table(parts[part].select(case=case))


def part_of(parts: Parts, name: str) -> str:
    """Return all tables of a part, and the line that says where they come from."""
    return "\n\n".join([*tables.part_tables(parts[name.strip()]), page.conditions(parts[name.strip()])])


BLOCKS: dict[str, Callable[[Parts, str], str]] = {
    "bars": lambda parts, _: bars.table(bars.verdicts(parts)),
    "matrix": lambda parts, _: page.matrix(records.heads(parts)),
    "short matrix": short_matrix,
    "part": part_of,
    "case": case_of,
    "lives": lives,
    "minutes": minutes,
    "conditions": lambda parts, name: page.conditions(parts[name.strip()]),
    "cost model": lambda parts, _: scaling.check(list(scaling.points(parts))),
    "memory model": lambda parts, _: scaling.check(list(scaling.memory_points(parts)), "MiB"),
    "predictions": lambda parts, _: scaling.predictions(),
    "eager logits": lambda parts, _: f"{scaling.eager_logits(scaling.LLAMA_70B, scaling.Step()) / scaling.GIB:.0f}",
    "value": one_value,
}


def rendered(text: str, folder: Path = RESULTS) -> str:
    """Return a document with the figures that the result files have now."""

    def replace(match: re.Match[str]) -> str:
        file, block, old = match.groups()
        name, _, where = block.partition(":")
        new = BLOCKS[name.strip()](results(folder / f"{file}.json"), where)
        inline = "\n" not in old and "\n" not in new
        return f"<!-- from {file}: {block} -->{new if inline else f'{chr(10) * 2}{new}{chr(10) * 2}'}<!-- end -->"

    return BLOCK.sub(replace, text)


def outdated(documents: Iterable[Path]) -> list[Path]:
    """Return the documents that do not say what the files say."""
    return [
        path for path in documents if path.read_text(encoding="utf-8") != rendered(path.read_text(encoding="utf-8"))
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the documents, or only compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a document differs")
    args = parser.parse_args(argv)
    changed = outdated(ROOT / name for name in DOCUMENTS)
    for path in changed:
        print(path.relative_to(ROOT))
        if not args.check:
            path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
