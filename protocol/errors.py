"""Faults of the protocol, and the codes that travel.

    ProtocolError
    ├── LocalProtocolError    this side tried to send what the protocol does not allow: a bug here
    └── RemoteProtocolError   the other side sent what the protocol does not allow: say why, close

A refusal that obeys the protocol (a full coordinator, an unknown federation) is no fault: it is the
message `Refusal`, and carries one of the codes below.
"""

from __future__ import annotations

from enum import Enum


class ErrorCode(Enum):
    """Why a session ends early. The value is what travels."""

    MALFORMED = "malformed"
    UNEXPECTED_MESSAGE = "unexpected_message"
    VERSION = "version"
    LIMIT = "limit"
    TIMEOUT = "timeout"
    DIGEST = "digest"
    UNKNOWN_FEDERATION = "unknown_federation"
    FINGERPRINT = "fingerprint"
    INELIGIBLE = "ineligible"
    SIGNATURE = "signature"
    TOKEN = "token"  # noqa: S105 - the reason, no secret
    PENDING = "pending"
    REVOKED = "revoked"
    QUARANTINED = "quarantined"
    NOT_FOUND = "not_found"
    SUPERSEDED = "superseded"
    BUSY = "busy"
    DRAINING = "draining"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether the same device may succeed later without being changed.

        A damaged or lost message shows itself as one of the first group: over a fresh connection
        the same exchange may well succeed.
        """
        return self not in {
            ErrorCode.VERSION,
            ErrorCode.LIMIT,
            ErrorCode.UNKNOWN_FEDERATION,
            ErrorCode.FINGERPRINT,
            ErrorCode.INELIGIBLE,
            ErrorCode.SIGNATURE,
            ErrorCode.TOKEN,
            ErrorCode.REVOKED,
            ErrorCode.QUARANTINED,
        }


class ProtocolError(Exception):
    """Base of every fault this package raises."""


class LocalProtocolError(ProtocolError):
    """This side broke the protocol; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol; `code` is what to tell it before closing."""

    def __init__(self, text: str, code: ErrorCode = ErrorCode.MALFORMED) -> None:
        super().__init__(text)
        self.code = code
