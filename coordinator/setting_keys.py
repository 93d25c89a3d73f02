"""The dotted keys of `federation.toml`, as the dataclasses of its sections declare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from protocol import limits
from protocol.scalars import Kind, Text
from protocol.schema import Maybe, Record, Tagged


@dataclass(frozen=True, slots=True)
class SettingKey:
    """A single setting.

    `owner` is the method or rule whose setting it is, where not every federation has it; another's
    may have the same key. `names` are what a method or rule may be called, where that is the
    setting. A `default` of MISSING must be given.
    """

    key: str
    kind: Kind
    owner: str
    default: Any
    names: tuple[str, ...] = ()


def setting_keys(prefix: str, record: Record, owner: str = "") -> Iterator[SettingKey]:
    """Every single setting of a section, and of those within it."""
    kinds = dict(record.kinds)
    for field in fields(record.cls):
        key = f"{prefix}.{field.name}" if prefix else field.name
        kind = kinds[field.name]
        if isinstance(kind, Maybe):
            kind = kind.kind
        if isinstance(kind, Record):
            yield from setting_keys(key, kind, owner)
        elif isinstance(kind, Tagged):
            assert field.default_factory is not MISSING  # noqa: S101 - each has one
            names = tuple(name for name, _ in kind.records)
            default = field.default_factory().NAME
            yield SettingKey(f"{key}.name", Text(limits.NAME_BYTES_MAX), "", default, names)
            for name, option in kind.records:
                yield from setting_keys(key, option, name)
        else:
            yield SettingKey(key, kind, owner, field.default)
