"""The few things that NumPy's arrays and torch's tensors do not do alike. Needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

Vector = Any


def as_numpy(vector: Vector) -> np.ndarray[Any, Any]:
    """The same numbers in NumPy; a view where they lie in memory of the CPU."""
    return np.asarray(vector.cpu() if hasattr(vector, "cpu") else vector)


def as_vector(array: np.ndarray[Any, Any], like: Vector) -> Vector:
    """The same numbers as what `like` is: on its device, and in its dtype if that is torch's."""
    return like.new_tensor(array) if hasattr(like, "new_tensor") else array
