"""Kinds of values, declared on dataclass fields with `Annotated` and checked in both directions.

One declaration serves the wire (codec.py) and the configuration file (coordinator/config.py):
`rank: Annotated[int, Integer(1, RANK_MAX)]` bounds the field wherever it comes from.

A kind turns a Python value into msgpack's plain types (`encode`) and back (`decode`). Both check,
and both raise `SchemaError` with the path of the field, what was wrong and what would be right.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from protocol.scalars import Checked, Flag, Integer, Kind, Real, SchemaError, Text, shown


@dataclass(frozen=True, slots=True)
class Items:
    """How many items a tuple may have: `Annotated[tuple[X, ...], Items(8)]`."""

    count_max: int
    count_min: int = 0


@dataclass(frozen=True, slots=True)
class _Many:
    item: Kind
    size: Items

    def encode(self, value: Any, path: str) -> list[Any]:
        return [
            self.item.encode(one, f"{path}[{i}]") for i, one in enumerate(self._sized(value, path))
        ]

    def decode(self, plain: Any, path: str) -> tuple[Any, ...]:
        items = self._sized(plain, path)
        return tuple(self.item.decode(one, f"{path}[{i}]") for i, one in enumerate(items))

    def _sized(self, value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            raise SchemaError(path, f"expected a list, got {shown(value)}")
        if not self.size.count_min <= len(value) <= self.size.count_max:
            raise SchemaError(
                path,
                f"expected {self.size.count_min} to {self.size.count_max} items, got {len(value)}",
            )
        return value


@dataclass(frozen=True, slots=True)
class Choice:
    """One of an enum's members, each by its value."""

    enum: type[Enum]

    def encode(self, value: Any, path: str) -> Any:
        if not isinstance(value, self.enum):
            raise SchemaError(path, f"expected a {self.enum.__name__}, got {shown(value)}")
        return value.value

    def decode(self, plain: Any, path: str) -> Enum:
        for member in self.enum:
            if type(plain) is type(member.value) and plain == member.value:
                return member
        choices = ", ".join(repr(member.value) for member in self.enum)
        raise SchemaError(path, f"expected one of {choices}, got {shown(plain)}")


@dataclass(frozen=True, slots=True)
class _TextOrMany:
    """One text or a list of them, told apart by type (PEFT's `target_modules`)."""

    text: Text
    many: _Many

    def encode(self, value: Any, path: str) -> Any:
        return (self.text if isinstance(value, str) else self.many).encode(value, path)

    def decode(self, plain: Any, path: str) -> Any:
        return (self.text if isinstance(plain, str) else self.many).decode(plain, path)


@dataclass(frozen=True, slots=True)
class Maybe:
    """A kind, or nothing: `X | None`. What is left out of a table is nothing."""

    kind: Kind

    def encode(self, value: Any, path: str) -> Any:
        return None if value is None else self.kind.encode(value, path)

    def decode(self, plain: Any, path: str) -> Any:
        return None if plain is None else self.kind.decode(plain, path)


@dataclass(frozen=True, slots=True)
class Record:
    """A dataclass, as the array of its fields in order."""

    cls: type[Any]
    kinds: tuple[tuple[str, Kind], ...]

    def encode(self, value: Any, path: str) -> list[Any]:
        if type(value) is not self.cls:
            raise SchemaError(path, f"expected a {self.cls.__name__}, got {shown(value)}")
        return [kind.encode(getattr(value, name), f"{path}.{name}") for name, kind in self.kinds]

    def decode(self, plain: Any, path: str) -> Any:
        if not isinstance(plain, list) or len(plain) != len(self.kinds):
            raise SchemaError(path, f"expected an array of {len(self.kinds)} fields")
        values = [
            kind.decode(one, f"{path}.{name}")
            for (name, kind), one in zip(self.kinds, plain, strict=True)
        ]
        return self.build(path, *values)

    def build(self, path: str, *values: Any) -> Any:
        """The dataclass from checked values; its own `__post_init__` may still object."""
        try:
            return self.cls(*values)
        except SchemaError as error:
            raise SchemaError(_joined(path, error.path), error.problem) from None

    def from_mapping(self, table: Mapping[str, Any], path: str) -> Any:
        """The dataclass from a table of names (a TOML section); missing names take defaults."""
        if not isinstance(table, Mapping):
            raise SchemaError(path, f"expected a table, got {shown(table)}")
        known = dict(self.kinds)
        for name in table:
            if name not in known:
                raise SchemaError(_joined(path, name), unknown_name(name, known))
        values = []
        for field in fields(self.cls):
            where = _joined(path, field.name)
            if field.name in table:
                values.append(_from_plain(known[field.name], table[field.name], where))
            elif field.default is not MISSING:
                values.append(field.default)
            elif field.default_factory is not MISSING:
                values.append(field.default_factory())
            elif isinstance(known[field.name], Maybe):
                values.append(None)
            else:
                raise SchemaError(where, "is missing")
        return self.build(path, *values)

    def to_mapping(self, value: Any) -> dict[str, Any]:
        """What `from_mapping` makes the same dataclass from, also once it has more fields."""
        return {name: _to_plain(kind, getattr(value, name), name) for name, kind in self.kinds}


@dataclass(frozen=True, slots=True)
class Tagged:
    """One of several dataclasses, each told by its `NAME`: `[NAME, fields]`."""

    records: tuple[tuple[str, Record], ...]

    def encode(self, value: Any, path: str) -> list[Any]:
        for name, record in self.records:
            if type(value) is record.cls:
                return [name, record.encode(value, path)]
        raise SchemaError(path, f"expected {self._names()}, got {shown(value)}")

    def decode(self, plain: Any, path: str) -> Any:
        if not isinstance(plain, list) or len(plain) != 2:
            raise SchemaError(path, "expected an array of a name and its fields")
        return self._record(plain[0], path).decode(plain[1], path)

    def from_mapping(self, table: Mapping[str, Any], path: str) -> Any:
        """The dataclass that the table's `name` tells, from its other entries."""
        if not isinstance(table, Mapping):
            raise SchemaError(path, f"expected a table, got {shown(table)}")
        where = _joined(path, "name")
        if "name" not in table:
            raise SchemaError(where, f"is missing; expected {self._names()}")
        rest = {key: value for key, value in table.items() if key != "name"}
        record = self._record(table["name"], where)
        own = dict(record.kinds)
        for key in rest:
            if key not in own and any(key in dict(other.kinds) for _, other in self.records):
                has = ", ".join(own) or "no settings"
                problem = f"is no setting of {table['name']!r}, which has {has}"
                raise SchemaError(_joined(path, key), problem)
        return record.from_mapping(rest, path)

    def to_mapping(self, value: Any) -> dict[str, Any]:
        """What `from_mapping` makes the same dataclass from."""
        name = type(value).NAME
        return {"name": name, **self._record(name, "").to_mapping(value)}

    def _record(self, name: Any, path: str) -> Record:
        for known, record in self.records:
            if name == known:
                return record
        raise SchemaError(path, f"expected {self._names()}, got {shown(name)}")

    def _names(self) -> str:
        return "one of " + ", ".join(repr(name) for name, _ in self.records)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def unknown_name(name: str, known: typing.Iterable[str]) -> str:
    """The complaint about a name that nothing has, with the nearest name that something has."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return "is unknown" + (f"; did you mean {near[0]!r}?" if near else "")


def _to_plain(kind: Kind, value: Any, path: str) -> Any:
    if isinstance(kind, Maybe):
        return None if value is None else _to_plain(kind.kind, value, path)
    if isinstance(kind, Record | Tagged):
        return kind.to_mapping(value)
    return kind.encode(value, path)


def _from_plain(kind: Kind, value: Any, path: str) -> Any:
    if isinstance(kind, Maybe):
        return None if value is None else _from_plain(kind.kind, value, path)
    if isinstance(kind, Record | Tagged):
        return kind.from_mapping(value, path)
    return kind.decode(value, path)


def from_text(kind: Kind, text: str, path: str) -> Any:
    """What a flag's or variable's text stands for, as TOML would have given it; lists have commas.

    Raises:
        SchemaError: the kind does not admit it.
    """
    plain = _plain_of(kind, text, path)
    kind.decode(plain, path)
    return plain


def _plain_of(kind: Kind, text: str, path: str) -> Any:
    match kind:
        case Integer() | Real():
            try:
                return int(text) if isinstance(kind, Integer) else float(text)
            except ValueError:
                whole = "whole " if isinstance(kind, Integer) else ""
                raise SchemaError(path, f"expected a {whole}number, got {shown(text)}") from None
        case Flag():
            return {"true": True, "false": False}.get(text.lower(), text)
        case _Many():
            parts = text.split(",") if text.strip() else []
            return [_plain_of(kind.item, part.strip(), path) for part in parts]
        case _TextOrMany() if "," in text:
            return _plain_of(kind.many, text, path)
    return text


@cache
def record_of(cls: type[Any]) -> Record:
    """The kind of a dataclass, from its annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return Record(cls, tuple((f.name, kind_of(hints[f.name])) for f in fields(cls)))


def kind_of(annotation: Any) -> Kind:
    """The kind that an annotation declares.

    Raises:
        TypeError: the annotation declares none, which is a mistake in a message's definition.
    """
    marks: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *rest = typing.get_args(annotation)
        marks = tuple(rest)
    for mark in marks:
        if isinstance(mark, Checked):
            return mark
    if annotation is bool:
        return Flag()
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Choice(annotation)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return record_of(annotation)
    origin = typing.get_origin(annotation)
    if origin is tuple:
        size = next(mark for mark in marks if isinstance(mark, Items))
        return _Many(kind_of(typing.get_args(annotation)[0]), size)
    if origin in (typing.Union, types.UnionType):
        return _union_kind(typing.get_args(annotation))
    raise TypeError(f"no kind is declared by {annotation!r}")


def _union_kind(options: tuple[Any, ...]) -> Kind:
    if options[-1] is types.NoneType:
        (option,) = options[:-1]
        return Maybe(kind_of(option))
    if all(isinstance(option, type) and is_dataclass(option) for option in options):
        return Tagged(tuple((option.NAME, record_of(option)) for option in options))
    kinds = [kind_of(option) for option in options]
    text = next(kind for kind in kinds if isinstance(kind, Text))
    many = next(kind for kind in kinds if isinstance(kind, _Many))
    return _TextOrMany(text, many)
