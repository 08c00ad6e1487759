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

from benchmarks import bars, environment, page, records, tables
from benchmarks.environment import RESULTS, ROOT
from benchmarks.kernels import gpu_page
from benchmarks.records import Parts
from benchmarks.suite import ON_REQUEST

DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("results", "trl", "liger", "own-loop", "design", "gpu")))
BLOCK = re.compile(r"<!-- from ([\w-]+): (.+?) -->(.*?)<!-- end -->", re.DOTALL)


@lru_cache
def results(path: Path) -> Parts:
    """Read a result file; raise FileNotFoundError where there is none."""
    if not path.exists():
        raise FileNotFoundError(path)
    return records.load(path)


def one_value(parts: Parts, part: str, case: str, contestant: str, name: str) -> str:
    """Return a number of the one record of that part, case and contestant."""
    (record,) = parts[part].select(contestant, case=case)
    return tables.shown(name, record.values[name])


def lives(parts: Parts, case: str) -> str:
    """Return batches of varying lengths in a few columns; who was stopped has lower bounds, and how far it had come."""
    rows = []
    for r in parts["lengths"].select(case=case, having="total"):
        if not r.is_floor and r.conditions.get("run") != "last":
            bound = ">= " * r.stopped
            over = f"{bound}{r.values['of_ours']:.2f}" if r.is_peer else ""
            names = ("batches", "first", "steady_of_ours")
            more = [tables.shown(name, r.values.get(name)) for name in names]
            rows.append([r.contestant, f"{bound}{r.values['total']:.2f}", over, *more])
    ran = environment.processor(parts["lengths"].environment)
    return tables.markdown([ran, "seconds", "x ours", "batches done", "first call, s", "x ours, after ten"], rows)


# What a block says, by its name: of the parts of its file, and of the words after its name, which `|` separates.
BLOCKS: dict[str, Callable[..., str]] = {
    "bars": bars.summary,
    "machine": lambda parts: environment.machine(parts["heads"].environment),
    "matrix": lambda parts, *cases: page.matrix(parts["heads"], cases),
    "part": lambda parts, name: "\n\n".join([*tables.part_tables(parts[name]), page.conditions(parts[name])]),
    "case": lambda parts, name, case: tables.case_table(parts[name].select(case=case)),
    "lives": lives,
    "minutes": lambda parts: f"{sum(p.seconds for p in parts.values() if p.name not in ON_REQUEST) / 60:.0f}",
    "value": one_value,
    "band": gpu_page.band,
    "predicted": gpu_page.predicted,
    "everywhere": gpu_page.everywhere,
}


def rendered(text: str, folder: Path = RESULTS) -> str:
    """Return a document with the figures that the result files have now."""

    def replace(match: re.Match[str]) -> str:
        file, block, old = match.groups()
        name, _, where = block.partition(":")
        words = [word.strip() for word in where.split("|")] if where else []
        new = BLOCKS[name.strip()](results(folder / f"{file}.json"), *words)
        inline = "\n" not in old and "\n" not in new
        return f"<!-- from {file}: {block} -->{new if inline else f'{chr(10) * 2}{new}{chr(10) * 2}'}<!-- end -->"

    return BLOCK.sub(replace, text)


def outdated(documents: Iterable[Path]) -> list[Path]:
    """Return the documents that do not say what the files say."""
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    return [path for path, text in texts.items() if text != rendered(text)]


def main(argv: list[str] | None = None) -> int:
    """Write the documents, or only compares them."""
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
