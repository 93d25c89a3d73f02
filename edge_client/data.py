"""A device's rows: from jsonl, csv or tsv files, lists of mappings, or `datasets` data sets.

A classification row has a text, a label, and where the task has pairs a second text. A row of a
causal LM has a text and no label; a second text is what follows the first, and alone carries loss.
"""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Final

from edge_client.errors import DataError

SUFFIXES: Final = (".jsonl", ".csv", ".tsv")
_LABELS_SHOWN: Final = 12
_DIGITS_MAX: Final = 10
_CSV_LIMIT: Final = threading.Lock()  # csv has one limit in a process


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `label` is an index into the task's labels; None where there is none."""

    text: str
    text_pair: str | None
    label: int | None


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What the fields are called in the data."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    line: int

    def error(self, problem: str, field: str | None = None) -> DataError:
        return DataError(problem, path=self.path, line=self.line, field=field)


def read_rows(
    source: str | Path | Iterable[object],
    *,
    labels: Sequence[str] | None,
    fields: FieldNames | None = None,
) -> list[Example]:
    """All rows of a source.

    Args:
        source: a file, or mappings (or Examples) in any iterable.
        labels: the task's labels; None for causal LM, where a label in the data is ignored.
        fields: names of the fields, if not text, text_pair and label.

    Raises:
        DataError: a row is malformed; names file, line and field.
    """
    names = fields or FieldNames()
    rows = []
    for place, row in _raw_rows(source):
        if isinstance(row, Example):
            rows.append(_checked(row, place, labels, names))
        elif isinstance(row, Mapping):
            rows.append(_example(row, place, labels, names))
        else:
            raise place.error(f"expected an object with fields, got {type(row).__name__}")
    if not rows:
        raise DataError("holds no rows", path=_shown(source))
    return rows


def read_texts(texts: Sequence[str]) -> list[Example]:
    """Texts to foretell the labels of; any of them may be empty.

    Raises:
        DataError: one is no text, or there is one and no list of them.
    """
    if isinstance(texts, str):
        raise DataError("expected a list of texts, got one text", path="texts")
    rows = []
    for number, text in enumerate(texts, 1):
        place = _Place("the texts given", number)
        if not isinstance(text, str):
            raise place.error(f"expected text, got {type(text).__name__}")
        rows.append(Example(_whole(text, place), None, None))
    return rows


def find_labels(paths: Iterable[Path], field: str = "label") -> list[str]:
    """The distinct labels of some files, sorted; whole numbers count as their digits.

    Raises:
        DataError: a row has no label.
    """
    found: set[str] = set()
    for path in paths:
        for place, row in _raw_rows(path):
            label = row.get(field) if isinstance(row, Mapping) else None
            if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
                raise place.error("expected a label (text or whole number)", field)
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


def check_source(source: object) -> None:
    """Look whether there is something to read at all, before anything else is done.

    Raises:
        DataError: no file that can be read, of a kind that is, and no rows either.
    """
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
            kind = type(source).__name__
            raise DataError(f"expected a file, or rows that are mappings, got {kind}", path="data")
        return
    path = Path(source)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"expected a {', '.join(SUFFIXES)} file", path=str(path))
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=str(path)) from error


def _raw_rows(source: str | Path | Iterable[object]) -> Iterator[tuple[_Place, object]]:
    check_source(source)
    if not isinstance(source, str | Path):
        for number, row in enumerate(source, 1):
            yield _Place("the rows given", number), row
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


def _json_rows(path: Path, text: str) -> Iterator[tuple[_Place, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = _Place(str(path), number)
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise place.error(f"is not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:  # a number of thousands of digits
            raise place.error(f"is not JSON: {error}") from None
        except RecursionError:
            raise place.error("is nested too deeply") from None


def _table_rows(path: Path, text: str) -> Iterator[tuple[_Place, object]]:
    # The lines of csv end with a line feed or carriage return alone, and not with U+2028 and such.
    lines = io.StringIO(text, newline="")
    # Tab-separated corpora (GLUE's among them) hold bare quotes that quote nothing.
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    try:
        rows = _all_rows(reader, len(text))
    except csv.Error as error:
        raise DataError(f"is malformed: {error}", path=str(path), line=reader.line_num) from None
    header: list[str] | None = None
    for line, row in rows:
        place = _Place(str(path), line)
        if header is None:
            header = row
            if twice := sorted({name for name in row if row.count(name) > 1}):
                raise place.error(f"the header names {_listed(twice)} twice")
        elif len(row) != len(header):
            raise place.error(f"expected {len(header)} columns, got {len(row)}")
        else:
            yield place, dict(zip(header, row, strict=True))


def _all_rows(reader: Any, characters_max: int) -> list[tuple[int, list[str]]]:
    """Rows that are not empty, with the line that each ends on; fields of any length."""
    with _CSV_LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, characters_max))
        try:
            return [(reader.line_num, row) for row in reader if row]
        finally:
            csv.field_size_limit(before)


def _example(
    row: Mapping[str, object], place: _Place, labels: Sequence[str] | None, names: FieldNames
) -> Example:
    text = _text(row, place, names.text)
    if text is None:
        raise _absent(row, place, names.text)
    pair = _text(row, place, names.text_pair)
    label = None if labels is None else _label(row, place, labels, names.label)
    return Example(text, pair, label)


def _checked(
    row: Example, place: _Place, labels: Sequence[str] | None, names: FieldNames
) -> Example:
    """The Example that an app has made, which may be wrong as any row may."""
    if _text({names.text: row.text}, place, names.text) is None:
        raise place.error("is null", names.text)
    _text({names.text_pair: row.text_pair}, place, names.text_pair)
    if labels is not None and not (row.label is not None and 0 <= row.label < len(labels)):
        raise place.error(f"{row.label} is not an index of the {len(labels)} labels", names.label)
    return row


def _absent(row: Mapping[str, object], place: _Place, name: str) -> DataError:
    if name in row:
        return place.error("is null", name)
    return place.error(f"is missing; the row has {_listed(sorted(map(str, row)))}", name)


def _text(row: Mapping[str, object], place: _Place, name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise place.error(f"expected text, got {type(value).__name__}", name)
    if not value.strip():
        raise place.error("is empty", name)
    return _whole(value, place, name)


def _whole(text: str, place: _Place, name: str | None = None) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise place.error("holds half of a character (a lone surrogate)", name) from None
    return text


def _label(row: Mapping[str, object], place: _Place, labels: Sequence[str], name: str) -> int:
    """The index of a row's label: given by its name or, where no name is a number, as the index."""
    value = row.get(name)
    if value is None:
        raise _absent(row, place, name)
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    text = str(value) if whole or isinstance(value, str) else ""
    if text in labels:
        return labels.index(text)
    is_index = text.isdecimal() and len(text) < _DIGITS_MAX
    if is_index and not any(map(str.isdecimal, labels)) and int(text) < len(labels):
        return int(text)
    raise place.error(f"{value!r} is not a label of the task: {_listed(labels)}", name)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_LABELS_SHOWN]))
    return shown + (f" and {len(names) - _LABELS_SHOWN} more" if len(names) > _LABELS_SHOWN else "")


def _shown(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the rows given"
