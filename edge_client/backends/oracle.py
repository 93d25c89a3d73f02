"""A trainer's model as algorithms see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_client.algorithms.base import Vector
from edge_client.backends.flat import FlatGroup
from quantization.names import is_below

if TYPE_CHECKING:
    from edge_client.backends.trainer import FlatTrainer


class Oracle:
    """A GradientOracle on both groups of a trainer; torch's vectors here have no autograd.

    `layers` are those adapted, `head_modules` those of the task's head.
    """

    def __init__(
        self,
        trainer: FlatTrainer,
        common: FlatGroup,
        personal: FlatGroup,
        layers: Sequence[str],
        head_modules: Sequence[str],
    ) -> None:
        self._common = common
        self._personal = personal
        self._layers = layers
        self.common = common.values
        self.personal = personal.values
        self.personal_head = personal.values * 0.0
        for name, view in personal.views(self.personal_head).items():
            view[:] = float(is_below(name, head_modules))
        self.gradients = trainer.gradients
        self.local_gradients = trainer.local_gradients
        self.mixed_product = trainer.mixed_product

    def factors(self, vector: Vector) -> list[tuple[Vector, Vector]]:
        """Views (A, B) of every adapted layer into a vector like the common one."""
        views = self._common.views(vector)
        return [(views[f"{name}.A"], views[f"{name}.B"]) for name in self._layers]

    def personal_factors(self, vector: Vector) -> list[tuple[Vector, Vector]]:
        """Views (C, D) of every adapted layer into a vector like the personal one."""
        views = self._personal.views(vector)
        return [(views[f"{name}.C"], views[f"{name}.D"]) for name in self._layers]
