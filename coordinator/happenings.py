"""What happens in a coordinator, for those who watch: metrics, the ledger of devices, the log.

There are three seams, and each tells of all that passes through it: a session's messages, the round
machine's actions as the service has carried them out, and the store's calls. Whoever watches must
be quick and must not raise: it is called in the middle of things.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

from coordinator.events import Action
from coordinator.store.base import Store
from protocol.messages import Message

log = logging.getLogger("pf2lora.coordinator")


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection has been taken."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection is over; both names are empty if nobody had joined on it."""

    federation: str
    device: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A message has come from a device; before it has joined, both names are empty."""

    federation: str
    device: str
    message: Message
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Said:
    """A message has gone to a device."""

    federation: str
    device: str
    message: Message
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Acted:
    """An action of the round machine has been carried out."""

    federation: str
    action: Action
    took_s: float


@dataclass(frozen=True, slots=True)
class Called:
    """A call of the store has returned, or failed. Told from the thread that made it."""

    call: str
    took_s: float


Happening = Connected | Disconnected | Heard | Said | Acted | Called
Observer = Callable[[Happening], None]


def unobserved(_: Happening) -> None:
    """Nobody watches."""


def all_of(*observers: Observer) -> Observer:
    """Tells each of them, in order. One that fails is logged: what it watches must go on."""

    def tell(happening: Happening) -> None:
        for observer in observers:
            try:
                observer(happening)
            except Exception:
                log.exception("an observer failed")

    return tell


class _ObservedStore:
    """A store whose calls are timed; what it gives and raises is the store's own."""

    def __init__(self, store: Store, observe: Observer) -> None:
        self._store = store
        self._observe = observe

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if not callable(call):
            return call

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._observe(Called(name, time.perf_counter() - began))

        return timed


def observed_store(store: Store, observe: Observer) -> Store:
    """The store, its calls told to the observer."""
    return cast(Store, _ObservedStore(store, observe))
