"""Faults of the device's side.

EdgeClientError
├── ConfigurationError      an argument is wrong: the field, what was wrong, what would be right
├── DataError               a row is: file, line, field
├── BackboneError           the backbone, or what it was compiled to, cannot be used: what was tried
├── AdapterError            the adapter does not fit the model: the layer, or what there is
├── StateError              the private state is damaged, in use, or another federation's
├── StorageFullError        it could not be written; what was there before is intact
├── DivergedError           training gave numbers that are none; the state is what it was
├── MissingExtraError       a package is not installed: the extra that brings it
├── RefusedError            the coordinator will not have this device, and trying again is no use
└── UnreachableError        no coordinator answered for as long as patience lasted
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class EdgeClientError(Exception):
    """Base of what the SDK raises on purpose."""


class ConfigurationError(EdgeClientError):
    """An argument that cannot be used."""

    def __init__(self, field: str, problem: str, right: str = "") -> None:
        super().__init__(f"{field}: {problem}" + (f"; use {right}" if right else ""))
        self.field = field


class DataError(EdgeClientError):
    """A row or file of training data that cannot be used."""

    def __init__(
        self, problem: str, *, path: str = "", line: int | None = None, field: str | None = None
    ) -> None:
        where = [path] if path else []
        where += [f"line {line}"] if line is not None else []
        where += [f'field "{field}"'] if field is not None else []
        super().__init__(": ".join(filter(None, [", ".join(where), problem])))
        self.path, self.line, self.field = path, line, field


class BackboneError(EdgeClientError):
    """No backbone to train: not found, damaged, another, or held as it cannot be; says why."""


class AdapterError(EdgeClientError, ValueError):
    """The adapter does not fit the model; the text names the layer or what there is to choose."""


class StateError(EdgeClientError):
    """The state folder cannot be used as it is."""


class StorageFullError(EdgeClientError):
    """The state could not be written; the one before it is intact."""


class DivergedError(EdgeClientError):
    """A round's training ended in numbers that are not finite; nothing of it is kept."""

    def __init__(self, round_number: int, loss: float) -> None:
        super().__init__(
            f"round {round_number}: training diverged (loss {loss:g}), and nothing of it is kept; "
            "the federation needs a smaller training.learning_rate, or training.clip_norm"
        )


class MissingExtraError(EdgeClientError):
    """A package that this function needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: pip install '.[{extra}]' in pf2lora's folder"
        )


@contextlib.contextmanager
def importing(extra: str) -> Iterator[None]:
    """Around imports of what an extra brings.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), extra) from error


class RefusedError(EdgeClientError):
    """The coordinator refused this device for a reason that stays."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"refused ({code}): {reason}")
        self.code = code


class UnreachableError(EdgeClientError):
    """No session could be held for as long as patience lasted."""

    def __init__(self, cause: str, attempts: int) -> None:
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        super().__init__(f"no coordinator could be reached in {tries}: {cause}")
        self.attempts = attempts
