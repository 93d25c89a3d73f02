"""What a round machine is told and what it answers with: its events and its actions.

The service (service.py) carries actions out in their order, and tells the machine of what it did by
further events. All times are seconds on one clock, which may be virtual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.control import Wish
from protocol.messages import ReceiptStatus

# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckedIn:
    """A device offers itself and waits for an answer."""

    device: str


@dataclass(frozen=True, slots=True)
class Left:
    """A device that may have been waiting is gone."""

    device: str


@dataclass(frozen=True, slots=True)
class Expelled:
    """A device is not here (any more), and will not be let in again."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class Offered:
    """A device has an update for an assignment."""

    device: str
    assignment: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    """All bytes of the update have come and are sound."""

    device: str
    assignment: str


@dataclass(frozen=True, slots=True)
class Kept:
    """These reports are on disk, by one write: all count before the round may close."""

    reports: tuple[tuple[str, str], ...]  # device, assignment


@dataclass(frozen=True, slots=True)
class Refused:
    """The update was looked at and cannot be used."""

    device: str
    assignment: str
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The round's outcome is on disk."""

    aggregated: bool


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Wished:
    """The operator lets rounds run, holds the next one back, or ends the federation."""

    wish: Wish


@dataclass(frozen=True, slots=True)
class AskedBack:
    """The operator wants the base version that there was after so many rounds."""

    number: int


@dataclass(frozen=True, slots=True)
class WentBack:
    """That base version is the current one now; `attempts` were made at each round after it."""

    rounds_done: int
    attempts: Mapping[int, int]


Event = (
    CheckedIn
    | Left
    | Expelled
    | Offered
    | Uploaded
    | Kept
    | Refused
    | Closed
    | Ticked
    | Wished
    | AskedBack
    | WentBack
)


# --- actions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Write down that this round is open, before anyone is assigned."""

    number: int
    attempt: int
    deadline_at: float | None
    cohort: tuple[tuple[str, str], ...]  # device, assignment


@dataclass(frozen=True, slots=True)
class AddAssignment:
    """Write down one more assignment of the open round, before it is given.

    With a deadline it is awaited for itself, over the rounds.
    """

    number: int
    attempt: int
    device: str
    assignment: str
    deadline_at: float | None


@dataclass(frozen=True, slots=True)
class Assign:
    """Give a waiting device its assignment."""

    device: str
    assignment: str
    number: int
    deadline_at: float


@dataclass(frozen=True, slots=True)
class Retry:
    """Send a waiting device away for a while."""

    device: str
    after_s: float
    spread_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell a waiting device that no rounds are left."""

    device: str


@dataclass(frozen=True, slots=True)
class TakeUpdate:
    """Let the device send the update's bytes."""

    device: str
    assignment: str


@dataclass(frozen=True, slots=True)
class DropUpdate:
    """Forget what has come of an update: it is not awaited any more."""

    device: str
    assignment: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Put the report on disk, then say Kept."""

    device: str
    assignment: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Send the device its receipt."""

    device: str
    assignment: str
    status: ReceiptStatus
    reason: str


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Aggregate (or abandon) the round, write the outcome down, then say Closed."""

    number: int
    attempt: int
    aggregate: bool
    reports: int


@dataclass(frozen=True, slots=True)
class GoBack:
    """Make an earlier base version the current one, then say WentBack."""

    number: int


Action = (
    OpenRound
    | AddAssignment
    | Assign
    | Retry
    | Finish
    | TakeUpdate
    | DropUpdate
    | Keep
    | Answer
    | CloseRound
    | GoBack
)
