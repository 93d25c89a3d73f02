"""What an aggregation rule owes the service, and the sum that all of them stand on.

Floating-point sums depend on their order. Here each number is rounded once to fixed point and
summed in 64-bit integers, which is exact: the same reports give the same bytes in any order, after
any crash.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.federation import WireDtype
from protocol.tensors import Array, NamedTensors, TensorSpec

# No adapter element moves this far in one round; more is a broken or hostile report.
UPDATE_ELEMENT_MAX: Final = 16.0
ELEMENT_BITS: Final = 4  # log2(UPDATE_ELEMENT_MAX)
SUM_BITS: Final = 62
FRACTION_BITS_MAX: Final = 40


class UpdateError(ValueError):
    """An update that cannot be averaged: other tensors, not finite, or absurdly large."""


class Reports(Protocol):
    """A round's kept updates, for rules that need them all; ordered by assignment."""

    @property
    def count(self) -> int:
        """How many there are, k."""

    def block(self, begin: int, end: int) -> Array:
        """Coordinates `[begin, end)` of all updates, float32 [k, end - begin], the caller's own."""


class Aggregation(Protocol):
    """One round's aggregate of a base version's updates."""

    def download(self, rank: int) -> NamedTensors:
        """The base version as a device of this rank receives it; 0 is the whole rank."""

    def fits(self, specs: tuple[TensorSpec, ...], dtype: WireDtype) -> bool:
        """Whether an update of these tensors can be one of this base version's."""

    def check(self, update: NamedTensors) -> None:
        """Refuse an update that must not enter the aggregate, before it is kept.

        Raises:
            UpdateError: naming what is wrong with it.
        """

    def accumulate(self, update: NamedTensors, weight: int) -> None:
        """Add one update that `check` has let pass, of weight `weight` (a whole number, 1 or more).

        Raises:
            UpdateError: the weight is out of bounds; nothing has changed.
        """

    def finalize(self, reports: Reports) -> NamedTensors:
        """The base version plus the averaged update; the base itself where nothing was added.

        `reports` are those that were accumulated, for rules that look at them together.
        """


class WholeUpdates:
    """What rules share in which every device has the whole common adapter."""

    def __init__(self, base: NamedTensors) -> None:
        self._base = base
        self._shapes = [(spec.name, spec.shape) for spec in base.specs]
        self._size = sum(spec.count for spec in base.specs)

    def download(self, rank: int) -> NamedTensors:  # noqa: ARG002
        return self._base

    def fits(self, specs: tuple[TensorSpec, ...], dtype: WireDtype) -> bool:
        return specs == tuple(TensorSpec(name, dtype, shape) for name, shape in self._shapes)

    def check(self, update: NamedTensors) -> None:
        if [(spec.name, spec.shape) for spec in update.specs] != self._shapes:
            raise UpdateError("its tensors are not those of the common adapter")
        check_elements(update.flat())


def check_elements(flat: NDArray[np.float32]) -> None:
    """Raise UpdateError unless every element is finite and of a plausible size."""
    # The comparison is false for NaN as well as for what is too large.
    if not bool(np.all(np.abs(flat) <= UPDATE_ELEMENT_MAX)):
        raise UpdateError(
            f"an element is not finite or over {UPDATE_ELEMENT_MAX:g} in absolute value"
        )


def fixed_point(flat: NDArray[np.float32], fraction_bits: int) -> NDArray[np.int64]:
    """Each element times `2 ** fraction_bits`, rounded to nearest."""
    scaled = np.multiply(flat, 2.0**fraction_bits, dtype=np.float64)
    return np.rint(scaled, out=scaled).astype(np.int64)
