"""Who may take part: device keys and enrolment tokens, a part of the store.

Devices belong to the coordinator, not to one of its federations. What a call changes is on the
disk when it returns; `now` is in Unix seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class DeviceStatus(Enum):
    """How a device stands.

    OPEN took part without enrolment, which a coordinator that requires it counts for nothing.
    """

    OPEN = "open"
    PENDING = "pending"
    APPROVED = "approved"
    REVOKED = "revoked"
    QUARANTINED = "quarantined"


# Devices in these are shut out, whatever the coordinator's rule of enrolment.
BARRED = (DeviceStatus.REVOKED, DeviceStatus.QUARANTINED)


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device's key and how it stands; `rejected` counts its rejected reports since approval."""

    device: str
    key: bytes
    status: DeviceStatus
    seen_at: float  # for the first time
    rejected: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What is kept of an enrolment token; `used_by` is the device that it has enrolled."""

    digest: str
    expires_at: float
    used_by: str | None = None


class TokenUse(Enum):
    """What became of an attempt to enrol with a token."""

    ACCEPTED = "accepted"
    UNKNOWN = "is not known here"
    EXPIRED = "has expired"
    USED = "has been used already"


class DeviceStore(Protocol):
    """All devices of one coordinator, and its tokens."""

    def find(self, device: str) -> DeviceRecord | None:
        """The device of this id."""

    def find_all(self, devices: Sequence[str]) -> dict[str, DeviceRecord]:
        """Those of these devices that are known, by id."""

    def all(self) -> list[DeviceRecord]:
        """Every device, by id."""

    def add(self, *records: DeviceRecord) -> None:
        """Keep devices, each in place of what was known of it: all of them or none.

        Together they cost one write to the disk.
        """

    def set_status(self, device: str, status: DeviceStatus, reason: str) -> bool:
        """Change how a device stands; False if there is none. Approval forgets rejections."""

    def add_tokens(self, tokens: Sequence[str], expires_at: float) -> None:
        """Let each enrol one device until then; only their digests are kept."""

    def tokens(self) -> list[TokenRecord]:
        """Every token, those that expire first in front."""

    def revoke_tokens(self, digests: Sequence[str]) -> None:
        """Forget those of these tokens that were not used; what another has enrolled stays."""

    def enrol(self, record: DeviceRecord, token: str, now: float) -> TokenUse:
        """Use a token up for this device, which is then kept; both or neither."""

    def count_pending(self, since: float) -> int:
        """How many devices wait for approval; newcomers first seen before `since` are forgotten.

        Newcomers have never been asked in a round, nor had a report rejected.
        """

    def forget_newcomers(self, most: int) -> int:
        """Keep at most so many newcomers that are OPEN, those first seen last; how many went."""

    def count_rejection(
        self, device: str, reason: str, quarantine_after: int
    ) -> DeviceRecord | None:
        """One more rejected report; the device is quarantined at so many (0: never).

        None if there is no such device.
        """

    def barred(self) -> dict[str, DeviceRecord]:
        """The devices that are shut out, by id."""


def token_digest(token: str) -> str:
    """What is kept of a token. Tokens are random and long: a plain hash cannot be searched."""
    return hashlib.sha256(token.encode()).hexdigest()
