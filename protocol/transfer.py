"""A large payload as chunks that can be resumed at any byte, and its digest checked at the end."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from protocol import limits
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.messages import Chunk
from protocol.tensors import Buffer, NamedTensors, Payload, specs_hasher


def chunks(
    buffer: Buffer, offset: int = 0, chunk_bytes: int = limits.CHUNK_BYTES_DEFAULT
) -> Iterator[Chunk]:
    """The buffer from `offset` on, in order; at least one chunk, and the last one says so.

    Raises:
        RemoteProtocolError: the other side asked to go on from beyond the end.
    """
    size = len(buffer)
    if offset > size:
        raise RemoteProtocolError(f"resume at byte {offset} of a payload of {size}")
    view = memoryview(buffer)
    while True:
        end = min(offset + chunk_bytes, size)
        yield Chunk(offset, end == size, view[offset:end])  # type: ignore[arg-type]
        offset = end
        if end == size:
            return


class Receiver:
    """Collects one payload's chunks. `offset` is where to go on after an interruption."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.offset = 0
        self._buffer = _pages(payload.size_bytes)
        self._hasher = specs_hasher(payload.tensors)

    def accept(self, chunk: Chunk) -> None:
        """Take the next chunk.

        Raises:
            RemoteProtocolError: it does not follow on, overruns the payload, is empty before the
                end, or says wrongly whether it is the last.
        """
        end = self.offset + len(chunk.data)
        if chunk.offset != self.offset:
            raise RemoteProtocolError(f"a chunk at {chunk.offset}, expected at {self.offset}")
        if end > self.payload.size_bytes or chunk.last != (end == self.payload.size_bytes):
            raise RemoteProtocolError(
                f"a chunk to byte {end} (last: {chunk.last}) of {self.payload.size_bytes}"
            )
        if not chunk.data and not chunk.last:
            raise RemoteProtocolError("an empty chunk before the end")
        self._take(chunk.data)

    def restore(self, data: Buffer) -> None:
        """Take what had come before and was put by; what does not fit is left out."""
        if self.offset + len(data) < self.payload.size_bytes:
            self._take(data)

    def received(self, begin: int) -> bytes:
        """What has come from byte `begin` on."""
        return bytes(self._buffer[begin : self.offset])

    def _take(self, data: Buffer) -> None:
        end = self.offset + len(data)
        self._buffer[self.offset : end] = data
        self._hasher.update(data)
        self.offset = end

    def tensors(self) -> NamedTensors:
        """The whole payload, once its last chunk has come.

        Raises:
            RemoteProtocolError: its bytes are not those that the digest names.
        """
        if self._hasher.digest() != self.payload.digest:
            self.__init__(self.payload)  # type: ignore[misc]  # nothing of it can be trusted
            raise RemoteProtocolError("the payload does not match its digest", ErrorCode.DIGEST)
        return NamedTensors(self.payload.tensors, self._buffer, self.payload.digest)


def _pages(size_bytes: int) -> memoryview:
    """Memory straight from the system, which gives it page by page as it is written to.

    So a promise of bytes costs none, and what an update had is free again when it goes: between
    smaller things in the heap it would leave holes, half as much again in a crowd.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, max(1, size_bytes), flags))[:size_bytes]
