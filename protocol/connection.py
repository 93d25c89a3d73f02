"""One connection's session, without I/O: who may say what when.

Both sides track the same state from the messages that pass. `send` gives the bytes of a message,
`receive` the message of some bytes; both refuse what the table below does not allow.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from protocol import codec, limits
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.messages import (
    Assignment,
    Challenge,
    CheckIn,
    Chunk,
    Fetch,
    Finished,
    Goodbye,
    Hello,
    Join,
    Joined,
    Message,
    Receipt,
    Refusal,
    Report,
    Resume,
    RetryWindow,
)


class Role(Enum):
    """The two ends of a connection."""

    DEVICE = auto()
    COORDINATOR = auto()

    @property
    def other(self) -> Role:
        return Role.COORDINATOR if self is Role.DEVICE else Role.DEVICE


class State(Enum):
    """Where the session stands; the same at both ends, but for messages in flight."""

    NEW = auto()
    GREETED = auto()
    CHALLENGING = auto()
    OPEN = auto()
    JOINING = auto()
    READY = auto()
    WAITING = auto()
    DOWNLOADING = auto()
    OFFERING = auto()
    UPLOADING = auto()
    CONFIRMING = auto()
    CLOSED = auto()


_DEVICE, _COORDINATOR = Role.DEVICE, Role.COORDINATOR

# (state, who speaks) -> what may be said -> the state after it. Chunks: the state after the last.
TABLE: Final[dict[tuple[State, Role], dict[type[Message], State]]] = {
    (State.NEW, _DEVICE): {Hello: State.GREETED},
    (State.GREETED, _COORDINATOR): {Hello: State.CHALLENGING},
    (State.CHALLENGING, _COORDINATOR): {Challenge: State.OPEN},
    (State.OPEN, _DEVICE): {Join: State.JOINING},
    (State.JOINING, _COORDINATOR): {Joined: State.READY},
    (State.READY, _DEVICE): {
        CheckIn: State.WAITING,
        Fetch: State.DOWNLOADING,
        Report: State.OFFERING,
    },
    (State.WAITING, _COORDINATOR): {
        Assignment: State.READY,
        RetryWindow: State.READY,
        Finished: State.READY,
    },
    (State.DOWNLOADING, _COORDINATOR): {Chunk: State.READY},
    (State.OFFERING, _COORDINATOR): {Resume: State.UPLOADING, Receipt: State.READY},
    (State.UPLOADING, _DEVICE): {Chunk: State.CONFIRMING},
    (State.CONFIRMING, _COORDINATOR): {Receipt: State.READY},
}


def default_hello(software: str) -> Hello:
    """The greeting of this version of the package."""
    return Hello(
        limits.PROTOCOL_VERSIONS, software, limits.MESSAGE_BYTES_MAX, limits.CHUNK_BYTES_DEFAULT
    )


class Connection:
    """The session of one connection, seen from `role`; `hello` is what this side says of itself."""

    def __init__(self, role: Role, hello: Hello) -> None:
        self.role = role
        self.state = State.NEW
        self._hello = hello
        self._peer: Hello | None = None

    @property
    def version(self) -> int:
        """The protocol version in force: the highest that both sides speak."""
        return max(set(self._hello.versions) & set(self._greeted().versions))

    @property
    def chunk_bytes(self) -> int:
        """The largest chunk that both sides take, in bytes."""
        return min(self._hello.chunk_bytes, self._greeted().chunk_bytes, limits.CHUNK_BYTES_MAX)

    def send(self, message: Message) -> bytes:
        """Bytes to put on the wire.

        Raises:
            LocalProtocolError: this may not be said now.
            RemoteProtocolError: the other side takes less than this conversation needs.
        """
        after = self._after(self.role, message)
        if after is None:
            raise LocalProtocolError(
                f"{type(message).__name__} may not be sent by {self.role.name} in {self.state.name}"
            )
        data = codec.encode(message)
        if self._peer is not None and len(data) > self._peer.message_bytes:
            raise RemoteProtocolError(
                f"a {type(message).__name__} of {len(data)} bytes; "
                f"the other side takes {self._peer.message_bytes}",
                ErrorCode.LIMIT,
            )
        self.state = after
        return data

    def receive(self, data: bytes) -> Message:
        """The message that came.

        Raises:
            RemoteProtocolError: the bytes are no message, or one that may not be said now.
        """
        message = codec.decode(data, self._hello.message_bytes)
        after = self._after(self.role.other, message)
        if after is None:
            raise RemoteProtocolError(
                f"{type(message).__name__} from {self.role.other.name} in {self.state.name}",
                ErrorCode.UNEXPECTED_MESSAGE,
            )
        if isinstance(message, Hello):
            self._check_versions(message)
            self._peer = message
        self.state = after
        return message

    def _after(self, speaker: Role, message: Message) -> State | None:
        if self.state is State.CLOSED:
            return None
        if isinstance(message, Goodbye | Refusal):
            return State.CLOSED
        after = TABLE.get((self.state, speaker), {}).get(type(message))
        if after is not None and isinstance(message, Chunk) and not message.last:
            return self.state
        return after

    def _greeted(self) -> Hello:
        if self._peer is None:
            raise LocalProtocolError("the other side has not said Hello yet")
        return self._peer

    def _check_versions(self, peer: Hello) -> None:
        if not set(peer.versions) & set(self._hello.versions):
            raise RemoteProtocolError(
                f"no common protocol version: {self.role.name.lower()} speaks "
                f"{_listed(self._hello)}, {self.role.other.name.lower()} speaks {_listed(peer)}",
                ErrorCode.VERSION,
            )


def _listed(hello: Hello) -> str:
    return ", ".join(map(str, hello.versions))
