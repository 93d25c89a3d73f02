"""Faults of this package.

    QuantizationError
    ├── BackboneError      the backbone was not found, is broken, or gives no gradient
    ├── ArtifactError      a compiled artifact is damaged, foreign or unsafe, or cannot be made
    ├── SchemeError        no such quantisation scheme, or nothing in the model to quantise
    └── MissingExtraError  a library of an optional extra is not installed

All of them are fatal: trying again without changing a name, a file or the installation fails alike.
"""

from __future__ import annotations

from typing import Final

_REASON_MAX: Final = 400  # characters of what a library says; some list every model they know


class QuantizationError(Exception):
    """Base of every fault this package raises."""


class BackboneError(QuantizationError):
    """The backbone cannot be found, read or trained through; the text says what was tried."""


class ArtifactError(QuantizationError):
    """A compiled artifact is refused, or cannot be compiled; the text names file and reason."""


class SchemeError(QuantizationError):
    """The quantisation scheme is unknown, or cannot be applied to this model."""


class MissingExtraError(QuantizationError, ImportError):
    """A library that an extra of this distribution brings is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed: pip install '.[{extra}]' in pf2lora's folder"
        )
        self.library = library
        self.extra = extra


def brief(error: Exception) -> str:
    """What a library says, less what it goes on to say."""
    first, _, more = str(error).strip().partition("\n")
    text = " ".join(f"{first} {more}".split()) if first.rstrip().endswith(":") else first
    return text if len(text) <= _REASON_MAX else f"{text[:_REASON_MAX]}..."
