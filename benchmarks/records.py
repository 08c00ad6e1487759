"""Holds what a part of the suite has to say: records of one contestant in one case, and their JSON.

`seconds` is a median over the rounds, and `spread` the distance between the quartiles as a share of it. Result files
of before have the fewest seconds there, and their median beside as `median`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cpo_kernels.trainer.files import write_whole


@dataclass(frozen=True)
class Record:
    """Says what was measured of one contestant in one case.

    Attributes:
        case: what was run, in a few words; the same for all that are compared with one another.
        contestant: who ran it.
        values: what was measured, by the names of `tables.COLUMNS`, which say the units.
        conditions: sizes and options that the case has beyond its name, such as V, H, N, K, dtype.
        note: why there are no values, or what a reader must know of them.
    """

    case: str
    contestant: str
    values: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class Part:
    """Holds all records of one part, and what they depend on.

    Attributes:
        name: of the part.
        environment: device, versions, commit, command (environment.describe).
        records: in the order they were measured.
        seconds: that the part took.
        error: why there are no more records; empty where the part came to its end.
    """

    name: str
    environment: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    def select(self, contestant: str | None = None, **conditions: Any) -> list[Record]:
        """Return the records of a contestant (None: of all) that meet all conditions; `case` is one of them."""
        return [
            record
            for record in self.records
            if contestant in (None, record.contestant)
            and all(({"case": record.case} | dict(record.conditions)).get(key) == conditions[key] for key in conditions)
        ]

    def cases(self) -> list[str]:
        """Return the names of the cases in order."""
        return list(dict.fromkeys(record.case for record in self.records))


Parts = dict[str, Part]


def heads(parts: Parts) -> Part | None:
    """Return the part `heads` with the records of `wide`, where either was run."""
    given = [parts[name] for name in ("heads", "wide") if name in parts]
    return replace(given[0], records=[record for part in given for record in part.records]) if given else None


def load(path: Path) -> Parts:
    """Read the parts of a result file; none where there is no such file."""
    if not path.exists():
        return {}
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    return {
        name: Part(name, **content | {"records": [Record(**record) for record in content["records"]]})
        for name, content in parts.items()
    }


def as_json(part: Part) -> dict[str, Any]:
    """Return what JSON can hold; values that are no finite numbers are left out, since it has none."""
    content = asdict(part)
    del content["name"]
    for record in content["records"]:
        record["values"] = {name: value for name, value in record["values"].items() if math.isfinite(value)}
    return content


def save(parts: Parts, path: Path) -> None:
    """Write a result file, whole or not at all."""
    content = {"parts": {name: as_json(part) for name, part in parts.items()}}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def only(records: Sequence[Record], what: str) -> Record:
    """Return the one record.

    Raises:
        LookupError: there are none or several.
    """
    if len(records) != 1:
        raise LookupError(f"{what}: expected one record, found {len(records)}")
    return records[0]


def value(records: Iterable[Record], name: str) -> list[float]:
    """Return a value of all records that have it."""
    return [record.values[name] for record in records if name in record.values]
