"""Two levels of LoRA on a frozen model: the common one is federated, the personal one stays here.

Each adapted linear layer with frozen weight W0 [m, n] computes (PF2LoRA, arXiv 2503.03920)

    y = W0 x + s (B A + D C) x        A [r, n]   B [m, r]     common
                                      C [r2, n]  D [m, r2]    personal

`inject` wraps the layers and returns the trainable parameters by level; `active_level` evaluates
with fewer levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_client.backends.base import Level
from edge_client.errors import AdapterError
from edge_client.factors import Factor
from edge_client.target_modules import select_targets
from protocol.federation import Group
from quantization.bnb import is_transposed, linear_shape
from quantization.seeded import factor_start


class TwoLevelLoRALinear(nn.Module):
    """A frozen linear layer of any kind with both low-rank terms, in one product.

    `base` maps [..., n] to [..., m]. The parameters A, B, C, D are float32; those of a level of
    rank 0 are None. A and C start uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5, as PEFT does),
    B and D at zero: the layer starts as its base.
    """

    A: nn.Parameter | None
    B: nn.Parameter | None
    C: nn.Parameter | None
    D: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        personal_rank: int,
        scaling: float,
        name: str = "",
        common_seed: int = 0,
        personal_seed: int = 0,
    ) -> None:
        """Wrap `base`; `name` and the seeds alone determine A and C.

        Raises:
            AdapterError: `base` is no linear layer, or a rank does not fit it.
        """
        super().__init__()
        shape = linear_shape(base)
        if shape is None:
            raise AdapterError(f"{name or 'base'}: {type(base).__name__} is no linear layer")
        _check_ranks(name or "base", shape, rank, personal_rank)
        self.base = base
        self.name = name
        self.out_features, self.in_features = shape
        self.scaling = scaling
        self.level = Level.PERSONAL
        self.without_common = False
        # Factors to run on in place of its own, for a look at them.
        self.instead: tuple[Tensor, Tensor] | None = None
        device = next(base.parameters()).device
        self._add("A", "B", rank, (common_seed, name), device)
        self._add("C", "D", personal_rank, (personal_seed, name), device)

    def _add(
        self, down: str, up: str, rank: int, origin: tuple[int, str], device: torch.device
    ) -> None:
        if rank == 0:
            self.register_parameter(down, None)
            self.register_parameter(up, None)
            return
        factor = torch.from_numpy(factor_start((rank, self.in_features), *origin, down)).to(device)
        zeros = torch.zeros(self.out_features, rank, device=device)
        self.register_parameter(down, nn.Parameter(factor))
        self.register_parameter(up, nn.Parameter(zeros))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., n] to [..., m] in the dtype that the base gives."""
        y: Tensor = self.base(x)
        factors = self.instead or self.factors(self.level)
        if factors is None:
            return y
        down, up = factors
        # The scaling goes where the tensor is narrow: [..., r + r2].
        low = functional.linear(x.to(down.dtype), down) * self.scaling
        return y + functional.linear(low, up).to(y.dtype)

    def factors(self, level: Level) -> tuple[Tensor, Tensor] | None:
        """Return `[A; C]` [k, n] and `[B D]` [m, k] of the levels up to `level`; None if k = 0."""
        common = None if self.without_common else self._common_factors()
        personal = None if self.C is None or self.D is None else (self.C, self.D)
        match [pair for pair in (common, personal)[: level.value] if pair is not None]:
            case []:
                return None
            case [pair]:
                return pair
            case pairs:
                downs, ups = zip(*pairs, strict=True)
                return torch.cat(downs), torch.cat(ups, dim=1)

    def _common_factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.A is None or self.B is None else (self.A, self.B)

    def arrays(self) -> tuple[Factor, Factor] | None:
        """`factors` of both levels in NumPy."""
        pair = self.factors(Level.PERSONAL)
        if pair is None:
            return None
        down, up = (factor.detach().cpu().numpy() for factor in pair)
        return down, up

    @property
    def weight(self) -> Tensor:
        """The base's stored weight: some architectures look at its dtype before a product."""
        return cast(Tensor, self.base.weight)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the checkpoint stores the weight as [n, m] (PEFT's word for GPT-2's layers)."""
        return is_transposed(self.base)

    def extra_repr(self) -> str:
        ranks = [0 if factor is None else factor.shape[0] for factor in (self.A, self.C)]
        return f"rank={ranks[0]}, personal_rank={ranks[1]}, scaling={self.scaling:g}"


def _check_ranks(name: str, shape: tuple[int, int], rank: int, personal_rank: int) -> None:
    if min(rank, personal_rank) < 0 or max(rank, personal_rank) == 0:
        raise AdapterError(f"ranks {rank} and {personal_rank}: one must be positive, none negative")
    if max(rank, personal_rank) > min(shape):
        raise AdapterError(
            f"rank {max(rank, personal_rank)} is too large for layer {name!r} with {shape[0]} "
            f"outputs and {shape[1]} inputs: at most {min(shape)}"
        )


@contextmanager
def active_level(model: nn.Module, level: Level) -> Iterator[None]:
    """Within the block, run the adapted layers of `model` with the levels up to `level` only.

    A trained head is one set of parameters and stays as it is at every level.
    """
    with _all_layers(model, "level", level):
        yield


@contextmanager
def without_common(model: nn.Module) -> Iterator[None]:
    """Within the block, run the adapted layers of `model` without their common level."""
    with _all_layers(model, "without_common", True):
        yield


@contextmanager
def _all_layers(model: nn.Module, attribute: str, value: object) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, TwoLevelLoRALinear)]
    before = [getattr(layer, attribute) for layer in layers]
    for layer in layers:
        setattr(layer, attribute, value)
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            setattr(layer, attribute, previous)


class SharedFactors(Protocol):
    """A common level that all layers have together: projected_lora.py."""

    parameters: dict[str, nn.Parameter]

    def layer(self, base: nn.Module, place: int, count: int, **settings: Any) -> TwoLevelLoRALinear:
        """The adapted layer at a place among so many, counted from the model's input."""


@dataclass(frozen=True, slots=True)
class TwoLevelAdapter:
    """What `inject` put into a model, all dicts in the order of names.

    `common` and `personal` hold every trainable parameter under its name in the model, such as
    `bert.encoder.layer.0.attention.self.query.A`; `layers` the wrapped layers by module name.
    """

    layers: dict[str, TwoLevelLoRALinear]
    common: dict[str, nn.Parameter]
    personal: dict[str, nn.Parameter]
    head_modules: tuple[str, ...]
    scaling: float

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the checkpoint stores weights as [n, m], as GPT-2's does."""
        return any(layer.fan_in_fan_out for layer in self.layers.values())


def inject(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str],
    rank: int,
    personal_rank: int,
    alpha: float,
    common_seed: int,
    personal_seed: int,
    modules_to_train: Sequence[str] = (),
    head: Group = Group.COMMON,
    common_factors: str = "AB",
    personal_factors: str = "CD",
    shared: SharedFactors | None = None,
) -> TwoLevelAdapter:
    """Freeze `model` and wrap its target layers in place.

    `target_modules` is PEFT's: a list of names, each a whole module name or its last parts; a
    regular expression for the whole name; "all-linear", without the output embeddings; or
    "query-value". The modules named in `modules_to_train`, a task's head, are trained themselves,
    in float32, in the group `head`, and nothing inside them is wrapped. Both levels are scaled by
    `alpha / rank`, or `alpha / personal_rank` where `rank` is 0. Factors in neither
    `common_factors` nor `personal_factors` stay frozen. With `shared` the common level is that, and
    `rank` its own.

    Raises:
        AdapterError: no such target, not a linear layer, a rank that does not fit, or an adapter
            is there already.
    """
    scaling = _checked_scaling(model, alpha, rank, personal_rank)
    heads = {name: _submodule(model, name) for name in modules_to_train}
    targets = select_targets(model, target_modules, tuple(heads))
    settings: dict[str, Any] = {
        "personal_rank": personal_rank,
        "scaling": scaling,
        "common_seed": common_seed,
        "personal_seed": personal_seed,
    }
    layers: dict[str, TwoLevelLoRALinear] = {}
    in_order = [name for name, _ in model.named_modules() if name in targets]
    for place, name in enumerate(in_order):
        base = model.get_submodule(name)
        if shared is None:
            layers[name] = TwoLevelLoRALinear(base, rank=rank, name=name, **settings)
        else:
            layers[name] = shared.layer(base, place, len(in_order), name=name, **settings)
    layers = dict(sorted(layers.items()))
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    groups = {
        Group.COMMON: _parameters(layers, common_factors),
        Group.PERSONAL: _parameters(layers, personal_factors),
    }
    groups[head] |= _thaw(heads)
    if shared is not None:
        groups[Group.COMMON] |= shared.parameters
    for layer in layers.values():
        for letter, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(letter in common_factors + personal_factors)
    common, personal = (dict(sorted(groups[group].items())) for group in Group)
    return TwoLevelAdapter(layers, common, personal, tuple(heads), scaling)


def _checked_scaling(model: nn.Module, alpha: float, rank: int, personal_rank: int) -> float:
    if any(isinstance(module, TwoLevelLoRALinear) for module in model.modules()):
        raise AdapterError("the model carries an adapter already")
    if alpha <= 0 or max(rank, personal_rank) <= 0:
        raise AdapterError(f"alpha {alpha}, ranks {rank} and {personal_rank}: must be positive")
    return alpha / (rank or personal_rank)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"module to train {name!r}: the model has none of that name") from error


def _parameters(layers: dict[str, TwoLevelLoRALinear], letters: str) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{letter}": parameter
        for name, layer in layers.items()
        for letter, parameter in layer.named_parameters(recurse=False)
        if letter in letters
    }


def _thaw(heads: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    thawed: dict[str, nn.Parameter] = {}
    for name, module in heads.items():
        module.float().requires_grad_(True)
        thawed |= dict(module.named_parameters(prefix=name))
    return thawed
