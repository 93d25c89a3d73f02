"""What an operator can ask of a federation while it runs; the store carries it to the daemon."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Wish(Enum):
    """Run rounds, hold the next one back, or end the federation."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Control:
    """The operator's wish, and the round to whose base version to go back, if any."""

    wish: Wish = Wish.RUN
    roll_back_to: int | None = None
