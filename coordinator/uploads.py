"""Updates on their way in, resumed where they stopped, also by another process than the first.

An update that comes in one go is written once, as a report. Of a larger one every FLUSH_BYTES go
to the store on the way, and what has come of any goes there when its connection breaks: so memory
holds only what is being sent now. The digest is checked at the end, over what was stored and what
was sent.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

from coordinator.blocking import StoreCalls
from coordinator.errors import StoreError
from coordinator.store.base import PartialUpdate, Store
from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.link import LinkClosedError
from protocol.messages import Chunk, Report
from protocol.tensors import NamedTensors
from protocol.transfer import Receiver

log = logging.getLogger("pf2lora.coordinator")

FLUSH_BYTES: Final = 4 * limits.MIB


class Upload:
    """One update under way over one connection."""

    def __init__(self, assignment: str, receiver: Receiver, uploads: Uploads) -> None:
        self._assignment = assignment
        self._receiver = receiver
        self._uploads = uploads
        self._stored_bytes = receiver.offset
        self._is_over = False

    @property
    def offset(self) -> int:
        """How many bytes have come."""
        return self._receiver.offset

    async def accept(self, chunk: Chunk) -> None:
        """Take the next chunk.

        Raises:
            RemoteProtocolError: it cannot be the next.
            LinkClosedError: the device sends this update over a newer connection.
        """
        if self._is_over:
            raise LinkClosedError("this update comes over a newer connection")
        self._receiver.accept(chunk)
        if not chunk.last and self.offset - self._stored_bytes >= FLUSH_BYTES:
            await self._store()

    async def tensors(self) -> NamedTensors:
        """The whole update.

        Raises:
            RemoteProtocolError: its bytes are not those that the digest names; it begins anew.
        """
        try:
            update = self._receiver.tensors()
        except RemoteProtocolError:
            await self._uploads.forget(self._assignment)
            raise
        finally:
            self._is_over = True
        return update

    async def interrupt(self) -> None:
        """Nothing more comes over this connection: put what has come on the disk."""
        if not self._is_over:
            self._is_over = True
            await self._store()

    async def _store(self) -> None:
        begin, self._stored_bytes = self._stored_bytes, self.offset
        if begin < self._stored_bytes:
            part = self._receiver.received(begin)
            digest = self._receiver.payload.digest
            try:
                await self._uploads.keep(PartialUpdate(self._assignment, digest, begin, part))
            except StoreError as error:  # whether the daemon must end is for reports to find
                raise ConnectionError(str(error)) from error


class Uploads:
    """All updates under way in one federation."""

    def __init__(self, store: Store, call: StoreCalls) -> None:
        self._store = store
        self._call = call
        self._under_way: dict[str, Upload] = {}
        self._stored: set[str] = set()  # assignments; only for these is the store asked

    async def open(self) -> None:
        """Learn which updates had come in part when the last process ended."""
        self._stored = set(await self._call(self._store.partial_updates))

    @contextlib.asynccontextmanager
    async def resumed(self, report: Report) -> AsyncIterator[Upload]:
        """The update of a report, with what has come of it before."""
        assignment = report.assignment
        older = self._under_way.get(assignment)
        if older is not None:
            await older.interrupt()
        receiver = Receiver(report.payload)
        if assignment in self._stored:
            await self._call(self._restore, receiver, assignment)
        upload = self._under_way[assignment] = Upload(assignment, receiver, self)
        try:
            yield upload
        finally:
            if self._under_way.get(assignment) is upload:
                del self._under_way[assignment]
            await upload.interrupt()

    async def keep(self, part: PartialUpdate) -> None:
        """Put a part of an update on the disk."""
        self._stored.add(part.assignment)
        await self._call(self._store.keep_part, part)
        log.info("%d bytes of an update are on disk", part.begin + len(part.data))

    async def forget(self, assignment: str) -> None:
        """Nothing of this update is wanted any more."""
        if assignment in self._stored:
            self._stored.discard(assignment)
            await self._call(self._store.drop_parts, assignment)

    def only(self, awaited: set[str]) -> None:
        """Only these are awaited still; the parts of the others have gone with their round."""
        self._stored &= awaited

    def _restore(self, federation: str, receiver: Receiver, assignment: str) -> None:
        digest = receiver.payload.digest
        for data in self._store.parts(federation, assignment, digest):
            receiver.restore(data)
