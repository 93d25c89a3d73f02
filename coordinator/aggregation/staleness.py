"""What an update from an older base version is worth (FedBuff, arXiv 2106.06639, section 5).

It is scaled by `1 / sqrt(1 + s)`, where `s` is how many base versions there have been since its
own. The buffer is then averaged as any round: what is stale moves the base version less, and a
buffer of nothing but stale updates moves it less as a whole.
"""

from __future__ import annotations

import numpy as np

from protocol.tensors import NamedTensors


def staleness_factor(staleness: int) -> np.float32:
    """What an update is scaled by; 1 for one of the current base version."""
    return np.float32(1.0 / np.sqrt(1.0 + staleness))


def damped(update: NamedTensors, staleness: int) -> NamedTensors:
    """The update as it enters the aggregate."""
    if staleness == 0:
        return update
    return NamedTensors.from_flat(update.specs, update.flat() * staleness_factor(staleness))
