"""Kinds of single values: text, numbers, true or false, bytes. schema.py makes others of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol


class SchemaError(ValueError):
    """A value that its declared kind does not admit."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class Kind(Protocol):
    """How one field looks on the wire, and what it may hold."""

    def encode(self, value: Any, path: str) -> Any: ...

    def decode(self, plain: Any, path: str) -> Any: ...


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Checked:
    """A kind whose plain form is the value itself."""

    def check(self, value: Any, path: str) -> Any:
        raise NotImplementedError

    def encode(self, value: Any, path: str) -> Any:
        return self.check(value, path)

    def decode(self, plain: Any, path: str) -> Any:
        return self.check(plain, path)


@dataclass(frozen=True, slots=True)
class Text(Checked):
    """UTF-8 text of at most `bytes_max` bytes, and of the form `pattern` where one is given."""

    bytes_max: int
    bytes_min: int = 0
    pattern: str | None = None

    def check(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise SchemaError(path, f"expected text, got {shown(value)}")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise SchemaError(path, "the text is not valid Unicode") from None
        if not self.bytes_min <= size <= self.bytes_max:
            raise SchemaError(
                path, f"expected {self.bytes_min} to {self.bytes_max} bytes of text, got {size}"
            )
        if self.pattern is not None and re.fullmatch(self.pattern, value) is None:
            raise SchemaError(path, f"{shown(value)} does not match {self.pattern}")
        return value


@dataclass(frozen=True, slots=True)
class Integer(Checked):
    """A whole number in [low, high]."""

    low: int
    high: int

    def check(self, value: Any, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise SchemaError(path, f"expected a whole number, got {shown(value)}")
        if not self.low <= value <= self.high:
            raise SchemaError(path, f"expected {self.low} to {self.high}, got {value}")
        return value


@dataclass(frozen=True, slots=True)
class Real(Checked):
    """A finite number in [low, high]; a whole number is taken as one."""

    low: float = -math.inf
    high: float = math.inf

    def check(self, value: Any, path: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise SchemaError(path, f"expected a number, got {shown(value)}")
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf if value > 0 else -math.inf
        if not math.isfinite(number) or not self.low <= number <= self.high:
            raise SchemaError(path, f"expected {self.low:g} to {self.high:g}, got {number:g}")
        return number


@dataclass(frozen=True, slots=True)
class Flag(Checked):
    """true or false."""

    def check(self, value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            raise SchemaError(path, f"expected true or false, got {shown(value)}")
        return value


@dataclass(frozen=True, slots=True)
class Blob(Checked):
    """Between `bytes_min` and `bytes_max` bytes."""

    bytes_max: int
    bytes_min: int = 0

    def check(self, value: Any, path: str) -> bytes:
        if not isinstance(value, bytes | memoryview):
            raise SchemaError(path, f"expected bytes, got {shown(value)}")
        size = len(value)
        if not self.bytes_min <= size <= self.bytes_max:
            raise SchemaError(path, f"expected {self.bytes_min} to {self.bytes_max} bytes: {size}")
        return value  # type: ignore[return-value]  # a view is packed as bytes, without a copy
