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


def check_told(tell_accuracy: object, progress: object) -> None:
    """Whether the coordinator is told more, and who is told how a run goes.

    Raises:
        ConfigurationError: "no" and 0 are not False; or nobody can be called.
    """
    if not isinstance(tell_accuracy, bool):
        raise ConfigurationError("tell_accuracy", f"is {tell_accuracy!r}", "True or False")
    if not callable(progress):
        problem = f"{progress!r} cannot be called"
        raise ConfigurationError("progress", problem, "a function that takes a line of text")
