"""What every Trainer does alike, whatever runs its model: levels, training, updates, evaluations.

A runtime's own part is small: the gradients of a batch, its logits or scores at a level, and each
layer's factors. Vectors are NumPy's or torch's; nothing here imports torch.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import (
    AlgorithmState,
    Gradients,
    LocalResult,
    Vector,
    nothing,
    train,
)
from edge_client.algorithms.schedule import plans
from edge_client.algorithms.vectors import as_numpy, as_vector
from edge_client.backends.base import (
    Arrays,
    Evaluation,
    Export,
    FoundAnswer,
    LabelMix,
    Level,
    Prediction,
)
from edge_client.backends.batches import Batches
from edge_client.backends.encoding import Batch, EncodedRow, EncodedRows, Tokenizer
from edge_client.backends.flat import FlatGroup
from edge_client.backends.label_offset import LabelOffset
from edge_client.backends.oracle import Oracle
from edge_client.data import Example
from edge_client.factors import Factor, RankReport, cut, rank_report
from edge_client.peft_export import save_pretrained
from edge_client.tasks import rules_for
from edge_client.tasks.base import Model, Score
from protocol.federation import FederationSettings, Group, OptimizerState, WireDtype
from protocol.methods import HetLoRA
from protocol.peft_layout import PeftAdapter
from protocol.tensors import NamedTensors, TensorSpec, truncated
from quantization.names import is_below
from quantization.seeded import start_of


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's adapter: its layers, the modules of the task's head, and what scales the levels."""

    layers: tuple[str, ...]
    head_modules: tuple[str, ...]
    scaling: float
    fan_in_fan_out: bool


class FlatTrainer(abc.ABC):
    """A backends.base.Trainer on two flat groups of trainable arrays.

    The common adapter starts alike on all devices, from the federation's seed; `personal_seed`
    is this device's own, for its personal adapter and its batches. `length_max` is the longest
    input, where the model has one.
    """

    evaluation_batch: ClassVar[int] = 64

    def __init__(
        self,
        settings: FederationSettings,
        fingerprint: str,
        tokenizer: Tokenizer,
        shape: Shape,
        groups: tuple[FlatGroup, FlatGroup],
        *,
        personal_seed: int,
        length_max: int | None,
    ) -> None:
        self.fingerprint = fingerprint
        self._settings = settings
        self._tokenizer = tokenizer
        self._shape = shape
        self._length_max = length_max
        self._seed = personal_seed
        self._algorithm = algorithm_for(settings, personal_seed)
        self._common, self._personal = groups
        self._state = AlgorithmState()
        self._own_common: Vector | None = None  # at the personal level, where a method adapts it
        self._rules = rules_for(settings.task)
        self._batches = Batches(settings.training, self._rules, tokenizer, self.evaluation_batch)
        head = self._algorithm.layout(settings.adapter).head
        self._label_offset = LabelOffset(settings.task, head_is_personal=head is Group.PERSONAL)

    def become(self, seed: int) -> None:
        """Be another device, one that has just begun: for simulations of many in one process."""
        self._seed = seed
        self._algorithm = algorithm_for(self._settings, seed)
        self._state = AlgorithmState()
        self._own_common = None
        self._label_offset.forget()
        start = {
            name: start_of(name, shape, self._shape.head_modules, self._settings.seed, seed)
            for name, shape in self._personal.shapes.items()
        }
        self._personal.load(start, "personal adapter")

    # --- a runtime's own part -----------------------------------------------------------------

    @abc.abstractmethod
    def gradients(self, batch: Batch) -> Gradients:
        """Mean loss of a batch, worked through in parts if the federation says so; gradients."""

    @abc.abstractmethod
    def local_gradients(self, batch: Batch) -> Gradients:
        """`gradients` without the common level.

        Raises:
            ConfigurationError: this backend cannot.
        """

    @abc.abstractmethod
    def mixed_product(self, batch: Batch, vector: Vector) -> Vector:
        """`[d2 loss / d common d personal] vector`, [P_c].

        Raises:
            ConfigurationError: this backend has first-order gradients only.
        """

    @abc.abstractmethod
    def _logits(self, batch: Batch) -> np.ndarray[Any, Any]:
        """Float32 logits at the present level, as the kind of task has them."""

    @abc.abstractmethod
    def _score(self, batch: Batch) -> Score:
        """How well the present level foretells a batch's targets."""

    @abc.abstractmethod
    def _factors(self, layer: str) -> tuple[Factor, Factor]:
        """`[A; C]` [k, n] and `[B D]` [m, k] of a layer."""

    @abc.abstractmethod
    def _running_on(
        self, pairs: Mapping[str, tuple[Factor, Factor]]
    ) -> contextlib.AbstractContextManager[None]:
        """Within the block layers run on other factors, of ranks up to r + r2."""

    @abc.abstractmethod
    def _running_at(self, level: Level) -> contextlib.AbstractContextManager[None]:
        """Within the block the adapted layers run with the levels up to `level` only."""

    # --- backends.base.Trainer ----------------------------------------------------------------

    def encode(self, rows: Sequence[Example]) -> EncodedRows:
        return self._rules.encode_all(rows, self._tokenizer)

    def common(self) -> NamedTensors:
        return NamedTensors.from_arrays(self._common.arrays())

    def set_common(self, base: NamedTensors) -> None:
        fill_up = isinstance(self._settings.algorithm, HetLoRA)
        self._common.load(base.arrays(), "common adapter", fill_up=fill_up)
        self._own_common = None

    def frozen(self) -> Arrays:
        """Those common factors that the method leaves as they were drawn, and so never sends."""
        layout = self._algorithm.layout(self._settings.adapter)
        if not layout.common_rank or "A" in layout.common + layout.personal:
            return {}
        downs = {name: self._factors(name)[0] for name in self._shape.layers}
        return {f"{name}.A": down[: layout.common_rank] for name, down in downs.items()}

    def update_from(self, base: NamedTensors) -> NamedTensors:
        dtype = self._settings.update_dtype
        if not self.rank:
            return self._encoded(base.specs, as_numpy(self._common.values) - base.flat(), dtype)
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
        return {name: as_numpy(vector).copy() for name, vector in self._state.vectors.items()}

    def set_optimizer_state(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._state.vectors = {
            # A copy: arrays out of a file are read-only.
            name: as_vector(np.array(array, np.float32), self._common.values)
            for name, array in arrays.items()
        }

    def train(
        self,
        rows: EncodedRows,
        first_step: int,
        round_number: int = 1,
        before_step: Callable[[], None] = nothing,
    ) -> LocalResult:
        self._label_offset.learn(self._rules.log_shares(rows))
        if self._settings.training.optimizer_state is OptimizerState.RESET:
            self._state.forget_moments()
        # Without dropout, quantised or not: nothing here is random.
        return train(
            self._algorithm,
            self.oracle,
            self._batches.to_train(rows, first_step * self._algorithm.batches_per_step, self._seed),
            self._state,
            plans(self._settings, round_number),
            before_step,
        )

    def personalise(self, rows: EncodedRows) -> None:
        self._label_offset.learn(self._rules.log_shares(rows))
        shared = self._common.values * 1.0
        try:
            self._algorithm.personalise(self.oracle, self._batches.to_train(rows, 0, self._seed))
            if bool((shared != self._common.values).any()):
                self._own_common = self._common.values * 1.0
        finally:
            self._common.values[:] = shared

    def evaluate(self, rows: EncodedRows, level: Level, mix: LabelMix = LabelMix.OWN) -> Evaluation:
        with self._at(level), self._label_offset.answering(mix):
            return self._evaluate(rows)

    def predict(
        self, rows: Sequence[Example], level: Level, mix: LabelMix = LabelMix.OWN
    ) -> list[Prediction] | list[FoundAnswer]:
        with self._at(level), self._label_offset.answering(mix):
            return self._rules.predict(rows, self._model_now)

    def generate(self, prompt: str, new_tokens_max: int, level: Level = Level.PERSONAL) -> str:
        """The likeliest continuation of a prompt, token by token (causal LM).

        Raises:
            DataError: the prompt has no token, or more than the model takes.
        """
        with self._at(level):
            return self._rules.generate(prompt, new_tokens_max, self._model_now)

    def rank_report(self) -> dict[str, RankReport]:
        return {name: rank_report(*self._factors(name)) for name in self._shape.layers}

    def save_pretrained(
        self, folder: Path, base_model: str, ranks: Mapping[str, int], rows: EncodedRows
    ) -> Export:
        with self._at(Level.PERSONAL), self._label_offset.left_out():  # as PEFT will answer
            full = self._evaluate(rows) if rows else None
            trained = self._trained()
            smaller = {name: cut(*trained.factors[name], rank) for name, rank in ranks.items()}
            written = replace(trained, factors={**trained.factors, **smaller})
            save_pretrained(
                written, folder, base_model_name=base_model, task=self._settings.task.kind
            )
            after = full
            if rows and smaller:
                with self._running_on(smaller):
                    after = self._evaluate(rows)
        return Export({n: len(down) for n, (down, _) in written.factors.items()}, full, after)

    # --- for who looks at single steps -------------------------------------------------------

    @property
    def oracle(self) -> Oracle:
        """This model as algorithms see it; made anew, since one that is kept keeps the model."""
        shape = self._shape
        return Oracle(self, self._common, self._personal, shape.layers, shape.head_modules)

    def batch(self, rows: Sequence[EncodedRow]) -> Batch:
        """Rows padded to the longest of them, with their targets."""
        return self._batches.of(rows)

    # --- inside -------------------------------------------------------------------------------

    def _trained(self) -> PeftAdapter:
        shape = self._shape
        arrays = self._common.arrays() | self._personal.arrays()
        return PeftAdapter(
            {name: self._factors(name) for name in shape.layers},
            {name: array for name, array in arrays.items() if is_below(name, shape.head_modules)},
            shape.head_modules,
            shape.scaling,
            shape.fan_in_fan_out,
        )

    def _encoded(
        self, specs: Sequence[TensorSpec], flat: np.ndarray[Any, Any], dtype: WireDtype
    ) -> NamedTensors:
        """An update in a wire dtype; what a lossy one loses is added to the next (error feedback).

        Karimireddy et al. 2019 (arXiv 1901.09847), algorithm 2.
        """
        if dtype.is_plain:
            return NamedTensors.from_flat(specs, flat, dtype)
        if (lost := self._state.vectors.get("feedback")) is not None:
            flat = flat + as_numpy(lost)
        update = NamedTensors.from_flat(specs, flat, dtype)
        self._state.vectors["feedback"] = as_vector(flat - update.flat(), self._common.values)
        return update

    @property
    def _model_now(self) -> Model:
        batches = self._batches.to_evaluate
        return Model(self._tokenizer, batches, self._score, self._logits, self._length_max)

    def _evaluate(self, rows: EncodedRows) -> Evaluation:
        return self._rules.evaluate(rows, self._model_now)

    @contextlib.contextmanager
    def _at(self, level: Level) -> Iterator[None]:
        """Within the block the model is what it is at that level."""
        shared = None
        if level is Level.PERSONAL and self._own_common is not None:
            shared = self._common.values * 1.0
            self._common.values[:] = self._own_common
        try:
            with self._running_at(level):
                yield
        finally:
            if shared is not None:
                self._common.values[:] = shared
