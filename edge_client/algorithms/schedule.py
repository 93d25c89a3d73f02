"""Learning rates over the rounds of a federation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from edge_client.algorithms.base import Plan
from protocol.federation import Decay, FederationSettings


def rate_factor(settings: FederationSettings, round_number: int) -> float:
    """What learning rates are multiplied by in a round, counted from 1.

    Rises linearly to 1 in the first round after `warmup_rounds`, and falls from there so that the
    round after the last would have 0.
    """
    training, count = settings.training, settings.rounds.count
    warm_up = min(training.warmup_rounds, count)
    if round_number <= warm_up:
        return round_number / (warm_up + 1)
    done = (round_number - 1 - warm_up) / (count - warm_up)
    match training.decay:
        case Decay.CONSTANT:
            return 1.0
        case Decay.LINEAR:
            return 1.0 - done
        case Decay.COSINE:
            return 0.5 * (1.0 + math.cos(math.pi * done))


def plans(settings: FederationSettings, round_number: int) -> Iterator[Plan]:
    """One plan a local step of a round."""
    factor = rate_factor(settings, round_number)
    training = settings.training
    scaled = replace(training, learning_rate=training.learning_rate * factor)
    for step in range(training.local_steps):
        yield Plan(scaled, factor, round_number, step)
