"""What an app gives, looked at before anything is done with it."""

from __future__ import annotations

import operator
import os
from typing import SupportsIndex

from edge_client.errors import ConfigurationError


def named(field: str, given: object, right: str) -> str:
    """A path or a name, as text; an empty one is what a variable gives that was never set.

    Raises:
        ConfigurationError: it is none.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else ""
    if isinstance(text, str) and text and "\0" not in text:
        return text
    raise ConfigurationError(field, f"is {given!r}", right)


def counted(field: str, given: SupportsIndex) -> int:
    """A whole number of at least 1.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        number = operator.index(given)
    except TypeError:
        number = 0
    if number >= 1:
        return number
    raise ConfigurationError(field, f"is {given!r}", "a whole number from 1 on")
