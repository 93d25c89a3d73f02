"""Trainable arrays as views into one flat vector, and their gradients into another.

An optimizer step is then a few vector operations, and nothing is copied between model and
algorithm. The vectors are NumPy's or torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_client.algorithms.base import Vector
from edge_client.algorithms.vectors import as_numpy, as_vector
from edge_client.backends.base import Arrays
from edge_client.errors import StateError


class FlatGroup:
    """The arrays of one level: `values` and `gradients` are vectors [P], `shapes` names its parts.

    Raises:
        ValueError: the vectors are not of the shapes' size.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], values: Vector, gradients: Vector
    ) -> None:
        count = sum(map(math.prod, shapes.values()))
        if len(values) != count or len(gradients) != count:
            raise ValueError(f"{count} numbers, vectors of {len(values)} and {len(gradients)}")
        self.shapes = dict(shapes)
        self.values = values
        self.gradients = gradients

    def views(self, vector: Vector) -> dict[str, Vector]:
        """A vector like `values`, cut into the arrays' shapes; views, by name."""
        found, at = {}, 0
        for name, shape in self.shapes.items():
            end = at + math.prod(shape)
            found[name] = vector[at:end].reshape(shape)
            at = end
        return found

    def arrays(self) -> Arrays:
        """Copies, by name."""
        return self.views(as_numpy(self.values).copy())

    def load(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], what: str, *, fill_up: bool = False
    ) -> None:
        """Take over values, in place; with `fill_up` smaller ones too, zeros behind them.

        Raises:
            StateError: the names or shapes are others.
        """
        found = {name: tuple(array.shape) for name, array in arrays.items()}
        fits = found.keys() == self.shapes.keys() and all(
            found[name] == shape or (fill_up and _is_within(found[name], shape))
            for name, shape in self.shapes.items()
        )
        if not fits:
            differing = sorted(set(found.items()) ^ set(self.shapes.items()))[:3]
            raise StateError(f"the {what} has other tensors than this model: {differing}")
        flat = np.zeros(len(self.values), np.float32)
        for name, view in self.views(flat).items():
            view[tuple(slice(side) for side in found[name])] = arrays[name]
        self.values[:] = as_vector(flat, self.values)


def _is_within(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) == len(whole) and all(a <= b for a, b in zip(shape, whole, strict=True))
