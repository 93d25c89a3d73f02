"""Connections, counted from their first packet on: also while they shake hands for TLS.

asyncio tells a server's protocol of a connection once TLS's handshake is done. Until then it has a
descriptor and its buffers, and whoever says nothing keeps them for as long as a handshake may take.
So TLS is a server's own protocol here, counted as one without TLS is.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import socket
import ssl
from typing import Any, Final, cast

from protocol import limits

# asyncio gives each TLS connection a buffer of 256 KiB for its whole life.
TLS_BUFFER_BYTES: Final = 32 * limits.KIB
# What the kernel holds of a connection's bytes, and how many of them are not yet on their way: few,
# so that pings and their answers are not stuck behind minutes of download over a slow link.
KERNEL_SEND_BYTES: Final = 512 * limits.KIB
KERNEL_UNSENT_BYTES: Final = 64 * limits.KIB


class Headcount:
    """How many connections are open, and whether one more may be."""

    def __init__(self, most: int) -> None:
        self.open = 0
        self._most = most

    def come(self) -> bool:
        """One more; False if it is one too many."""
        self.open += 1
        return self.open <= self._most

    def gone(self) -> None:
        """One less."""
        self.open -= 1


class Counted(asyncio.BaseProtocol):
    """A protocol that counts its connection, and drops it if it is one too many.

    It comes first among the bases of what the system's own connection is told to.
    """

    def __init__(self, headcount: Headcount, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._headcount = headcount

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        has_room = self._headcount.come()
        kernel_socket = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # macOS refuses it of one that is gone already
            kernel_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_SEND_BYTES)
            unsent = socket.TCP_NOTSENT_LOWAT, KERNEL_UNSENT_BYTES
            kernel_socket.setsockopt(socket.IPPROTO_TCP, *unsent)
        if not has_room:
            cast(asyncio.Transport, transport).abort()

    def connection_lost(self, exc: Any) -> None:
        self._headcount.gone()
        super().connection_lost(exc)


class CountedTls(Counted, asyncio.sslproto.SSLProtocol):
    """TLS in front of a protocol, which hears of those alone that have shaken hands in time."""

    max_size = TLS_BUFFER_BYTES

    def __init__(
        self,
        headcount: Headcount,
        protocol: asyncio.Protocol,
        context: ssl.SSLContext,
        *,
        handshake_timeout_s: float,
        shutdown_timeout_s: float,
    ) -> None:
        super().__init__(
            headcount,
            asyncio.get_running_loop(),
            protocol,
            context,
            None,  # nobody waits for the handshake's end
            server_side=True,
            ssl_handshake_timeout=handshake_timeout_s,
            ssl_shutdown_timeout=shutdown_timeout_s,
        )
