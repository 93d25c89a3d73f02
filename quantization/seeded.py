"""What a seed draws, the same on every platform and with every runtime. NumPy only.

The raw bits of Philox are part of NumPy's promise of stability; its distributions, and torch's
generators, are not. So a device without torch starts from the same numbers as one with it, and
nothing of a start need be handed over but names, shapes and the seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantization.names import is_below

_HEAD_STD: Final = 0.02  # what BERT and GPT-2 start their heads with


def seeded_uniform(count: int, seed: int, *labels: str) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) that `seed` and `labels` determine, on every platform."""
    key = hashlib.sha256("\0".join((str(seed), *labels)).encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return (np.asarray(bits, np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def head_start(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """A head's tensor before training: a matrix normal with standard deviation 0.02, else constant.

    Biases are zero and norm scales one.
    """
    if len(shape) < 2:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    values = _HEAD_STD * _seeded_normal(math.prod(shape), seed, name)
    return values.astype(np.float32).reshape(shape)


def factor_start(shape: tuple[int, int], seed: int, layer: str, letter: str) -> NDArray[np.float32]:
    """A or C of a layer, [rank, n]: uniform in +-1/sqrt(n), Kaiming's with a = sqrt 5 as in PEFT.

    B and D start at zero, so that an adapter starts as nothing.
    """
    uniform = seeded_uniform(math.prod(shape), seed, layer, letter)
    start = ((2.0 * uniform - 1.0) / math.sqrt(shape[1])).astype(np.float32)
    return start.reshape(shape)


def projection_start(shape: tuple[int, int], seed: int, letter: str) -> NDArray[np.float32]:
    """A projection [rows, columns]: orthogonal along its shorter side, a mean square of 1.

    Of the seed, the letter and the shape alone, so that layers of equal widths begin alike.
    """
    rows, columns = shape
    normal = _seeded_normal(rows * columns, seed, letter, f"{rows} x {columns}")
    longer = normal.reshape(max(shape), min(shape))
    basis = np.linalg.qr(longer)[0] * math.sqrt(max(shape))
    return (basis if rows >= columns else basis.T).astype(np.float32)


def start_of(
    name: str,
    shape: tuple[int, ...],
    head_modules: Collection[str],
    common_seed: int,
    personal_seed: int,
) -> NDArray[np.float32]:
    """What a trainable array begins with on the device of `personal_seed`, by its name."""
    if is_below(name, head_modules):
        return head_start(name, shape, common_seed)
    layer, _, letter = name.rpartition(".")
    if letter in "BD":
        return np.zeros(shape, np.float32)
    rows, columns = shape
    if letter in "PQ":
        return projection_start((rows, columns), common_seed, letter)
    seed = common_seed if letter == "A" else personal_seed
    return factor_start((rows, columns), seed, layer, letter)


def _seeded_normal(count: int, seed: int, *labels: str) -> NDArray[np.float64]:
    """Standard normal numbers by the method of Box and Muller."""
    radius = np.sqrt(-2.0 * np.log1p(-seeded_uniform(count, seed, *labels, "radius")))
    normal: NDArray[np.float64] = radius * np.cos(
        2.0 * np.pi * seeded_uniform(count, seed, *labels, "angle")
    )
    return normal
