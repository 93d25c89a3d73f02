"""What a layer's low-rank factors amount to: their rank, and the best approximation of a rank.

Everywhere `down` is [A; C], [k, n], and `up` is [B D], [m, k]; their product is B A + D C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Factor = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RankReport:
    """The learned rank of one layer.

    `singular_values` are those of B A + D C, largest first, at most r + r2 of them.
    `numerical_rank` counts those above `tolerance = max(m, n) * eps * largest`, eps of float32.
    `entropy_rank` is exp(-sum p log p) with p the singular values over their sum (Roy and Vetterli
    2007, "effective rank"); 0 for a zero matrix.
    """

    numerical_rank: int
    entropy_rank: float
    tolerance: float
    singular_values: tuple[float, ...]

    @property
    def energies(self) -> tuple[float, ...]:
        """The share of the squared Frobenius norm that the best approximation of each rank keeps.

        Ranks count from 1; a zero matrix is kept whole by any.
        """
        squares = np.square(self.singular_values)
        total = squares.sum()
        kept = np.cumsum(squares) / total if total else np.ones_like(squares)
        return tuple(kept.tolist())

    def rank_for(self, energy: float) -> int:
        """The smallest rank, 1 or more, that keeps at least this share of the energy."""
        # Rounding must not ask for one rank more than there are.
        return 1 + int(np.argmax(np.array(self.energies) >= min(energy, 1.0) - 1e-12))


def rank_report(down: Factor, up: Factor) -> RankReport:
    """Report the rank of the product, unscaled, from its singular values in float64."""
    values = singular_values(down, up)
    largest = float(values[0])
    if largest == 0.0:
        return RankReport(0, 0.0, 0.0, tuple(values.tolist()))
    tolerance = float(max(len(up), down.shape[1]) * np.finfo(np.float32).eps * largest)
    shares = values[values > 0.0] / values.sum()
    entropy = -float((shares * np.log(shares)).sum())
    return RankReport(
        int((values > tolerance).sum()), float(np.exp(entropy)), tolerance, tuple(values.tolist())
    )


def singular_values(down: Factor, up: Factor) -> Float64:
    """Those of the product, [k], largest first."""
    values: Float64 = _svd(down, up)[1]
    return values


def cut(down: Factor, up: Factor, rank: int) -> tuple[Factor, Factor]:
    """The best approximation of the product of a rank: factors [rank, n] and [m, rank].

    By the singular value decomposition (Eckart and Young 1936), each factor with half of every
    singular value.
    """
    left, values, right = _svd(down, up)
    root = np.sqrt(values[:rank])
    return (
        (root[:, None] * right[:rank]).astype(np.float32),
        (left[:, :rank] * root).astype(np.float32),
    )


def _svd(down: Factor, up: Factor) -> tuple[Any, Float64, Any]:
    """The product as `U diag(S) V`: [m, k], [k], [k, n] in float64, without forming [m, n].

    With QR of up = Q1 R1 and down^T = Q2 R2 it is Q1 (R1 R2^T) Q2^T: only the small core R1 R2^T
    is decomposed.
    """
    left, above = np.linalg.qr(up.astype(np.float64))
    right, below = np.linalg.qr(down.T.astype(np.float64))
    u, values, v = np.linalg.svd(above @ below.T)
    return left @ u, values, v @ right.T
