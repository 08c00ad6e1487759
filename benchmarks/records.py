"""Holds what a part of the suite has to say: records of one contestant in one case, and their JSON.

`seconds` is a median over the rounds, and `spread` the distance between the quartiles as a share of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpo_kernels.negatives.files import write_whole


@dataclass(frozen=True)
class Record:
    """Says what was measured of one contestant in one case."""

    case: str  # what was run, in a few words; the same for all that are compared with one another
    contestant: str  # who ran it
    values: Mapping[str, float] = field(default_factory=dict)  # by the names of `tables.COLUMNS`, which say the units
    conditions: Mapping[str, Any] = field(default_factory=dict)  # sizes and options, such as V, H, N, K, dtype
    note: str = ""  # why there are no values, or what a reader must know of them

    @property
    def is_floor(self) -> bool:
        """Returns whether it is of bare products."""
        return self.contestant.startswith("floor")

    @property
    def stopped(self) -> bool:
        """Returns whether it was stopped before its end, so that its figures are lower bounds."""
        return self.note.startswith("stopped")

    @property
    def is_peer(self) -> bool:
        """Returns whether it is neither of ours nor of a floor."""
        return not self.contestant.startswith(("cpo-kernels", "floor"))


@dataclass
class Part:
    """Holds all records of one part, and what they depend on."""

    name: str  # of the part
    environment: dict[str, Any]  # device, versions, commit, command (environment.describe)
    records: list[Record] = field(default_factory=list)  # in the order they were measured
    seconds: float = 0.0  # that the part took
    error: str = ""  # why there are no more records; empty where the part came to its end

    def select(self, contestant: str | None = None, *, having: str | None = None, **conditions: Any) -> list[Record]:
        """Return the records of a contestant (None: of all) with a value that meet conditions, `case` too."""
        return [
            record
            for record in self.records
            if contestant in (None, record.contestant)
            and (having is None or having in record.values)
            and all(({"case": record.case} | dict(record.conditions)).get(key) == conditions[key] for key in conditions)
        ]

    @property
    def void(self) -> bool:
        """Returns whether something in it was faster than the machine, so that nothing of it counts."""
        return self.error.startswith(VOID)


Parts = dict[str, Part]
VOID = "void: "
NOTHING = Part("", {})


def by_case(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return records by case, in order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.case, []).append(record)
    return found


def value(records: Iterable[Record], name: str) -> list[float]:
    """Return a value of all records that have it."""
    return [record.values[name] for record in records if name in record.values]


def load(path: Path) -> Parts:
    """Read the parts of a result file; none where there is no such file."""
    if not path.exists():
        return {}
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return {
        name: Part(name, **content | {"records": [Record(**record) for record in content["records"]]})
        for name, content in parts.items()
    }


def save(parts: Parts, path: Path) -> None:
    """Write a result file, whole or not at all, without values that are no finite numbers, for which JSON has none."""
    contents = {}
    for name, part in parts.items():
        contents[name] = {key: content for key, content in asdict(part).items() if key != "name"}
        for record in contents[name]["records"]:
            record["values"] = {key: value for key, value in record["values"].items() if math.isfinite(value)}
    write_whole(path, json.dumps({"parts": contents}, indent=1) + "\n")
