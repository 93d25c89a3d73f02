"""What carries a connection's bytes: the narrow door between a session and the network.

A WebSocket in production, an in-memory pair with faults in tests. One `send` is one `receive`.
"""

from __future__ import annotations

import ipaddress
from typing import Protocol


def is_loopback(host: str) -> bool:
    """Whether this host name or address is this machine's own, that no other can connect to."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authority(host: str, port: int) -> str:
    """Both as a URL has them, where an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class LinkClosedError(ConnectionError):
    """The link is gone; what was sent last may or may not have arrived."""


class Link(Protocol):
    """Ordered delivery of whole messages while it lasts."""

    @property
    def channel(self) -> bytes:
        """Names the coordinator's certificate (signing.channel_of); empty without TLS.

        Each end says what it knows by itself: where the two differ, someone is in between.
        """

    async def send(self, data: bytes) -> None:
        """Hand over one message; waits while the other side is slow.

        Raises:
            LinkClosedError: the link is gone.
        """

    async def receive(self) -> bytes:
        """The next message.

        Raises:
            LinkClosedError: the link is gone.
        """

    async def close(self) -> None:
        """End the link; never raises."""
