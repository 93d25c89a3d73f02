"""How the commands of both sides are declared, and what `--help` says of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Takes no short forms of flags: the next release's could change what they mean."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(**options, formatter_class=layout, allow_abbrev=False)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Any], about: str
) -> CommandParser:
    """Add a command that says what it does in the list of all, and in its own help with the rest.

    Args:
        commands: what `add_subparsers` gave.
        run: what the parsed options have as `command`.
        about: a phrase, without a capital or a full stop.
    """
    command: CommandParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}."
    )
    command.set_defaults(command=run)
    return command
