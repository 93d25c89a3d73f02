"""What a load test is to do, and how its flags are read."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Final

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Between:
    """A time chosen evenly; one and the same where both ends are."""

    low_s: float
    high_s: float

    def draw_s(self, rng: random.Random) -> float:
        return rng.uniform(self.low_s, self.high_s)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Times of which half are under the median and a few are much longer, as devices' are."""

    median_s: float
    sigma: float

    def draw_s(self, rng: random.Random) -> float:
        return self.median_s * math.exp(rng.gauss(0.0, self.sigma))


@dataclass(frozen=True, slots=True)
class Plan:
    """One load test.

    `spawn_rate` devices a second begin; the test ends after `run_time_s` or `rounds`, whichever is
    first, or when the federation's own rounds are over. In a share of `dropout` of its assignments
    a device cuts its connection while it trains or sends, and comes back; in a share of
    `stragglers` its training takes `straggler_time_s`. All chance follows from `seed`.
    """

    devices: int
    seed: str
    spawn_rate: float = 100.0
    run_time_s: float | None = None
    rounds: int | None = None
    training_time: Between | Lognormal = Between(0.0, 0.0)
    dropout: float = 0.0
    stragglers: float = 0.0
    straggler_time_s: float = 30.0


def duration_s(text: str) -> float:
    """Seconds of "500ms", "2s", "1.5m" or "1h".

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not found:
        raise ValueError(f"{text!r} is no time: 500ms, 2s, 1.5m, 1h")
    return float(found[1]) * _UNITS_S[found[2]]


def rate(text: str) -> float:
    """How many a second: "50" or "50/s".

    Raises:
        ValueError: it is no number above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/s)?", text)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no rate: 50/s")
    return float(found[1])


def training_time(text: str) -> Between | Lognormal:
    """A time "2s", a range "1s-5s", or "lognormal:2s:0.5" (median and sigma).

    Raises:
        ValueError: it is none of these.
    """
    if text.startswith("lognormal:"):
        _, median, sigma = (*text.split(":", 2), "")[:3]
        if not re.fullmatch(r"\d(\.\d+)?", sigma):
            raise ValueError(f"{text!r}: lognormal:MEDIAN:SIGMA, as in lognormal:2s:0.5")
        return Lognormal(duration_s(median), float(sigma))
    low, dash, high = text.partition("-")
    between = Between(duration_s(low), duration_s(high if dash else low))
    if between.low_s > between.high_s:
        raise ValueError(f"{text!r} ends before it begins")
    return between


def share(text: str) -> float:
    """A number in [0, 1].

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"0(\.\d+)?|1(\.0+)?|\.\d+", text):
        raise ValueError(f"{text!r} is no share: 0.1 is a tenth")
    return float(text)


def count(text: str) -> int:
    """A whole number above 0.

    Raises:
        ValueError: it is none.
    """
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ValueError(f"{text!r} is no whole number above 0")
    return int(text)
