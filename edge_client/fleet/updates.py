"""Made-up updates: noise of the right names, shapes and type, shared by all devices."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import numpy as np

from protocol.federation import WireDtype
from protocol.tensors import NamedTensors, TensorSpec

# Enough that rules which compare updates have something to compare, whatever the number of devices.
VARIANTS: Final = 8
SCALE: Final = 1e-4

# Runs a call off the event loop, as asyncio.to_thread does.
Aside = Callable[[Callable[[], Any]], Awaitable[Any]]


class MadeUpUpdates:
    """Makes each variant once for each form that base versions come in, and keeps it."""

    def __init__(self, seed: str, aside: Aside = asyncio.to_thread) -> None:
        self._seed = seed
        self._aside = aside
        self._made: dict[tuple[object, ...], asyncio.Task[NamedTensors]] = {}

    async def like(
        self, specs: tuple[TensorSpec, ...], dtype: WireDtype, number: int
    ) -> NamedTensors:
        """An update for a base version of these tensors, as `dtype`, from device `number`."""
        variant = number % VARIANTS
        key = (specs, dtype, variant)
        if key not in self._made:
            make = asyncio.ensure_future(self._aside(lambda: self._make(specs, dtype, variant)))
            self._made[key] = make
        return await asyncio.shield(self._made[key])

    def _make(self, specs: tuple[TensorSpec, ...], dtype: WireDtype, variant: int) -> NamedTensors:
        digest = hashlib.sha256(f"{self._seed}/{variant}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        count = sum(spec.count for spec in specs)
        noise = np.float32(SCALE) * rng.standard_normal(count, np.float32)
        update = NamedTensors.from_flat(specs, noise, dtype)
        update.digest()  # of which there is one for all who send it
        return update
