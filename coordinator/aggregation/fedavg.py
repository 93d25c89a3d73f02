"""Weighted federated averaging as a running sum that does not depend on the order of arrival.

`new = base + sum_k w_k update_k / sum_k w_k` (FedAvg, arXiv 1602.05629; PF2LoRA
averages A and B separately, which this is: each tensor for itself).

Floating-point sums depend on their order. Here each update is rounded once to fixed point and
summed in 64-bit integers, which is exact: the same reports give the same bytes in any order, after
any crash. The price is a rounding error of at most `2 ** -(fraction_bits + 1)` an element.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from protocol.tensors import NamedTensors

# No adapter element moves this far in one round; more is a broken or hostile report.
UPDATE_ELEMENT_MAX: Final = 16.0
_ELEMENT_BITS: Final = 4  # log2(UPDATE_ELEMENT_MAX)
_FRACTION_BITS_MAX: Final = 40


class UpdateError(ValueError):
    """An update that cannot be averaged: other tensors, not finite, or absurdly large."""


class FedAvg:
    """One round's sum. `weight_bound_total` is the largest total weight that may ever be added."""

    def __init__(self, base: NamedTensors, weight_bound_total: int) -> None:
        self._base = base
        self._shapes = [(spec.name, spec.shape) for spec in base.specs]
        self._sum = np.zeros(sum(spec.count for spec in base.specs), np.int64)
        self._weight = 0
        self._weight_bound_total = weight_bound_total
        # The largest scale at which the sum cannot leave 63 bits.
        spare = 62 - _ELEMENT_BITS - weight_bound_total.bit_length()
        self.fraction_bits = min(_FRACTION_BITS_MAX, spare)

    def check(self, update: NamedTensors) -> None:
        """Refuse an update that must not enter the sum.

        Raises:
            UpdateError: naming what is wrong with it.
        """
        if [(spec.name, spec.shape) for spec in update.specs] != self._shapes:
            raise UpdateError("its tensors are not those of the common adapter")
        flat = update.flat()
        # The comparison is false for NaN as well as for what is too large.
        if not bool(np.all(np.abs(flat) <= UPDATE_ELEMENT_MAX)):
            raise UpdateError(
                f"an element is not finite or over {UPDATE_ELEMENT_MAX:g} in absolute value"
            )

    def accumulate(self, update: NamedTensors, weight: int) -> None:
        """Add one update of weight `weight` (a whole number, 1 or more).

        Raises:
            UpdateError: the update or the weight is out of bounds; the sum is unchanged.
        """
        self.check(update)
        if weight < 1 or self._weight + weight > self._weight_bound_total:
            raise UpdateError(f"a weight of {weight} is outside what this round can add")
        scaled = np.multiply(update.flat(), 2.0**self.fraction_bits, dtype=np.float64)
        fixed = np.rint(scaled, out=scaled).astype(np.int64)
        fixed *= weight
        self._sum += fixed
        self._weight += weight

    def finalize(self) -> NamedTensors:
        """The next base version; the base itself where nothing was added."""
        if self._weight == 0:
            return self._base
        mean = self._sum / (self._weight * 2.0**self.fraction_bits)
        flat = (self._base.flat() + mean).astype(np.float32)
        return NamedTensors.from_flat(self._base.specs, flat)
