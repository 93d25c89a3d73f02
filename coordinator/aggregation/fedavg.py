"""Weighted federated averaging as a running sum that does not depend on the order of arrival.

`new = base + sum_k w_k update_k / sum_k w_k` (FedAvg, arXiv 1602.05629; PF2LoRA
averages A and B separately, which this is: each tensor for itself). The price of an exact sum is a
rounding error of at most `2 ** -(fraction_bits + 1)` an element.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from coordinator.aggregation.base import (
    ELEMENT_BITS,
    FRACTION_BITS_MAX,
    SUM_BITS,
    Reports,
    UpdateError,
    WholeUpdates,
    fixed_point,
)
from protocol.tensors import Array, NamedTensors

# So many numbers at a time: what is made of them on the way stays in the processor's cache.
CACHED: Final = 1 << 14


class FedAvg(WholeUpdates):
    """One round's sum. `weight_bound_total` is the largest total weight that may ever be added.

    Updates longer than `norm_max` (Euclidean, over all tensors) are scaled down to it.
    """

    def __init__(
        self, base: NamedTensors, weight_bound_total: int, norm_max: float = math.inf
    ) -> None:
        super().__init__(base)
        self._sum = np.zeros(self._size, np.int64)
        self._weight = 0
        self._weight_bound_total = weight_bound_total
        self._norm_max = norm_max
        # The largest scale at which the sum cannot leave 63 bits.
        spare = SUM_BITS - ELEMENT_BITS - weight_bound_total.bit_length()
        self.fraction_bits = min(FRACTION_BITS_MAX, spare)

    def accumulate(self, update: NamedTensors, weight: int) -> None:
        if weight < 1 or self._weight + weight > self._weight_bound_total:
            raise UpdateError(f"a weight of {weight} is outside what this round can add")
        flat = self._bounded(update.flat())
        for begin in range(0, len(flat), CACHED):
            part = slice(begin, begin + CACHED)
            fixed = fixed_point(flat[part], self.fraction_bits)
            fixed *= weight
            self._sum[part] += fixed
        self._weight += weight

    def finalize(self, reports: Reports | None = None) -> NamedTensors:  # noqa: ARG002
        if self._weight == 0:
            return self._base
        mean = self._sum / (self._weight * 2.0**self.fraction_bits)
        flat = (self._base.flat() + mean).astype(np.float32)
        return NamedTensors.from_flat(self._base.specs, flat)

    def _bounded(self, flat: Array) -> Array:
        if math.isinf(self._norm_max):
            return flat
        length = math.sqrt(np.dot(flat.astype(np.float64), flat))
        return flat if length <= self._norm_max else flat * np.float32(self._norm_max / length)
