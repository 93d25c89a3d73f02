"""The messages, a closed union: one frozen dataclass each, with its code on the wire.

A session from the device's side (connection.py holds who may say what when):

    Hello ->            <- Hello                versions and limits, both ways
                        <- Challenge            what the device must sign to prove its key
    Join ->             <- Joined               the federation's settings
    CheckIn ->          <- Assignment           train this base version; or
                        <- RetryWindow          come back later; or
                        <- Finished             no rounds are left: the final adapter
    Fetch ->            <- Chunk ...            the adapter's bytes, from an offset on
    Report ->           <- Resume               send the update from this offset on; or a Receipt
    Chunk ... ->        <- Receipt              kept, and on disk
    Goodbye             either side, any time; Refusal says why the session cannot go on
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar

from protocol import limits
from protocol.errors import ErrorCode
from protocol.federation import NAME_PATTERN, FederationSettings, Fingerprint, Name, Seconds
from protocol.scalars import Blob, Integer, Real, Text
from protocol.schema import Items
from protocol.tensors import Digest, Payload

NameOrNone = Annotated[str, Text(limits.NAME_BYTES_MAX, 0, NAME_PATTERN + "|")]
PublicKey = Annotated[bytes, Blob(limits.KEY_BYTES, limits.KEY_BYTES)]
Signature = Annotated[bytes, Blob(limits.SIGNATURE_BYTES, limits.SIGNATURE_BYTES)]
Nonce = Annotated[bytes, Blob(limits.NONCE_BYTES, limits.NONCE_BYTES)]
Channel = Annotated[bytes, Blob(32)]
Token = Annotated[str, Text(limits.TOKEN_BYTES_MAX, 0, r"[A-Za-z0-9_-]*")]
AssignmentId = Annotated[str, Text(64, 1, r"[A-Za-z0-9._-]+")]
Offset = Annotated[int, Integer(0, limits.PAYLOAD_BYTES_MAX)]
Examples = Annotated[int, Integer(1, limits.EXAMPLES_MAX)]
Round = Annotated[int, Integer(1, limits.ROUNDS_MAX)]
Reason = Annotated[str, Text(limits.TEXT_BYTES_MAX)]
Number = Annotated[float, Real()]


@dataclass(frozen=True, slots=True)
class Hello:
    """Protocol versions this side speaks, and what it can take. Its form never changes."""

    CODE: ClassVar[int] = 1
    versions: Annotated[
        tuple[Annotated[int, Integer(1, 1 << 16)], ...], Items(limits.VERSIONS_MAX, 1)
    ]
    software: Annotated[str, Text(limits.NAME_BYTES_MAX)]
    message_bytes: Annotated[int, Integer(limits.CHUNK_BYTES_MIN * 2, 1 << 31)]
    chunk_bytes: Annotated[int, Integer(limits.CHUNK_BYTES_MIN, 1 << 31)]


@dataclass(frozen=True, slots=True)
class Challenge:
    """Sign this, new for every connection, to prove that you have your key."""

    CODE: ClassVar[int] = 15
    nonce: Nonce


@dataclass(frozen=True, slots=True)
class Join:
    """A device shows its key and names the federation it wants; no name asks for the only one.

    `channel` is the SHA-256 of the certificate that it was shown, empty without TLS; `token` enrols
    a key that is not known yet, and may be empty. signing.py says what is signed.
    """

    CODE: ClassVar[int] = 2
    federation: NameOrNone
    key: PublicKey
    channel: Channel
    token: Token
    signature: Signature


@dataclass(frozen=True, slots=True)
class Joined:
    """The federation's settings: all that the device needs to set up its model."""

    CODE: ClassVar[int] = 3
    settings: FederationSettings


@dataclass(frozen=True, slots=True)
class CheckIn:
    """The device offers itself, with the fingerprint of the backbone it has loaded.

    `rank` is how much of the common adapter's rank it works with; 0 is all of it.
    """

    CODE: ClassVar[int] = 4
    fingerprint: Fingerprint
    examples: Examples
    rank: Annotated[int, Integer(0, limits.RANK_MAX)] = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """Train `base_version` in this round; what is reported within `deadline_s` counts.

    The same assignment is given again, under the same id, to a device that comes back.
    """

    CODE: ClassVar[int] = 5
    assignment: AssignmentId
    round: Round
    base_version: Digest
    deadline_s: Seconds
    payload: Payload


@dataclass(frozen=True, slots=True)
class RetryWindow:
    """Nothing to do now: come back at a moment chosen evenly in [after_s, after_s + spread_s]."""

    CODE: ClassVar[int] = 6
    after_s: Seconds
    spread_s: Seconds
    reason: Reason


@dataclass(frozen=True, slots=True)
class Finished:
    """No rounds are left, `rounds` were done; the payload is the final common adapter."""

    CODE: ClassVar[int] = 7
    rounds: Annotated[int, Integer(0, limits.ROUNDS_MAX)]
    base_version: Digest
    payload: Payload


@dataclass(frozen=True, slots=True)
class Fetch:
    """Send the payload of this digest, from this byte on."""

    CODE: ClassVar[int] = 8
    digest: Digest
    offset: Offset


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of the payload under way, the first of them at `offset`."""

    CODE: ClassVar[int] = 9
    offset: Offset
    last: bool
    data: Annotated[bytes, Blob(limits.CHUNK_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class Metric:
    """One number about a device's training, for people to look at."""

    name: Name
    value: Number


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an assignment: an update (adapter minus base version) is ready to be sent."""

    CODE: ClassVar[int] = 10
    assignment: AssignmentId
    round: Round
    base_version: Digest
    examples: Examples
    metrics: Annotated[tuple[Metric, ...], Items(limits.METRICS_MAX)]
    payload: Payload
    signature: Signature


@dataclass(frozen=True, slots=True)
class Resume:
    """The coordinator has the update's bytes before `offset`: go on from there."""

    CODE: ClassVar[int] = 11
    offset: Offset


class ReceiptStatus(Enum):
    """What became of a report. ACCEPTED and DUPLICATE both mean: it is kept, and counts once."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to a report. The device may forget the report once it holds this."""

    CODE: ClassVar[int] = 12
    assignment: AssignmentId
    status: ReceiptStatus
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refusal:
    """The session cannot go on; the sender closes after this.

    A device that may come back does so at a moment chosen evenly in one to two `retry_after_s`.
    """

    CODE: ClassVar[int] = 13
    code: ErrorCode
    reason: Reason
    retry_after_s: Seconds


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The session ends in good order."""

    CODE: ClassVar[int] = 14
    reason: Reason


Message = (
    Hello
    | Challenge
    | Join
    | Joined
    | CheckIn
    | Assignment
    | RetryWindow
    | Finished
    | Fetch
    | Chunk
    | Report
    | Resume
    | Receipt
    | Refusal
    | Goodbye
)
