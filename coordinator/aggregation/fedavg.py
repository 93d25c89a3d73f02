"""Weighted federated averaging as a running sum that does not depend on the order of arrival.

`new = base + sum_k w_k update_k / sum_k w_k` (FedAvg, arXiv 1602.05629; PF2LoRA
averages A and B separately, which this is: each tensor for itself). The price of an exact sum is a
rounding error of at most `2 ** -(fraction_bits + 1)` an element.
"""

from __future__ import annotations

import math

import numpy as np

from coordinator.aggregation.base import (
    ELEMENT_BITS,
    FRACTION_BITS_MAX,
    SUM_BITS,
    Reports,
    UpdateError,
    check_elements,
    fixed_point,
)
from protocol.federation import WireDtype
from protocol.tensors import Array, NamedTensors, TensorSpec


class FedAvg:
    """One round's sum. `weight_bound_total` is the largest total weight that may ever be added.

    Updates longer than `norm_max` (Euclidean, over all tensors) are scaled down to it.
    """

    def __init__(
        self, base: NamedTensors, weight_bound_total: int, norm_max: float = math.inf
    ) -> None:
        self._base = base
        self._shapes = [(spec.name, spec.shape) for spec in base.specs]
        self._sum = np.zeros(sum(spec.count for spec in base.specs), np.int64)
        self._weight = 0
        self._weight_bound_total = weight_bound_total
        self._norm_max = norm_max
        # The largest scale at which the sum cannot leave 63 bits.
        spare = SUM_BITS - ELEMENT_BITS - weight_bound_total.bit_length()
        self.fraction_bits = min(FRACTION_BITS_MAX, spare)

    def download(self, rank: int) -> NamedTensors:  # noqa: ARG002
        return self._base

    def fits(self, specs: tuple[TensorSpec, ...], dtype: WireDtype) -> bool:
        return specs == tuple(TensorSpec(s.name, dtype, s.shape) for s in self._base.specs)

    def check(self, update: NamedTensors) -> None:
        if [(spec.name, spec.shape) for spec in update.specs] != self._shapes:
            raise UpdateError("its tensors are not those of the common adapter")
        check_elements(update.flat())

    def accumulate(self, update: NamedTensors, weight: int) -> None:
        self.check(update)
        if weight < 1 or self._weight + weight > self._weight_bound_total:
            raise UpdateError(f"a weight of {weight} is outside what this round can add")
        fixed = fixed_point(self._bounded(update.flat()), self.fraction_bits)
        fixed *= weight
        self._sum += fixed
        self._weight += weight

    def finalize(self, reports: Reports | None = None) -> NamedTensors:  # noqa: ARG002
        if self._weight == 0:
            return self._base
        mean = self._sum / (self._weight * 2.0**self.fraction_bits)
        flat = (self._base.flat() + mean).astype(np.float32)
        return NamedTensors.from_flat(self._base.specs, flat)

    def _bounded(self, flat: Array) -> Array:
        length = math.sqrt(np.dot(flat.astype(np.float64), flat))
        return flat if length <= self._norm_max else flat * np.float32(self._norm_max / length)
