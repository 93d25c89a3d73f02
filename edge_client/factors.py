"""What a layer's low-rank factors amount to: their rank, and the best approximation of a rank.

Everywhere `down` is [A; C], [k, n], and `up` is [B D], [m, k]; their product is B A + D C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.backends.base import RankReport

Factor = NDArray[np.float32]
Float64 = NDArray[np.float64]


def rank_report(down: Factor, up: Factor) -> RankReport:
    """Report the rank of the product, unscaled, from its singular values in float64."""
    values = _svd(down, up)[1]
    largest = float(values[0])
    if largest == 0.0:
        return RankReport(0, 0.0, 0.0, tuple(values.tolist()))
    tolerance = float(max(len(up), down.shape[1]) * np.finfo(np.float32).eps * largest)
    shares = values[values > 0.0] / values.sum()
    entropy = -float((shares * np.log(shares)).sum())
    return RankReport(
        int((values > tolerance).sum()), float(np.exp(entropy)), tolerance, tuple(values.tolist())
    )


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
