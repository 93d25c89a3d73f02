"""The Trainer on torch, CPU and CUDA.

The parameters of each level are views into one flat vector, and their gradients into another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import Gradients
from edge_client.backends.base import Level
from edge_client.backends.encoding import Batch
from edge_client.backends.flat import FlatGroup
from edge_client.backends.loading import shared_name
from edge_client.backends.trainer import FlatTrainer, Shape
from edge_client.backends.transformers_tokenizer import TransformersTokenizer
from edge_client.errors import AdapterError, ConfigurationError
from edge_client.factors import Factor
from edge_client.lora import (
    TwoLevelAdapter,
    TwoLevelLoRALinear,
    active_level,
    inject,
    without_common,
)
from edge_client.projected_lora import SharedPairs
from edge_client.tasks.base import Score
from protocol.federation import FederationSettings
from protocol.methods import Hypergradient, PF2LoRA
from quantization.backbone import Backbone, load_backbone, logits_of
from quantization.checkpoint import POSITIONS_KEPT, embedding_count_of, longest_input
from quantization.lookups import CheckedLookups
from quantization.rooms import give_rooms_back
from quantization.tasks import IGNORED

# transformers changes torch's global state while it builds a model: one at a time in a process.
_LOADING: Final = threading.Lock()


def flat_group(parameters: Mapping[str, nn.Parameter], device: str) -> FlatGroup:
    """Make parameters and their gradients views into two new vectors, keeping their values."""
    count = sum(parameter.numel() for parameter in parameters.values())
    group = FlatGroup(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        torch.zeros(count, device=device),
        torch.zeros(count, device=device),
    )
    values, gradients = group.views(group.values), group.views(group.gradients)
    for name, parameter in parameters.items():
        values[name].copy_(parameter.data)
        parameter.data = values[name]
        parameter.grad = gradients[name]
    return group


class TorchTrainer(FlatTrainer):
    """One device's model under a federation's settings (a backends.base.Trainer)."""

    def __init__(
        self, settings: FederationSettings, backbone: Backbone, *, personal_seed: int
    ) -> None:
        self._model: nn.Module = backbone.model
        self._adapter = _adapted(settings, backbone, personal_seed)
        _prove(backbone, self._adapter.layers, settings.task.max_length)
        if settings.training.gradient_checkpointing:
            _checkpoint_gradients(backbone.model)
        self._device = str(backbone.device)
        common = flat_group(self._adapter.common, self._device)
        personal = flat_group(self._adapter.personal, self._device)
        super().__init__(
            settings,
            backbone.fingerprint,
            TransformersTokenizer(backbone.tokenizer, embedding_count_of(backbone.model)),
            Shape(
                tuple(self._adapter.layers),
                self._adapter.head_modules,
                self._adapter.scaling,
                self._adapter.fan_in_fan_out,
            ),
            (common, personal),
            personal_seed=personal_seed,
            length_max=longest_input(backbone.model),
        )

    def gradients(self, batch: Batch) -> Gradients:
        self._common.gradients.zero_()
        self._personal.gradients.zero_()
        total = 0.0
        for part in self._batches.parts(batch):
            loss = self._loss(part) * (part.weight / batch.weight)
            loss.backward()
            give_rooms_back()
            total += float(loss.detach())
        return Gradients(total, self._common.gradients, self._personal.gradients)

    def local_gradients(self, batch: Batch) -> Gradients:
        with without_common(self._model):
            return self.gradients(batch)

    def mixed_product(self, batch: Batch, vector: Tensor) -> Tensor:
        """`[d2 loss / d common d personal] vector`, [P_c], by double backward."""
        common, personal = self._adapter.common.values(), self._adapter.personal.values()
        pieces = self._personal.views(vector).values()
        product = torch.zeros_like(self._common.values)
        into = self._common.views(product).values()
        for part in self._batches.parts(batch):
            loss = self._loss(part) * (part.weight / batch.weight)
            gradients = torch.autograd.grad(loss, list(personal), create_graph=True)
            dot = torch.stack([(g * v).sum() for g, v in zip(gradients, pieces, strict=True)]).sum()
            found = torch.autograd.grad(dot, list(common), allow_unused=True)
            for view, one in zip(into, found, strict=True):
                if one is not None:
                    view += one
        return product

    # --- inside -------------------------------------------------------------------------------

    @torch.no_grad()
    def _logits(self, batch: Batch) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self._with_offset(self._forward(batch)).cpu().numpy()
        return found

    @torch.no_grad()
    def _score(self, batch: Batch) -> Score:
        logits, targets = self._flat(batch)
        kept = targets != IGNORED
        hits = (logits.argmax(-1) == targets)[kept]
        return Score(
            float(functional.cross_entropy(logits, targets, reduction="sum")),
            hits.cpu().numpy(),
            targets[kept].cpu().numpy(),
        )

    def _factors(self, layer: str) -> tuple[Factor, Factor]:
        pair = self._adapter.layers[layer].arrays()
        assert pair is not None  # noqa: S101 - the constructor refuses a layer without ranks
        return pair

    @contextlib.contextmanager
    def _running_on(self, pairs: Mapping[str, tuple[Factor, Factor]]) -> Iterator[None]:
        layers = self._adapter.layers
        try:
            for name, (down, up) in pairs.items():
                layers[name].instead = (self._placed(down), self._placed(up))
            yield
        finally:
            for name in pairs:
                layers[name].instead = None

    def _running_at(self, level: Level) -> contextlib.AbstractContextManager[None]:
        return active_level(self._model, level)

    def _forward(self, batch: Batch) -> Tensor:
        inputs = {name: self._placed(array) for name, array in batch.inputs.items()}
        logits = logits_of(self._model(**inputs), inputs["attention_mask"])
        give_rooms_back()  # a pass is at its highest in the loss
        return logits

    def _placed(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _loss(self, batch: Batch) -> Tensor:
        return functional.cross_entropy(*self._flat(batch))

    def _flat(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [k, classes] and targets [k]."""
        logits, targets = self._rules.compared(self._forward(batch), self._placed(batch.targets))
        return self._with_offset(logits.flatten(0, -2)), targets.flatten()

    def _with_offset(self, logits: Tensor) -> Tensor:
        """Float32 logits, as the loss and answers want them."""
        logits, offset = logits.float(), self._label_offset.now
        return logits if offset is None else logits + self._placed(offset)


def _adapted(
    settings: FederationSettings, backbone: Backbone, personal_seed: int
) -> TwoLevelAdapter:
    """Put the federation's adapter into the backbone, as its method wants it."""
    layout = algorithm_for(settings, personal_seed).layout(settings.adapter)
    shared = None
    if layout.shared_width:
        shared = SharedPairs(
            rank=layout.common_rank,
            width=layout.shared_width,
            slots=layout.slots,
            seed=settings.seed,
            device=backbone.device,
        )
    return inject(
        backbone.model,
        target_modules=settings.adapter.target_modules,
        rank=layout.common_rank,
        personal_rank=layout.personal_rank,
        alpha=settings.adapter.alpha,
        common_seed=settings.seed,
        personal_seed=personal_seed,
        modules_to_train=backbone.head_modules,
        head=layout.head,
        common_factors=layout.common,
        personal_factors=layout.personal,
        shared=shared,
    )


@torch.no_grad()
def _prove(backbone: Backbone, layers: Mapping[str, TwoLevelLoRALinear], length_max: int) -> None:
    """Run the adapted model once, at the longest input if that is near what the model takes.

    Tried, since `longest_input` goes by tables: DeBERTa-v3 has one of 512 rows, which is of
    distances, and takes more tokens.

    Raises:
        ConfigurationError: it does not take as long inputs.
        AdapterError: it does not run with adapters in those layers, or goes past one.
    """
    ids = backbone.tokenizer("The gradient comes back.")["input_ids"]
    positions = getattr(backbone.model.config, "max_position_embeddings", None)
    is_long = positions is not None and length_max > positions - POSITIONS_KEPT
    length = length_max if is_long else min(len(ids), length_max)
    row = torch.tensor([(ids * length)[:length]], device=backbone.device)
    model: nn.Module = backbone.model
    try:
        with CheckedLookups(), _noting_who_runs(model) as ran:
            model(input_ids=row, attention_mask=torch.ones_like(row))
    except Exception as error:  # whatever architectures raise
        if is_long:
            problem = f"the backbone does not take {length} tokens, with its {positions} positions"
            raise ConfigurationError("task.max_length", problem, "a smaller one") from error
        raise AdapterError(f"the backbone fails with adapters in place: {error}") from error
    for name, layer in layers.items():
        # An expert that had no token has not run as a whole.
        if layer not in ran and model.get_submodule(name.rpartition(".")[0]) in ran:
            problem = f"the backbone reads the weight of {name!r} and never runs it"
            raise AdapterError(f"{problem}: choose adapter.target_modules without it")


@contextlib.contextmanager
def _noting_who_runs(model: nn.Module) -> Iterator[set[nn.Module]]:
    ran: set[nn.Module] = set()
    hooks = [one.register_forward_hook(lambda one, *_: ran.add(one)) for one in model.modules()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _checkpoint_gradients(model: Any) -> None:
    """Keep no activations inside blocks; compute them again in the backward pass.

    Raises:
        ConfigurationError: the architecture has no way to.
    """
    # Newer versions of transformers call it by the first name, and drop the second in version 6.
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigurationError(
            "training.gradient_checkpointing", f"{type(model).__name__} has none", "false"
        ) from error
    model.train()  # transformers looks at this; there is no dropout to be switched on


def load_trainer(
    settings: FederationSettings,
    *,
    backbone: str | None,
    scheme: str,
    device: str,
    personal_seed: int,
    compute_dtype: str | None = None,
) -> TorchTrainer:
    """The trainer of a federation, its backbone loaded from its own name or from `backbone`."""
    algorithm = settings.algorithm
    twice = isinstance(algorithm, PF2LoRA) and algorithm.hypergradient is Hypergradient.EXACT
    with _LOADING:
        loaded = load_backbone(
            backbone or shared_name(settings),
            scheme=scheme,
            device=device,
            task=settings.task.kind.value,
            label_count=len(settings.task.labels),
            head_seed=settings.seed,
            # Fused attention has no double backward.
            attention="eager" if twice else None,
            compute_dtype=compute_dtype,
        )
    return TorchTrainer(settings, loaded, personal_seed=personal_seed)
