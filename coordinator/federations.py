"""The federations of one coordinator: which one a device means, and how they stand together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from coordinator.service import FederationService


class UnknownFederationError(LookupError):
    """A device asked for a federation that is not here, or did not say which of several."""


class Federations:
    """Those that this process runs, by name."""

    def __init__(self, services: Iterable[FederationService]) -> None:
        self._services = {service.settings.name: service for service in services}

    def __iter__(self) -> Iterator[FederationService]:
        return iter(self._services.values())

    def named(self, name: str) -> FederationService:
        """The one that a device means; no name means the only one there is.

        Raises:
            UnknownFederationError: naming those that there are.
        """
        if not name and len(self._services) == 1:
            return next(iter(self))
        if name in self._services:
            return self._services[name]
        here = f"this coordinator runs {', '.join(map(repr, sorted(self._services)))}"
        if name:
            raise UnknownFederationError(f"no federation {name!r} here; {here}")
        raise UnknownFederationError(f"{here}: say which federation to join")

    @property
    def finished(self) -> bool:
        """Whether the rounds of all of them are over."""
        return all(service.finished for service in self)

    @property
    def everyone_told(self) -> bool:
        """Whether every device that ever joined knows so."""
        return all(service.everyone_told for service in self)

    @property
    def failures(self) -> set[asyncio.Future[None]]:
        """Done where a federation cannot go on; the coordinator ends with the first."""
        return {service.failure for service in self}

    def close(self) -> None:
        """Stop the timers; the store is the caller's."""
        for service in self:
            service.close()
