"""One LoRA for layers of any widths, on torch: shared_adapter.py has the formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edge_client.lora import TwoLevelLoRALinear
from edge_client.shared_adapter import shared_factor_start, shared_shapes, slot_of
from quantization.seeded import projection_start


class ProjectedLoRALinear(TwoLevelLoRALinear):
    """A frozen linear layer whose common level is a shared pair between own projections.

    P and Q are drawn from the common seed and the layer's widths, and begin alike in layers of
    equal widths. The pair's B begins at zero, and the layer as its base.
    """

    def __init__(
        self, base: nn.Module, pair: tuple[nn.Parameter, nn.Parameter], **settings: Any
    ) -> None:
        super().__init__(base, rank=0, **settings)
        # In a tuple, so that no layer owns them: the adapter does.
        self._pair = pair
        width, seed = pair[0].shape[1], settings["common_seed"]
        self.P = nn.Parameter(self._projection((width, self.in_features), seed, "P"))
        self.Q = nn.Parameter(self._projection((self.out_features, width), seed, "Q"))

    def _projection(self, shape: tuple[int, int], seed: int, letter: str) -> Tensor:
        return torch.from_numpy(projection_start(shape, seed, letter)).to(self._pair[0].device)

    def _common_factors(self) -> tuple[Tensor, Tensor]:
        down, up = self._pair
        # Divided here, so that a step moves the projections as little as it moves other factors.
        return down @ self.P / math.sqrt(self.in_features), self.Q @ up / math.sqrt(len(up))

    def extra_repr(self) -> str:
        rank, width = self._pair[0].shape
        return f"{super().extra_repr()}, shared_rank={rank}, shared_width={width}"


class SharedPairs:
    """The common adapter of a federation whose backbones differ (a lora.SharedFactors)."""

    def __init__(
        self, *, rank: int, width: int, slots: int, seed: int, device: torch.device
    ) -> None:
        self.parameters = {
            name: nn.Parameter(torch.from_numpy(shared_factor_start(name, shape, seed)).to(device))
            for name, shape in shared_shapes(rank, width, slots).items()
        }
        self._slots = slots

    def layer(
        self, base: nn.Module, place: int, count: int, **settings: Any
    ) -> ProjectedLoRALinear:
        slot = slot_of(place, count, self._slots)
        pair = self.parameters[f"shared.{slot}.A"], self.parameters[f"shared.{slot}.B"]
        return ProjectedLoRALinear(base, pair, **settings)
