"""Rows of a CSV file, each with the line that it begins on."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_csv(file: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield the rows of a CSV file (RFC 4180, UTF-8), each with the number of its first line.

    The first row names the columns; columns without a name are left out. A cell in quotes may hold commas, doubled
    quotes and line breaks. An empty cell is None, a field that is absent; white space in a cell is kept.

    Raises:
        ValueError: a file that is not UTF-8 or has no header, a column named twice, a row with more or fewer cells than
            the header, or quotes that are not closed; the message names the file and the line.
    """
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")  # a byte order mark, which spreadsheets write, is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    rows = _numbered(file, text)
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    if not any(names):
        raise ValueError(f"{file} has no header; expected the names of the columns in its first line")
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{file}:{line} names the column {name!r} twice")
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{file}:{line} has {len(cells)} cells; expected {len(names)}, those of {_shown(names)}")
        yield line, {name: cell or None for name, cell in zip(names, cells, strict=True) if name}


def _numbered(file: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of all rows but blank ones, each with the number of the row's first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    while True:
        limit = csv.field_size_limit(sys.maxsize)  # of all readers in the process, so it is put back
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{file}:{line} is not CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
