"""Load examples from JSON lines, CSV, Parquet, plain text, a saved data set, or a data set on the hub."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cpo_kernels.negatives.progress import progress_bar
from cpo_kernels.options import argument_names, refuse_unknown

from .csv_rows import read_csv
from .formats import check_encodable, check_example

logger = logging.get_logger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
LISTS = ("negatives", "ranks", "kinds")  # fields that a table of texts holds as JSON
Row = Mapping[str, Any]
Place = Callable[[int], str]  # Names the place of the row of a number, for messages.


@dataclass(frozen=True)
class ExampleOptions:
    """How rows become examples; the fields are the keyword arguments of :func:`load_examples`."""

    columns: Mapping[str, str] | None = None
    prompt_template: str | None = None
    completion_template: str | None = None
    text_column: str = "text"
    prompt_fraction: float = 0.5
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.prompt_fraction < 1:
            raise ValueError(f"prompt_fraction must be in (0, 1), got {self.prompt_fraction}")
        if (self.prompt_tokens is None) != (self.completion_tokens is None):
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and completion_tokens={self.completion_tokens} cut texts "
                "together; give both or neither"
            )
        for name in ("prompt_tokens", "completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def load_examples(
    source: str,
    *,
    split: str = "train",
    name: str | None = None,
    tokenizer: Any = None,
    max_examples: int | None = None,
    vocab_size: int | None = None,
    disable_tqdm: bool = False,
    **options: Any,
) -> Sequence[Row]:
    r"""Load examples for training, and check every one of them.

    Args:
        source: what to read:

            - a file, or several by a pattern such as ``data/*.jsonl``: JSON lines (``.jsonl``, one object a line),
              ``.json`` (a list of objects), ``.csv`` (names of columns in the first line, an empty cell for an absent
              field), ``.parquet``, or ``.txt`` (documents separated by blank lines);
            - a directory that ``datasets`` saved;
            - any other name: a data set on the hub.
        split: part of a data set; slices such as ``train[:1000]`` work for data sets from the hub.
        name: configuration of a data set on the hub, such as ``20231101.en``.
        tokenizer: needed for cutting by tokens.
        max_examples: most rows to use, from the first on.
        vocab_size: number of embeddings of the model; None leaves token ids in the rows unchecked.
        disable_tqdm: show no progress bar, which otherwise is shown on a terminal after some seconds.
        options: how a row becomes an example.

            - ``columns``: new names to the row's own, as ``{"completion": "answer"}``.
            - ``prompt_template``, ``completion_template``: Jinja templates over the row's fields, such as
              ``"{{ question }}\n"``.
            - A row that has ``text_column`` (default ``text``) and no prompt or completion is a document to cut: behind
              ``prompt_fraction`` of its words (default 0.5), or, with ``prompt_tokens`` and ``completion_tokens``, into
              consecutive pieces of that many tokens, without an end that is no longer than a prompt. Documents too
              short to cut are left out and counted in a warning.

    ``negatives``, ``ranks`` and ``kinds`` may be JSON, as ``["b", "c"]`` in a cell of a CSV file; all other texts are
    taken as they are.

    Returns:
        A ``datasets.Dataset`` or a list of mappings, in one of the forms of :func:`.formats.normalize_example`.

    Raises:
        ValueError: a source that does not exist, options that contradict each other, or a row that is no example; the
            message names the file, the line and the field.
        RuntimeError: a data set that could not be loaded from the hub; the message names it.
        TypeError: an option that does not exist; the message names the nearest one.
    """
    own = argument_names(ExampleOptions)
    refuse_unknown(load_examples, options.keys() - {*own}, also=own)
    how = ExampleOptions(**options)
    if how.prompt_tokens is not None and tokenizer is None:
        raise ValueError("prompt_tokens and completion_tokens cut by tokens; pass the tokenizer")
    rows, place = read_rows(source, split=split, name=name)
    if max_examples is not None:
        rows = rows[:max_examples] if isinstance(rows, list) else rows.select(range(min(max_examples, len(rows))))
    if not len(rows):
        raise ValueError(f"{source} has no examples")
    with progress_bar("Reading examples", "row", len(rows), disable_tqdm) as bar:
        return _to_examples(rows, place, how, tokenizer, vocab_size, bar)


# Rows


def read_rows(source: str, *, split: str = "train", name: str | None = None) -> tuple[Any, Place]:
    """Return the rows of a source of :func:`load_examples`, unchanged, and a function that names a row's place."""
    path = Path(source)
    if path.is_dir():
        return _read_saved(path, split), lambda i: f"{source}, row {i}"
    files = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
    if not files:
        if path.suffix in SUFFIXES or glob.has_magic(source) or path.is_absolute() or source.startswith("."):
            raise ValueError(f"there is no file {source}")
        return _read_hub(source, split, name), lambda i: f"{source}, split {split}, row {i}"
    suffixes = {Path(file).suffix for file in files}
    if suffixes == {".parquet"}:
        return _read_parquet(files)
    rows: list[Row] = []
    places: list[str] = []
    for file in files:
        for line, row in _read_lines(file):
            rows.append(row)
            places.append(f"{file}:{line}")
    return rows, places.__getitem__


def _read_lines(file: str) -> Iterator[tuple[int, Row]]:
    """Yield the rows of one file, each with the number of its line."""
    suffix = Path(file).suffix
    if suffix == ".txt":
        yield from _documents(file)
    elif suffix == ".jsonl":
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line, f"{file}:{number}")
    elif suffix == ".csv":
        yield from read_csv(file)
    elif suffix == ".json":
        values = _parse_json(Path(file).read_bytes(), file)
        if not isinstance(values, list):
            raise ValueError(f"{file} must hold a list of objects, got {type(values).__name__}; or call it .jsonl")
        for number, value in enumerate(values):
            yield number, _object(value, f"{file}:{number}")
    else:
        raise ValueError(f"{file}: expected a file of type {', '.join(SUFFIXES)}, got {suffix or 'no suffix'}")


def _parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def _parse(line: bytes, place: str) -> Row:
    return _object(_parse_json(line, place), place)


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object with fields, got {type(value).__name__}")
    return value


def _documents(file: str) -> Iterator[tuple[int, Row]]:
    """Yield the documents of a text file, separated by blank lines, each with the number of its first line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    document: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            document.append(line)
        elif document:
            yield number - len(document), {"text": "\n".join(document)}
            document = []


def _read_parquet(files: list[str]) -> tuple[Any, Place]:
    import datasets

    parts = []
    for file in files:
        try:
            parts.append(datasets.Dataset.from_parquet(file))
        except Exception as error:
            raise ValueError(f"{file} is not Parquet that datasets reads: {error}") from error

    def place(index: int) -> str:
        for file, part in zip(files, parts, strict=True):
            if index < len(part):
                return f"{file}, row {index}"
            index -= len(part)
        raise IndexError(index)

    try:
        return datasets.concatenate_datasets(parts), place
    except ValueError as error:
        raise ValueError(f"{files[0]} and the files beside it do not have the same columns: {error}") from error


def _read_saved(path: Path, split: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        message = f"{path} is not a directory that datasets saved; for its files, give a pattern such as {path}/*.jsonl"
        raise ValueError(message) from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}, only {sorted(saved)}")
    return saved[split]


def _read_hub(source: str, split: str, name: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, name, split=split)
    except Exception as error:  # The network, the hub and the data set's files raise many kinds.
        asked = f"the data set {source!r} (configuration {name!r}, split {split!r})"
        raise RuntimeError(
            f"there is no file or directory {source!r}, and datasets could not load {asked}: "
            f"{type(error).__name__}: {error}"
        ) from error


# From rows to examples


def _to_examples(
    rows: Any, place: Place, how: ExampleOptions, tokenizer: Any, vocab_size: int | None, bar: Any
) -> Sequence[Row]:
    render = _Templates(how)
    examples: list[Row] = []
    changed, uncut = False, []
    for index, row in enumerate(rows):
        where = place(index)
        example = _with_lists(render(row, where))
        if _is_document(example, how.text_column):
            pieces = _cut(example, how, tokenizer, where)
            if not pieces:
                uncut.append(where)
        else:
            pieces = [example]
        changed |= len(pieces) != 1 or pieces[0] is not row
        for piece in pieces:
            _check(piece, index, where, vocab_size)
        examples.extend(pieces)
        bar.update()
    if uncut:
        logger.warning(f"{len(uncut)} of {len(rows)} texts are too short to cut and left out, the first at {uncut[0]}")
    if not examples:
        raise ValueError(f"all {len(rows)} texts are too short to cut, the first at {uncut[0]}")
    return examples if changed or isinstance(rows, list) else rows


def _with_lists(example: Row) -> Row:
    """Read the fields of an example that hold lists where they are JSON; what is not is refused with the example."""
    read = {}
    for name in LISTS:
        text = example.get(name)
        if isinstance(text, str):
            with suppress(ValueError):
                read[name] = json.loads(text)
    return {**example, **read} if read else example


def _check(example: Row, index: int, where: str, vocab_size: int | None) -> None:
    try:
        check_example(example, index, vocab_size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class _Templates:
    """A renaming of the columns of rows, and the templates of their prompt and completion."""

    def __init__(self, how: ExampleOptions) -> None:
        self.columns = dict(how.columns or {})
        self.templates = {}
        texts = {"prompt": how.prompt_template, "completion": how.completion_template}
        for field, text in texts.items():
            if text is not None:
                self.templates[field] = _compile(f"{field}_template", text)

    def __call__(self, row: Row, where: str) -> Row:
        if not self.columns and not self.templates:
            return row
        for new, own in self.columns.items():
            if own not in row:
                raise ValueError(f"{where} has no {own!r}, which columns takes {new!r} from, only {sorted(row)}")
        # Columns that were renamed or replaced are no fields of the example any more.
        taken = set(self.columns.values()) - set(self.columns)
        example = {k: v for k, v in row.items() if k not in taken} | {n: row[o] for n, o in self.columns.items()}
        for field, template in self.templates.items():
            example[field] = _fill(template, row, f"{field}_template", where)
        return example


def _compile(option: str, text: str) -> Any:
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{option} is not a Jinja template: {error}") from error


def _fill(template: Any, row: Row, option: str, where: str) -> str:
    import jinja2

    try:
        return template.render({name: "" if value is None else value for name, value in row.items()})
    except jinja2.TemplateError as error:
        raise ValueError(f"{option} does not fit {where}, which has {sorted(row)}: {error}") from error


def _is_document(example: Row, text_column: str) -> bool:
    fields = [name for name in ("prompt", "completion", "chosen", "rejected") if example.get(name) is not None]
    return not fields and text_column in example


def _cut(example: Row, how: ExampleOptions, tokenizer: Any, where: str) -> list[Row]:
    text = example[how.text_column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {how.text_column!r} must be a string, got {type(text).__name__}")
    check_encodable(text, f"{where}: {how.text_column!r}")
    if how.prompt_tokens is None or how.completion_tokens is None:
        return list(_cut_words(text, how.prompt_fraction))
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return list(_cut_tokens(ids, how.prompt_tokens, how.completion_tokens))


def _cut_words(text: str, fraction: float) -> Iterator[Row]:
    """Cut a text into prompt and completion before the white space in front of a word; keep its layout."""
    text = text.strip()
    starts = [i for i in range(1, len(text)) if text[i - 1].isspace() and not text[i].isspace()]
    if not starts:
        return
    words = len(starts) + 1
    cut = starts[min(max(round(words * fraction), 1), words - 1) - 1]
    prompt = text[:cut].rstrip()
    yield {"prompt": prompt, "completion": text[len(prompt) :]}


def _cut_tokens(ids: Sequence[int], prompt: int, completion: int) -> Iterator[Row]:
    """Cut a document into consecutive pieces; its end is a piece too if it is longer than a prompt."""
    for start in range(0, len(ids), prompt + completion):
        piece = list(ids[start : start + prompt + completion])
        if len(piece) > prompt:
            yield {"prompt": piece[:prompt], "completion": piece[prompt:]}
