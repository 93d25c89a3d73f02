"""HETLoRA, the coordinator's side (arXiv 2401.06432): devices of different ranks in one adapter.

A device of rank k is sent the first k rows of A and columns of B (truncation) and reports an update
of its present rank. Its adapter, base plus update, is filled up with zeros to the full rank, and
layers are averaged by the sparsity weights `||B_k A_k||_F / sum_j ||B_j A_j||_F`. The head, which
has no rank, is averaged by the round's weights. The sums are exact, as those of FedAvg.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from coordinator.aggregation.base import (
    ELEMENT_BITS,
    SUM_BITS,
    Reports,
    UpdateError,
    check_elements,
    fixed_point,
)
from protocol.federation import WireDtype
from protocol.tensors import Array, NamedTensors, TensorSpec, rank_corner, truncated

# A layer's weight is its norm in fixed point: up to 2 ** 10, in steps of 2 ** -16.
_NORM_MAX: Final = 2.0**10
_NORM_BITS: Final = 16


class HetLoRA:
    """One round's sums, a weight for each tensor."""

    def __init__(self, base: NamedTensors, weight_bound_total: int, cohort: int) -> None:
        self._base = base
        self._base_arrays = base.arrays()
        self._sums = {s.name: np.zeros(s.shape, np.int64) for s in base.specs}
        self._weights = dict.fromkeys(self._sums, 0)
        norm_bound_total = cohort << (10 + _NORM_BITS)
        bound = max(weight_bound_total, norm_bound_total)
        self._fraction_bits = SUM_BITS - ELEMENT_BITS - 1 - bound.bit_length()
        self._weight_bound_total = weight_bound_total
        self._head_weight = 0

    def download(self, rank: int) -> NamedTensors:
        return truncated(self._base, rank) if rank else self._base

    def fits(self, specs: tuple[TensorSpec, ...], dtype: WireDtype) -> bool:
        ranks = {spec.shape[0] for spec in specs if spec.name.endswith(".A") and spec.shape}
        if len(ranks) != 1:
            return False
        (rank,) = ranks
        own = tuple(
            TensorSpec(name, dtype, array[rank_corner(name, rank)].shape)
            for name, array in self._base_arrays.items()
        )
        return specs == own

    def check(self, update: NamedTensors) -> None:
        if not self.fits(
            update.specs, update.specs[0].dtype if update.specs else WireDtype.FLOAT32
        ):
            raise UpdateError("its tensors are not those of the common adapter at any rank")
        check_elements(update.flat())
        for name, array in update.arrays().items():
            check_elements(self._moved(name, array))

    def accumulate(self, update: NamedTensors, weight: int) -> None:
        if weight < 1 or self._head_weight + weight > self._weight_bound_total:
            raise UpdateError(f"a weight of {weight} is outside what this round can add")
        adapter = {name: self._moved(name, array) for name, array in update.arrays().items()}
        self._head_weight += weight
        norms = {
            name.removesuffix(".A"): _norm_weight(array, adapter[f"{name.removesuffix('.A')}.B"])
            for name, array in adapter.items()
            if name.endswith(".A")
        }
        for name, array in adapter.items():
            layer, _, factor = name.rpartition(".")
            own = norms[layer] if factor in ("A", "B") and layer in norms else weight
            corner = tuple(slice(side) for side in array.shape)
            self._sums[name][corner] += own * fixed_point(array, self._fraction_bits)
            self._weights[name] += own

    def finalize(self, reports: Reports | None = None) -> NamedTensors:  # noqa: ARG002
        scale = 2.0**self._fraction_bits
        return NamedTensors.from_arrays(
            {
                name: (
                    (total / (self._weights[name] * scale)).astype(np.float32)
                    if self._weights[name]
                    else self._base_arrays[name]
                )
                for name, total in self._sums.items()
            }
        )

    def _moved(self, name: str, update: Array) -> Array:
        corner = tuple(slice(side) for side in update.shape)
        moved: Array = self._base_arrays[name][corner] + update
        return moved


def _norm_weight(a: Array, b: Array) -> int:
    """`||B A||_F` in fixed point, from the small Gram matrices: `tr(B^T B A A^T)`."""
    gram = (b.T.astype(np.float64) @ b) * (a.astype(np.float64) @ a.T)
    norm = min(float(np.sqrt(max(gram.sum(), 0.0))), _NORM_MAX)
    return round(norm * 2**_NORM_BITS)
