"""How a command of either side ends, whatever becomes of its output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command; its exit code, or 130 if Ctrl-C ended it.

    Nobody need be there to read: output may be closed, or its reader gone before the end.
    """
    try:
        exit_code = run()
        if sys.stdout is not None:  # as where it was closed, with `>&-`
            sys.stdout.flush()
        return exit_code
    except BrokenPipeError:  # as under `| head`; nothing is left to be flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def let_go_of_log() -> None:
    """Python flushes what is left when it ends, and would exit with 120 if nobody reads it."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except BrokenPipeError:  # as under `2>&1 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
