"""Files that are whole or absent whenever a run is killed, and files of examples with their negatives."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpo_kernels.options import suggests_arguments

from .completions import Completion

Negatives = Sequence[Sequence[str | Completion]] | Sequence[Sequence[Sequence[int]]]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move the file written there to ``path`` at the end.

    A reader never sees half a file, and after an error ``path`` is as it was. The folder is made if it is missing.
    Runs that write the same file at once, on one machine or several, do not disturb each other: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by :func:`whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@suggests_arguments
def write_negatives(
    path: str | os.PathLike[str],
    examples: Any,
    negatives: Negatives,
    *,
    kind: str = "autoregressive",
    ranks: Sequence[Sequence[int]] | None = None,
) -> None:
    """Write examples with negatives to a file that training reads.

    Negatives are appended to the field ``"negatives"``, or ``"rejected"`` of an example that has ``"chosen"``. The
    fields ``"kinds"`` and, if ranks are given or present, ``"ranks"`` describe them one by one.

    Args:
        path: ends with ``.parquet`` or ``.jsonl``; a file there is replaced once the new one is whole.
        examples: a ``datasets.Dataset`` or a list of mappings.
        negatives: for each example its new negatives, texts or token ids, as its old ones are: what the functions of
            this package return. A :class:`Completion` counts as its text.
        kind: the kind of the new negatives, a name in :data:`~.kinds.KINDS`.
        ranks: for each example the ranks of its new negatives, 1 or more. If they are given and the old negatives have
            none, those get rank 1; if only the old ones have ranks, the new ones share the rank behind them.

    Raises:
        ValueError: another suffix, another number of negatives than of examples or of ranks than of negatives, or
            negatives of another form than the example's own; the message names the example.
        RuntimeError: ``datasets`` is not installed.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"negatives are written to a file that ends with .parquet or .jsonl, got {str(path)!r}")
    for name, values in (("lists of negatives", negatives), ("lists of ranks", ranks)):
        if values is not None and len(values) != len(examples):
            raise ValueError(f"expected {len(examples)} {name}, one per example, got {len(values)}")
    plain = [[value.text if isinstance(value, Completion) else value for value in own] for own in negatives]
    rows = [
        _extended(dict(example), index, plain[index], kind, None if ranks is None else list(ranks[index]))
        for index, example in enumerate(examples)
    ]
    if any(row["ranks"] is not None for row in rows):
        rows = [row | {"ranks": row["ranks"] or [1] * len(row["kinds"])} for row in rows]
    else:
        rows = [{name: value for name, value in row.items() if name != "ranks"} for row in rows]
    _write(path, rows)


def _extended(
    example: dict[str, Any], index: int, negatives: list[Any], kind: str, ranks: list[int] | None
) -> dict[str, Any]:
    """Add negatives to an example; ``"ranks"`` is None where nothing is ranked."""
    field = "rejected" if example.get("chosen") is not None else "negatives"
    old = _as_list(example.get(field), field, index)
    forms = {"texts" if isinstance(value, str) else "token ids" for value in (*old, *negatives)}
    if len(forms) > 1:
        raise ValueError(f"{field!r} of example {index} would hold texts and token ids; expected one of them")
    if ranks is not None and len(ranks) != len(negatives):
        raise ValueError(f"example {index} has {len(negatives)} new negatives, got {len(ranks)} ranks for them")
    old_ranks = example.get("ranks")
    if old_ranks is not None or ranks is not None:
        before = list(old_ranks) if old_ranks is not None else [1] * len(old)
        behind = max([0, *before]) + 1
        ranks = before + (ranks if ranks is not None else [behind] * len(negatives))
    kinds = [*(example.get("kinds") or ["given"] * len(old)), *[kind] * len(negatives)]
    return example | {field: old + negatives, "kinds": kinds, "ranks": ranks}


def _as_list(value: Any, field: str, index: int) -> list[Any]:
    """Return the negatives of an example as a list; TRL has a single one without a list around it."""
    if value is None:
        return []
    if isinstance(value, str) or (len(value) and isinstance(value[0], int)):
        return [value]
    if len(value) and (isinstance(value[0], Mapping) or (len(value[0]) and isinstance(value[0][0], Mapping))):
        raise ValueError(
            f"{field!r} of example {index} holds conversations, beside which there is no room for texts or token ids"
        )
    return list(value)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise RuntimeError(
            f"writing {str(path)!r} needs datasets, which is not installed: pip install datasets"
        ) from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    dataset = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    with whole_file(path) as partial:
        if path.suffix == ".parquet":
            dataset.to_parquet(str(partial))
        else:
            dataset.to_json(str(partial), lines=True, force_ascii=False)
