"""A device's rows: from jsonl, csv or tsv files, lists of mappings, or `datasets` data sets.

A classification row has a text, a label, and where the task has pairs a second text. A row of a
causal LM has a text and no label; a second text is what follows the first, and alone carries loss.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_client.errors import DataError

SUFFIXES: Final = (".jsonl", ".csv", ".tsv")
_LABELS_SHOWN: Final = 12


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
            rows.append(row)
        elif isinstance(row, Mapping):
            rows.append(_example(row, place, labels, names))
        else:
            raise place.error(f"expected an object with fields, got {type(row).__name__}")
    if not rows:
        raise DataError("holds no rows", path=_shown(source))
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
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise DataError(f"holds no {', '.join(SUFFIXES)} file", path=str(folder))
    return files


def _raw_rows(source: str | Path | Iterable[object]) -> Iterator[tuple[_Place, object]]:
    if not isinstance(source, str | Path):
        for number, row in enumerate(source, 1):
            yield _Place("the rows given", number), row
        return
    path = Path(source)
    readers = {".jsonl": _json_rows, ".csv": _table_rows, ".tsv": _table_rows}
    if path.suffix not in readers:
        raise DataError(f"expected a {', '.join(SUFFIXES)} file", path=str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=str(path)) from error
    yield from readers[path.suffix](path, _decoded(data, path))


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
        except RecursionError:
            raise place.error("is nested too deeply") from None


def _table_rows(path: Path, text: str) -> Iterator[tuple[_Place, object]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # Tab-separated corpora (GLUE's among them) hold bare quotes that quote nothing.
    lines = text.splitlines(keepends=True)
    if path.suffix == ".tsv":
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in reader:
            place = _Place(str(path), reader.line_num)
            if header is None:
                header = row
            elif row:
                if len(row) != len(header):
                    raise place.error(f"expected {len(header)} columns, got {len(row)}")
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"is malformed: {error}", path=str(path), line=reader.line_num) from None


def _example(
    row: Mapping[str, object], place: _Place, labels: Sequence[str] | None, names: FieldNames
) -> Example:
    text = _text(row, place, names.text)
    if text is None:
        raise place.error(f"is missing; the row has {_listed(sorted(map(str, row)))}", names.text)
    pair = _text(row, place, names.text_pair)
    label = None if labels is None else _label(row, place, labels, names.label)
    return Example(text, pair, label)


def _text(row: Mapping[str, object], place: _Place, name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise place.error(f"expected text, got {type(value).__name__}", name)
    if not value.strip():
        raise place.error("is empty", name)
    return value


def _label(row: Mapping[str, object], place: _Place, labels: Sequence[str], name: str) -> int:
    value = row.get(name)
    if value is None:
        raise place.error(f"is missing; the row has {_listed(sorted(map(str, row)))}", name)
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    index = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(labels):
        return index
    raise place.error(f"{value!r} is not a label of the task: {_listed(labels)}", name)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_LABELS_SHOWN]))
    return shown + (f" and {len(names) - _LABELS_SHOWN} more" if len(names) > _LABELS_SHOWN else "")


def _shown(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the rows given"
