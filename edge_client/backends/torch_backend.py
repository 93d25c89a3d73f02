"""The Trainer on torch, CPU and CUDA.

The parameters of each level are views into one flat vector, and their gradients into another: an
optimizer step is a few vector operations, and nothing is copied between model and algorithm.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import AlgorithmState, Gradients, LocalResult, train
from edge_client.algorithms.schedule import plans
from edge_client.backends.base import (
    Arrays,
    Evaluation,
    Export,
    Level,
    Prediction,
    RankReport,
)
from edge_client.backends.encoding import IGNORED, Batch, EncodedRow, Encoder
from edge_client.data import Example
from edge_client.errors import StateError
from edge_client.lora import (
    AdapterError,
    active_level,
    cut,
    factors_in_place,
    inject,
    rank_report,
)
from edge_client.peft_export import save_pretrained
from edge_client.splits import batch_indices
from protocol.federation import (
    FederationSettings,
    OptimizerState,
    TaskKind,
    WireDtype,
)
from protocol.methods import HetLoRA, Hypergradient, PF2LoRA
from protocol.tensors import NamedTensors, TensorSpec, truncated
from quantization.backbone import Backbone, load_backbone
from quantization.bnb import is_below

EVALUATION_BATCH: Final = 64
# transformers changes torch's global state while it builds a model: one at a time in a process.
_LOADING: Final = threading.Lock()


class FlatGroup:
    """Some parameters and their gradients, as views into two flat vectors [P]."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: str) -> None:
        self.parameters = dict(parameters)
        count = sum(parameter.numel() for parameter in self.parameters.values())
        self.values = torch.zeros(count, device=device)
        self.gradients = torch.zeros(count, device=device)
        at = 0
        for parameter in self.parameters.values():
            end = at + parameter.numel()
            view = self.values[at:end].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.gradients[at:end].view(parameter.shape)
            at = end

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector like `values`, cut into the parameters' shapes; views, by name."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        parts = zip(self.parameters.items(), torch.split(vector, sizes), strict=True)
        return {name: part.view(parameter.shape) for (name, parameter), part in parts}

    def arrays(self) -> Arrays:
        """Copies, by name."""
        return {
            name: parameter.detach().cpu().numpy().copy()
            for name, parameter in self.parameters.items()
        }

    def load(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], what: str, *, fill_up: bool = False
    ) -> None:
        """Take over values, in place; with `fill_up` smaller ones too, zeros behind them.

        Raises:
            StateError: the names or shapes are others.
        """
        found = {name: array.shape for name, array in arrays.items()}
        wanted = {name: tuple(p.shape) for name, p in self.parameters.items()}
        fits = found.keys() == wanted.keys() and all(
            found[name] == shape or (fill_up and _is_within(found[name], shape))
            for name, shape in wanted.items()
        )
        if not fits:
            differing = sorted(set(found.items()) ^ set(wanted.items()))[:3]
            raise StateError(f"the {what} has other tensors than this model: {differing}")
        self.values.zero_()
        views = self.views(self.values)
        for name, array in arrays.items():
            corner = tuple(slice(side) for side in array.shape)
            # A copy first: arrays that came over the wire are read-only.
            views[name][corner] = torch.from_numpy(np.array(array, dtype=np.float32))


class TorchTrainer:
    """One device's model under a federation's settings (a backends.base.Trainer).

    The common adapter starts alike on all devices, from the federation's seed; `personal_seed`
    is this device's own, for its personal adapter and its batches.
    """

    def __init__(
        self, settings: FederationSettings, backbone: Backbone, *, personal_seed: int
    ) -> None:
        self.fingerprint = backbone.fingerprint
        self._settings = settings
        self._algorithm = algorithm_for(settings, personal_seed)
        self._model: nn.Module = backbone.model
        self._tokenizer: Any = backbone.tokenizer
        self._seed = personal_seed
        layout = self._algorithm.layout(settings.adapter)
        self._adapter = inject(
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
        )
        if settings.training.gradient_checkpointing:
            _checkpoint_gradients(backbone.model)
        device = str(backbone.device)
        self._common = FlatGroup(self._adapter.common, device)
        self._personal = FlatGroup(self._adapter.personal, device)
        self._personal_head = torch.zeros_like(self._personal.values)
        for name, view in self._personal.views(self._personal_head).items():
            view.fill_(is_below(name, self._adapter.head_modules))
        self._state = AlgorithmState()
        self._own_common: Tensor | None = None  # at the personal level, where a method adapts it
        self._personal_start = self._personal.arrays()
        self._encoder = Encoder(backbone.tokenizer, settings.task, device)

    def become(self, seed: int) -> None:
        """Be another device, one that has just begun: for simulations of many in one process."""
        self._seed = seed
        self._algorithm = algorithm_for(self._settings, seed)
        self._state = AlgorithmState()
        self._own_common = None
        self._personal.load(self._personal_start, "personal adapter")
        for layer in self._adapter.layers.values():
            layer.restart_personal(seed)

    # --- algorithms.base.GradientOracle -------------------------------------------------------

    def gradients(self, batch: Batch) -> Gradients:
        self._common.gradients.zero_()
        self._personal.gradients.zero_()
        total = 0.0
        for part in self._parts(batch):
            loss = self._loss(part) * (part.weight / batch.weight)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return Gradients(total, self._common.gradients, self._personal.gradients)

    def mixed_product(self, batch: Batch, vector: Tensor) -> Tensor:
        """`[d2 loss / d common d personal] vector`, [P_c], by double backward."""
        common = list(self._common.parameters.values())
        personal = list(self._personal.parameters.values())
        pieces = list(self._personal.views(vector).values())
        product = torch.zeros_like(self._common.values)
        into = self._common.views(product)
        for part in self._parts(batch):
            loss = self._loss(part) * (part.weight / batch.weight)
            gradients = torch.autograd.grad(loss, personal, create_graph=True)
            dot = torch.stack([(g * v).sum() for g, v in zip(gradients, pieces, strict=True)]).sum()
            found = torch.autograd.grad(dot, common, allow_unused=True)
            for view, one in zip(into.values(), found, strict=True):
                if one is not None:
                    view += one
        return product

    def factors(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views (A, B) of every adapted layer into a vector like the common one."""
        views = self._common.views(vector)
        return [(views[f"{name}.A"], views[f"{name}.B"]) for name in self._adapter.layers]

    def personal_factors(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views (C, D) of every adapted layer into a vector like the personal one."""
        views = self._personal.views(vector)
        return [(views[f"{name}.C"], views[f"{name}.D"]) for name in self._adapter.layers]

    @property
    def oracle(self) -> _Oracle:
        """This model as algorithms see it."""
        return _Oracle(self, self._common.values, self._personal.values, self._personal_head)

    # --- backends.base.Trainer ----------------------------------------------------------------

    def encode(self, rows: Sequence[Example]) -> list[EncodedRow]:
        return self._encoder.rows(rows)

    def common(self) -> NamedTensors:
        return NamedTensors.from_arrays(self._common.arrays())

    def set_common(self, base: NamedTensors) -> None:
        fill_up = isinstance(self._settings.algorithm, HetLoRA)
        self._common.load(base.arrays(), "common adapter", fill_up=fill_up)
        self._own_common = None

    def update_from(self, base: NamedTensors) -> NamedTensors:
        dtype = self._settings.update_dtype
        if not self.rank:
            flat = self._common.values.cpu().numpy() - base.flat()
            return self._encoded(base.specs, flat, dtype)
        own = truncated(self.common(), self.rank).arrays()
        before = truncated(base, self.rank).arrays()
        return NamedTensors.from_arrays({n: own[n] - before[n] for n in own}, dtype)

    @property
    def rank(self) -> int:
        return self._algorithm.rank(self._state)

    def personal(self) -> Arrays:
        return self._personal.arrays()

    def set_personal(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._personal.load(arrays, "personal adapter")

    def optimizer_state(self) -> Arrays:
        return {name: v.cpu().numpy().copy() for name, v in self._state.vectors.items()}

    def set_optimizer_state(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        device = self._common.values.device
        self._state.vectors = {
            name: torch.from_numpy(np.array(array)).to(device) for name, array in arrays.items()
        }

    def train(self, rows: list[EncodedRow], first_step: int, round_number: int = 1) -> LocalResult:
        if self._settings.training.optimizer_state is OptimizerState.RESET:
            self._state.forget_moments()
        # Without dropout, quantised or not: nothing here is random.
        return train(
            self._algorithm,
            self.oracle,
            self._stream(rows, first_step * self._algorithm.batches_per_step),
            self._state,
            plans(self._settings, round_number),
        )

    def personalise(self, rows: list[EncodedRow]) -> None:
        shared = self._common.values.clone()
        self._algorithm.personalise(self.oracle, self._stream(rows, 0))
        if not torch.equal(shared, self._common.values):
            self._own_common = self._common.values.clone()
            self._common.values.copy_(shared)

    def evaluate(self, rows: list[EncodedRow], level: Level) -> Evaluation:
        with self._at(level):
            return self._evaluate(rows)

    def predict(self, rows: Sequence[Example], level: Level) -> list[Prediction]:
        if self._settings.task.kind is TaskKind.CAUSAL_LM:
            raise AdapterError("predict is for classification; use generate for causal-lm")
        names = self._settings.task.labels
        found = []
        with torch.no_grad(), self._at(level):
            for batch in self._batches(self.encode(rows)):
                for row in self._logits(batch).float().softmax(-1).cpu():
                    found.append(Prediction(names[int(row.argmax())], tuple(row.tolist())))
        return found

    def generate(self, prompt: str, new_tokens_max: int, level: Level = Level.PERSONAL) -> str:
        """The likeliest continuation of a prompt, token by token (causal LM)."""
        if self._settings.task.kind is not TaskKind.CAUSAL_LM:
            raise AdapterError("generate is for causal-lm; use predict for classification")
        ids = list(self._tokenizer(prompt)["input_ids"])
        begin = len(ids)
        with torch.no_grad(), self._at(level):
            for _ in range(new_tokens_max):
                inputs = torch.tensor([ids], device=self._common.values.device)
                ids.append(int(self._model(input_ids=inputs).logits[0, -1].argmax()))
                if ids[-1] == self._tokenizer.eos_token_id:
                    break
        return str(self._tokenizer.decode(ids[begin:], skip_special_tokens=True))

    def rank_report(self) -> dict[str, RankReport]:
        return {name: rank_report(layer) for name, layer in self._adapter.layers.items()}

    def save_pretrained(
        self, folder: Path, base_model: str, ranks: Mapping[str, int], rows: list[EncodedRow]
    ) -> Export:
        layers = self._adapter.layers
        full = self.evaluate(rows, Level.PERSONAL) if rows else None
        with self._at(Level.PERSONAL):
            smaller = {name: cut(layers[name], rank) for name, rank in ranks.items()}
            save_pretrained(
                self._adapter,
                folder,
                base_model_name=base_model,
                task=self._settings.task.kind,
                cut=smaller,
            )
            written = full
            if rows and smaller:
                with factors_in_place({layers[name]: pair for name, pair in smaller.items()}):
                    written = self._evaluate(rows)
        every = self._algorithm.layout(self._settings.adapter)
        whole = every.common_rank + every.personal_rank
        return Export({name: ranks.get(name, whole) for name in layers}, full, written)

    # --- inside -------------------------------------------------------------------------------

    def _encoded(
        self, specs: Sequence[TensorSpec], flat: np.ndarray[Any, Any], dtype: WireDtype
    ) -> NamedTensors:
        """An update in a wire dtype; what a lossy one loses is added to the next (error feedback).

        Karimireddy et al. 2019 (arXiv 1901.09847), algorithm 2.
        """
        if dtype.is_plain:
            return NamedTensors.from_flat(specs, flat, dtype)
        if (lost := self._state.vectors.get("feedback")) is not None:
            flat = flat + lost.cpu().numpy()
        update = NamedTensors.from_flat(specs, flat, dtype)
        rest = torch.from_numpy(flat - update.flat())
        self._state.vectors["feedback"] = rest.to(self._common.values.device)
        return update

    def _evaluate(self, rows: list[EncodedRow]) -> Evaluation:
        loss_sum, count = 0.0, 0
        right: list[Tensor] = []
        wanted: list[Tensor] = []
        with torch.no_grad():
            for batch in self._batches(sorted(rows, key=lambda row: len(row.ids))):
                logits, targets = self._flat(self._logits(batch), batch.targets)
                kept = targets != IGNORED
                loss_sum += float(functional.cross_entropy(logits, targets, reduction="sum"))
                count += int(kept.sum())
                right.append((logits.argmax(-1) == targets)[kept].cpu())
                wanted.append(targets[kept].cpu())
        hits, labels = torch.cat(right).double(), torch.cat(wanted)
        recalls = [float(hits[labels == label].mean()) for label in set(labels.tolist())]
        return Evaluation(
            len(rows), loss_sum / count, float(hits.mean()), sum(recalls) / len(recalls)
        )

    @contextlib.contextmanager
    def _at(self, level: Level) -> Iterator[None]:
        """Within the block the model is what it is at that level."""
        shared = None
        if level is Level.PERSONAL and self._own_common is not None:
            shared = self._common.values.clone()
            self._common.values.copy_(self._own_common)
        try:
            with active_level(self._model, level):
                yield
        finally:
            if shared is not None:
                self._common.values.copy_(shared)

    def _stream(self, rows: list[EncodedRow], first: int) -> Iterator[Batch]:
        """Training batches from the first-th on, without end."""
        size = self._settings.training.batch_size
        for number in count(first):
            (indices,) = batch_indices(len(rows), size, number, 1, self._seed)
            chosen = [rows[i] for i in indices]
            if self._settings.training.micro_batch_size:
                chosen.sort(key=lambda row: len(row.ids))  # so that parts are padded little
            yield self._encoder.batch(chosen)

    def _batches(self, rows: list[EncodedRow]) -> list[Batch]:
        parts = range(0, len(rows), EVALUATION_BATCH)
        return [self._encoder.batch(rows[at : at + EVALUATION_BATCH]) for at in parts]

    def _parts(self, batch: Batch) -> list[Batch]:
        return batch.split(self._settings.training.micro_batch_size)

    def _logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self._model(**batch.inputs).logits
        return logits

    def _loss(self, batch: Batch) -> Tensor:
        return functional.cross_entropy(*self._flat(self._logits(batch), batch.targets))

    def _flat(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [k, classes] and targets [k]: a row each, or for causal LM a next token each."""
        if self._settings.task.kind is TaskKind.CAUSAL_LM:
            logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        return logits.float(), targets


class _Oracle:
    """A GradientOracle on a TorchTrainer; its vectors are tensors without autograd."""

    def __init__(
        self, trainer: TorchTrainer, common: Tensor, personal: Tensor, personal_head: Tensor
    ) -> None:
        self.common = common
        self.personal = personal
        self.personal_head = personal_head
        self.gradients = trainer.gradients
        self.mixed_product = trainer.mixed_product
        self.factors = trainer.factors
        self.personal_factors = trainer.personal_factors


def _is_within(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) == len(whole) and all(a <= b for a, b in zip(shape, whole, strict=True))


def _checkpoint_gradients(model: Any) -> None:
    """Keep no activations inside blocks; compute them again in the backward pass."""
    # Newer versions of transformers call it by the first name, and drop the second in version 6.
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
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
            backbone or settings.backbone.name,
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
