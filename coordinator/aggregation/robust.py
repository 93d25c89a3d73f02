"""Rules that hold against some hostile or broken reports; they look at all reports together.

They read the kept reports from the store, a block of coordinates at a time, in the order of their
assignments: memory is bounded whatever the number of devices, and the result does not depend on the
order of arrival. Devices count alike, whatever their examples: a number that a device tells of
itself must not give it more weight here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.base import Reports, WholeUpdates
from protocol.aggregation import CoordinateMedian, MultiKrum, TrimmedMean
from protocol.tensors import Array, NamedTensors

# Of all reports' numbers at 8 bytes each; as float32 it is half of this, and a rule's copy of it.
BLOCK_BYTES: Final = 24 << 20
Rule = CoordinateMedian | TrimmedMean | MultiKrum


class Robust(WholeUpdates):
    """One round's aggregate under a rule that needs all reports at the end."""

    def __init__(self, base: NamedTensors, rule: Rule) -> None:
        super().__init__(base)
        self._rule = rule

    def accumulate(self, update: NamedTensors, weight: int) -> None:
        """Nothing to add: the rule reads what is kept."""

    def finalize(self, reports: Reports) -> NamedTensors:
        if not reports.count:
            return self._base
        match self._rule:
            case CoordinateMedian():
                mean = _by_coordinate(self._size, reports, median)
            case TrimmedMean(share):
                mean = _by_coordinate(self._size, reports, lambda block: trimmed(block, share))
            case MultiKrum(hostile):
                chosen = krum_selection(squared_distances(self._size, reports), hostile)
                mean = _by_coordinate(
                    self._size, reports, lambda block: block[chosen].mean(0, np.float64)
                )
        flat = (self._base.flat() + mean).astype(np.float32)
        return NamedTensors.from_flat(self._base.specs, flat)


def median(block: Array) -> Array:
    """Of each column of rows [k, p], which are put in another order.

    The same numbers as NumPy's, which also looks for NaN: reports have none.
    """
    middle = len(block) // 2
    block.partition(middle, 0)  # one place alone: NumPy has vector instructions for that
    below = block[middle] if len(block) % 2 else block[:middle].max(0)
    found: Array = (below + block[middle]) / 2
    return found


def trimmed(block: Array, share: float) -> NDArray[np.float64]:
    """Mean over rows [k, p] without the lowest and highest `floor(share k)` of each column.

    Yin et al. 2018 (arXiv 1803.01498), definition 2.
    """
    cut = int(share * len(block))
    kept = np.sort(block, 0)[cut : len(block) - cut]
    mean: NDArray[np.float64] = kept.mean(0, np.float64)
    return mean


def krum_selection(distances: NDArray[np.float64], hostile: int) -> NDArray[np.int64]:
    """Which of k reports Multi-Krum averages: the `k - hostile` that lie closest to their nearest.

    A report's score is the sum of squared distances to its `k - hostile - 2` nearest others
    (Blanchard et al. 2017, "Machine Learning with Adversaries", section 4).
    """
    count = len(distances)
    nearest = max(1, count - hostile - 2)
    others = np.sort(distances + np.diag(np.full(count, np.inf)), 1)[:, :nearest]
    order = np.argsort(others.sum(1), kind="stable")
    return np.sort(order[: max(1, count - hostile)])


def squared_distances(size: int, reports: Reports) -> NDArray[np.float64]:
    """Between all pairs of updates, [k, k]."""
    gram = np.zeros((reports.count, reports.count))
    for begin, end in _blocks(size, reports.count):
        block = reports.block(begin, end).astype(np.float64)
        gram += block @ block.T
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)


def _by_coordinate(
    size: int, reports: Reports, rule: Callable[[Array], NDArray[Any]]
) -> NDArray[np.float64]:
    mean = np.empty(size)
    for begin, end in _blocks(size, reports.count):
        mean[begin:end] = rule(reports.block(begin, end))
    return mean


def _blocks(size: int, count: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (8 * count))
    for begin in range(0, size, step):
        yield begin, min(begin + step, size)
