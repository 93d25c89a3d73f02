"""`[admin]`: where the admin port listens, and who may read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from coordinator.errors import ConfigurationError
from protocol import limits
from protocol.link import is_loopback
from protocol.scalars import Integer, Text

TOKEN_VARIABLE: Final = "PF2LORA_ADMIN_TOKEN"  # noqa: S105 - its name, not a token
TOKEN_BYTES_MIN: Final = 16


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """`[admin]`. Port 0 is the one after the server's, or any where that is any.

    Readers need the token, where there is one: the text of `token_file`, or of the variable
    PF2LORA_ADMIN_TOKEN. Off loopback there must be one.
    """

    enabled: bool = True
    host: Annotated[str, Text(255, 1)] = "127.0.0.1"
    port: Annotated[int, Integer(0, 65535)] = 0
    token_file: Annotated[str, Text(limits.TEXT_BYTES_MAX)] = ""


def port_after(server_port: int) -> int:
    """The admin port where none is set."""
    return 0 if server_port in (0, 65535) else server_port + 1


def read_token(settings: AdminSettings, from_environment: str) -> str:
    """The token that readers need; empty where they need none.

    Raises:
        ConfigurationError: it cannot be read or is short, or there is none where there must be.
    """
    token, source = from_environment, TOKEN_VARIABLE
    if settings.token_file:
        source = "admin.token_file"
        try:
            token = Path(settings.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or "is no text"
            raise ConfigurationError(source, f"{settings.token_file}: {problem}") from error
    if source == "admin.token_file" or token:
        is_sendable = token.isascii() and token.isprintable()  # of two lines a header takes neither
        if not is_sendable or len(token) < TOKEN_BYTES_MIN:
            raise ConfigurationError(
                source, f"holds no token: one line of at least {TOKEN_BYTES_MIN} ASCII characters"
            )
    elif settings.enabled and not is_loopback(settings.host):
        raise ConfigurationError(
            "admin.host",
            f"{settings.host} can be reached from other machines: "
            f"set admin.token_file or {TOKEN_VARIABLE}, or listen on 127.0.0.1",
        )
    return token
