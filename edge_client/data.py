"""A device's rows: from jsonl, csv or tsv files, lists of mappings, or `datasets` data sets.

What fields a row has is for its kind of task to say (edge_client/tasks/).
"""

from __future__ import annotations

import csv
import io
import json
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edge_client.errors import DataError

SUFFIXES: Final = (".jsonl", ".csv", ".tsv")
_ASKED: Final = "the texts given"
_LABELS_SHOWN: Final = 12
_CSV_LIMIT: Final = threading.Lock()  # csv has one limit in a process


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of a context: its text, and the character that it starts at."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Example:
    """One row.

    `label` is an index into the task's labels; None where there is none. Of question answering
    `text` is the question and `text_pair` the context; the first of `answers` is trained on, and
    any of them is right. `place` is where it was read, for errors to name.
    """

    text: str
    text_pair: str | None
    label: int | None
    answers: tuple[Answer, ...] = ()
    place: Place | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What the fields are called in the data."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is."""

    path: str
    line: int

    def error(self, problem: str, field: str | None = None) -> DataError:
        return DataError(problem, path=self.path, line=self.line, field=field)


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was found: its fields, and where it is."""

    fields: Mapping[str, object]
    place: Place

    def error(self, problem: str, field: str) -> DataError:
        return self.place.error(problem, field)

    def value(self, name: str) -> object:
        """A field that must be there."""
        if (value := self.fields.get(name)) is None:
            if name in self.fields:
                raise self.error("is null", name)
            there = listed(sorted(map(str, self.fields)))
            raise self.error(f"is missing; the row has {there}", name)
        return value

    def text(self, name: str) -> str:
        """A field that must be there, and be text."""
        value = self.value(name)
        if not isinstance(value, str):
            raise self.error(f"expected text, got {type(value).__name__}", name)
        if not value.strip():
            raise self.error("is empty", name)
        return whole(value, self.place, name)

    def optional_text(self, name: str) -> str | None:
        """A field that must be text if it is there."""
        return None if self.fields.get(name) is None else self.text(name)


def placed(rows: Sequence[object]) -> list[tuple[Place, object]]:
    """What an app asks about, each with its number.

    Raises:
        DataError: it is one text or row, and no list of them.
    """
    if isinstance(rows, str):
        raise DataError("expected a list of texts, got one text", path="texts")
    if _are_no_rows(rows):
        problem = f"expected a list of texts or rows, got {type(rows).__name__}"
        raise DataError(problem, path="texts")
    return [(Place(_ASKED, number), row) for number, row in enumerate(rows, 1)]


def check_asked(rows: Iterable[tuple[Place, object]], *, prompts: bool = False) -> None:
    """Look at what is to be predicted of, before anything is loaded; a text may be empty.

    Raises:
        DataError: a row is neither text nor mapping (of prompts: no text).
    """
    for place, row in rows:
        if isinstance(row, str):
            whole(row, place)
        elif prompts or not isinstance(row, Mapping):
            raise place.error(f"expected text, got {type(row).__name__}")


def find_labels(paths: Iterable[Path]) -> list[str]:
    """The distinct labels of some files, sorted; whole numbers count as their digits.

    Raises:
        DataError: a row has no label.
    """
    found: set[str] = set()
    for path in paths:
        for place, row in raw_rows(path):
            label = row.get("label") if isinstance(row, Mapping) else None
            if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
                raise place.error("expected a label (text or whole number)", "label")
            found.add(str(label))
    return sorted(found, key=lambda label: (len(label), label) if label.isdigit() else (99, label))


def device_files(folder: Path) -> list[Path]:
    """The data files of a folder, sorted: one a device.

    Raises:
        DataError: there are none.
    """
    if not folder.is_dir():
        raise DataError("is no folder", path=str(folder))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"holds no {', '.join(SUFFIXES)} file", path=str(folder))
    return files


def _are_no_rows(given: object) -> bool:
    """A table of pandas goes through the names of its columns, and a mapping through its keys."""
    is_listed = isinstance(given, Iterable) and not isinstance(given, Mapping | bytes)
    return not is_listed or hasattr(given, "columns")


def check_source(source: object) -> None:
    """Look whether there is something to read at all, before anything else is done.

    Raises:
        DataError: no file that can be read, of a kind that is, and no rows either.
    """
    if not isinstance(source, str | Path):
        if _are_no_rows(source):
            kind = type(source).__name__
            raise DataError(f"expected a file, or rows that are mappings, got {kind}", path="data")
        return
    path = Path(source)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"expected a {', '.join(SUFFIXES)} file", path=str(path))
    try:
        # Rows are read again in later runs; a pipe would also keep who opens it waiting.
        if stat.S_ISFIFO(path.stat().st_mode):
            raise DataError("is a pipe; expected a file that can be read again", path=str(path))
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=str(path)) from error


def raw_rows(source: str | Path | Iterable[object]) -> Iterator[tuple[Place, object]]:
    """What a file or any iterable holds, row by row, and where each is.

    Raises:
        DataError: it cannot be read, or is malformed; names file and line.
    """
    check_source(source)
    if not isinstance(source, str | Path):
        for number, row in enumerate(source, 1):
            yield Place("the rows given", number), row
        return
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=str(path)) from error
    read = _json_rows if path.suffix.lower() == ".jsonl" else _table_rows
    yield from read(path, _decoded(data, path))


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8 text", path=str(path), line=line) from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[Place, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = Place(str(path), number)
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise place.error(f"is not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:  # a number of thousands of digits
            raise place.error(f"is not JSON: {error}") from None
        except RecursionError:
            raise place.error("is nested too deeply") from None


def _table_rows(path: Path, text: str) -> Iterator[tuple[Place, object]]:
    # The lines of csv end with a line feed or carriage return alone, and not with U+2028 and such.
    lines = io.StringIO(text, newline="")
    # Tab-separated corpora (GLUE's among them) hold bare quotes that quote nothing.
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    for line, row in _all_rows(reader, len(text), path):
        place = Place(str(path), line)
        if header is None:
            header = row
            if twice := sorted({name for name in row if row.count(name) > 1}):
                raise place.error(f"the header names {listed(twice)} twice")
        elif len(row) != len(header):
            raise place.error(f"expected {len(header)} columns, got {len(row)}")
        else:
            yield place, dict(zip(header, row, strict=True))


def _all_rows(reader: Any, characters_max: int, path: Path) -> list[tuple[int, list[str]]]:
    """Rows that are not empty, with the line that each ends on; fields of any length."""
    rows, ended = [], 0
    with _CSV_LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, characters_max))
        try:
            for row in reader:
                ended = reader.line_num
                if row:
                    rows.append((ended, row))
            return rows
        except csv.Error as error:
            # Where the row begins: one whose quote is not closed goes on to the end of the file.
            is_open = "unexpected end" in str(error)
            problem = "a quote that begins in this row is never closed" if is_open else str(error)
            raise DataError(f"is malformed: {problem}", path=str(path), line=ended + 1) from None
        finally:
            csv.field_size_limit(before)


def whole(text: str, place: Place, name: str | None = None) -> str:
    """The text, if every character of it is one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise place.error("holds half of a character (a lone surrogate)", name) from None
    return text


def listed(names: Sequence[str]) -> str:
    """Some names for a message, the first of many."""
    shown = ", ".join(map(repr, names[:_LABELS_SHOWN]))
    return shown + (f" and {len(names) - _LABELS_SHOWN} more" if len(names) > _LABELS_SHOWN else "")


def shown(source: object) -> str:
    """A source's name for a message."""
    return str(source) if isinstance(source, str | Path) else "the rows given"
