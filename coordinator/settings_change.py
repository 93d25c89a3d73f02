"""What of a federation's settings may change between two starts of the coordinator.

How rounds run, how devices train in them, and by which rule updates are averaged: what is learned
goes on from where it stands. All else stays: it shapes the adapter, gives what devices have learned
its meaning, or belongs to what the server step remembers.
"""

from __future__ import annotations

from typing import Final

from coordinator.errors import ConfigurationError
from protocol.federation import FederationSettings, changed_settings

CHANGEABLE: Final = ("rounds", "training", "aggregation")
# Assignments of the one mode are not kept as those of the other.
FIXED: Final = ("rounds.mode",)


def settings_change(kept: FederationSettings, given: FederationSettings) -> list[str]:
    """What has changed, a line for each setting.

    Raises:
        ConfigurationError: one that cannot change; named with both values.
    """
    changed = changed_settings(kept, given)
    fixed = [key for key in changed if not _may_change(key)]
    if fixed:
        (key, (old, new)), *others = ((key, changed[key]) for key in fixed)
        also = f" (also changed: {', '.join(name for name, _ in others)})" if others else ""
        raise ConfigurationError(
            key,
            f"is {new!r}, but the store holds the federation {kept.name!r} with {old!r}{also}; "
            "put it back, or choose another name or another store",
        )
    return [f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items()]


def _may_change(key: str) -> bool:
    return key.partition(".")[0] in CHANGEABLE and key not in FIXED
