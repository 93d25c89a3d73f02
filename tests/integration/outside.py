"""A coordinator that listens over TLS, as those outside meet it."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator import config
from coordinator.certificates import Authority
from coordinator.server import CoordinatorServer
from coordinator.store.devices import DeviceRecord, DeviceStatus, DeviceStore
from edge_client.identity import Identity
from edge_client.tls import TlsFiles
from edge_client.transport import websocket_dial
from tests.integration.daemon import write_federation
from tests.simulation.raw_device import RawDevice

SERVER = """
certificate = "server.pem"
key = "server.key"
"""
GOOD, BAD = Identity.named("good"), Identity.named("bad")


def written(folder: Path) -> Path:
    """The files of one: certificates of an authority of its own, and a federation."""
    Authority(folder).issue_server(["127.0.0.1"], 1.0)
    return write_federation(folder, server=SERVER, count=2, cohort=1)


@dataclass
class Outside:
    """A running coordinator as it is seen from outside, and what its store says of devices."""

    folder: Path
    server: CoordinatorServer
    devices: DeviceStore

    async def dial(self, identity: Identity) -> RawDevice:
        address = f"wss://127.0.0.1:{self.server.port}"
        link = await websocket_dial(address, TlsFiles(self.folder / "ca.pem"))()
        return RawDevice(link, identity)

    def refusals(self) -> dict[str, float]:
        """As they are counted for those who watch."""
        text = self.server.watch._metrics.render().decode()
        found = re.findall(r'pf2lora_refusals_total\{code="(\w+)"\} (\S+)', text)
        return {code: float(count) for code, count in found}

    def approve(self, identity: Identity, status: DeviceStatus = DeviceStatus.APPROVED) -> None:
        record = DeviceRecord(identity.device, identity.key, status, time.time(), reason="lost")
        self.devices.add(record)


@asynccontextmanager
async def opened(folder: Path, **flags: str) -> AsyncIterator[Outside]:
    """A coordinator over TLS; `flags` are of `[server]`."""
    path = written(folder)
    keys = {f"server.{key}": value for key, value in {"port": "0", **flags}.items()}
    async with CoordinatorServer(config.load(path, keys, {})) as server:
        yield Outside(folder, server, server._store.devices)
