"""What a service tells systemd: that it is ready, that it lives, that it is stopping.

sd_notify(3): datagrams to the socket named by NOTIFY_SOCKET. Without one all of it does nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
ALIVE: Final = "WATCHDOG=1"


class ServiceManager:
    """The manager that started this process, if it is one that wants to be told."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the zero byte of the abstract namespace.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._watchdog_s = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
        if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            self._watchdog_s = 0.0  # it is another process that is watched

    def tell(self, state: str) -> None:
        """Send one state."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), self._address)

    async def keep_alive(self) -> None:
        """Say that the event loop turns, twice in each period that was asked for."""
        while self._watchdog_s:
            self.tell(ALIVE)
            await asyncio.sleep(self._watchdog_s / 2)
