"""The Trainer on torch, CPU and CUDA.

The parameters of each level are views into one flat vector, and their gradients into another: an
optimizer step is a few vector operations, and nothing is copied between model and algorithm.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import AlgorithmState, Gradients, LocalResult, train
from edge_client.backends.base import Arrays, Evaluation, Level, Prediction, RankReport
from edge_client.backends.encoding import IGNORED, Batch, EncodedRow, Encoder
from edge_client.data import Example
from edge_client.errors import StateError
from edge_client.lora import AdapterError, active_level, inject, rank_report
from edge_client.peft_export import save_pretrained
from edge_client.splits import batch_indices
from protocol.federation import FederationSettings, TaskKind
from protocol.tensors import NamedTensors, TensorSpec
from quantization.backbone import Backbone, load_backbone

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

    def arrays(self) -> Arrays:
        """Copies, by name."""
        return {
            name: parameter.detach().cpu().numpy().copy()
            for name, parameter in self.parameters.items()
        }

    def load(self, arrays: Mapping[str, np.ndarray[Any, Any]], what: str) -> None:
        """Take over values, in place.

        Raises:
            StateError: the names or shapes are others.
        """
        found = {name: array.shape for name, array in arrays.items()}
        wanted = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if found != wanted:
            differing = sorted(set(found.items()) ^ set(wanted.items()))[:3]
            raise StateError(f"the {what} has other tensors than this model: {differing}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                # A copy first: arrays that came over the wire are read-only.
                parameter.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)))


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
        self._algorithm = algorithm_for(settings)
        self._model: nn.Module = backbone.model
        self._tokenizer: Any = backbone.tokenizer
        self.seed = personal_seed
        levels = self._algorithm.levels(settings.adapter)
        self._adapter = inject(
            backbone.model,
            target_modules=settings.adapter.target_modules,
            rank=levels.common_rank,
            personal_rank=levels.personal_rank,
            alpha=settings.adapter.alpha,
            common_seed=settings.seed,
            personal_seed=personal_seed,
            modules_to_train=backbone.head_modules,
            head=levels.head,
        )
        device = str(backbone.device)
        self._common = FlatGroup(self._adapter.common, device)
        self._personal = FlatGroup(self._adapter.personal, device)
        self._state = AlgorithmState()
        self._encoder = Encoder(backbone.tokenizer, settings.task, device)

    # --- algorithms.base.GradientOracle -------------------------------------------------------

    def gradients(self, batch: Batch) -> Gradients:
        self._common.gradients.zero_()
        self._personal.gradients.zero_()
        loss = self._loss(self._logits(batch), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return Gradients(float(loss.detach()), self._common.gradients, self._personal.gradients)

    @property
    def oracle(self) -> _Oracle:
        """This model as algorithms see it."""
        return _Oracle(self, self._common.values, self._personal.values)

    # --- backends.base.Trainer ----------------------------------------------------------------

    def encode(self, rows: Sequence[Example]) -> list[EncodedRow]:
        return self._encoder.rows(rows)

    def common(self) -> NamedTensors:
        return NamedTensors.from_arrays(self._common.arrays())

    def set_common(self, base: NamedTensors) -> None:
        self._common.load(base.arrays(), "common adapter")

    def update_from(self, base: NamedTensors) -> NamedTensors:
        flat = self._common.values.cpu().numpy() - base.flat()
        dtype = self._settings.update_dtype
        specs = [TensorSpec(s.name, dtype, s.shape) for s in base.specs]
        return NamedTensors.from_flat(specs, flat, dtype)

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

    def train(self, rows: list[EncodedRow], first_step: int) -> LocalResult:
        training = self._settings.training
        batches = batch_indices(
            len(rows), training.batch_size, first_step, training.local_steps, self.seed
        )
        encoded = (self._encoder.batch([rows[i] for i in indices]) for indices in batches)
        # Quantised layers and eager dropout-free models alike: nothing here is random.
        return train(self._algorithm, self.oracle, encoded, self._state, training)

    def evaluate(self, rows: list[EncodedRow], level: Level) -> Evaluation:
        loss_sum, count = 0.0, 0
        right: list[Tensor] = []
        wanted: list[Tensor] = []
        with torch.no_grad(), active_level(self._model, level):
            for batch in self._batches(rows):
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

    def predict(self, rows: Sequence[Example], level: Level) -> list[Prediction]:
        if self._settings.task.kind is TaskKind.CAUSAL_LM:
            raise AdapterError("predict is for classification; use generate for causal-lm")
        names = self._settings.task.labels
        found = []
        with torch.no_grad(), active_level(self._model, level):
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
        with torch.no_grad(), active_level(self._model, level):
            for _ in range(new_tokens_max):
                inputs = torch.tensor([ids], device=self._common.values.device)
                ids.append(int(self._model(input_ids=inputs).logits[0, -1].argmax()))
                if ids[-1] == self._tokenizer.eos_token_id:
                    break
        return str(self._tokenizer.decode(ids[begin:], skip_special_tokens=True))

    def rank_report(self) -> dict[str, RankReport]:
        return {name: rank_report(layer) for name, layer in self._adapter.layers.items()}

    def save_pretrained(self, folder: Path, base_model: str) -> None:
        save_pretrained(
            self._adapter, folder, base_model_name=base_model, task=self._settings.task.kind
        )

    # --- inside -------------------------------------------------------------------------------

    def _batches(self, rows: list[EncodedRow]) -> list[Batch]:
        parts = range(0, len(rows), EVALUATION_BATCH)
        return [self._encoder.batch(rows[at : at + EVALUATION_BATCH]) for at in parts]

    def _logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self._model(**batch.inputs).logits
        return logits

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(*self._flat(logits, targets))

    def _flat(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [k, classes] and targets [k]: a row each, or for causal LM a next token each."""
        if self._settings.task.kind is TaskKind.CAUSAL_LM:
            logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        return logits.float(), targets


class _Oracle:
    """A GradientOracle on a TorchTrainer; its vectors are tensors without autograd."""

    def __init__(self, trainer: TorchTrainer, common: Tensor, personal: Tensor) -> None:
        self.common = common
        self.personal = personal
        self.gradients = trainer.gradients


def load_trainer(
    settings: FederationSettings,
    *,
    backbone: str | None,
    scheme: str,
    device: str,
    personal_seed: int,
) -> TorchTrainer:
    """The trainer of a federation, its backbone loaded from its own name or from `backbone`."""
    with _LOADING:
        loaded = load_backbone(
            backbone or settings.backbone.name,
            scheme=scheme,
            device=device,
            task=settings.task.kind.value,
            label_count=len(settings.task.labels),
            head_seed=settings.seed,
        )
    return TorchTrainer(settings, loaded, personal_seed=personal_seed)
