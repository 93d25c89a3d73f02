"""The Trainer on plain onnxruntime and NumPy: no torch, no transformers.

An artifact holds the gradient graph, compiled once by whoever owns the backbone
(quantization/artifact.py). Its adapter inputs and gradient outputs are views into two flat vectors
for each level, so that optimizers and algorithms are NumPy on those vectors, and nothing is copied.
Gradients are of first order only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import Gradients, Layout, Vector
from edge_client.backends.base import Arrays, Level
from edge_client.backends.encoding import Batch
from edge_client.backends.fast_tokenizer import FastTokenizer
from edge_client.backends.flat import FlatGroup
from edge_client.backends.ort_graphs import EvaluationGraph, GradientGraph
from edge_client.backends.trainer import FlatTrainer, Shape
from edge_client.errors import ConfigurationError
from edge_client.factors import Factor
from edge_client.tasks.base import Score, cross_entropy
from protocol.federation import FederationSettings, Group
from protocol.fingerprints import difference
from protocol.methods import Hypergradient, PF2LoRA, PFedLoRA
from quantization.artifact import LABEL_OFFSET, SCALE, TARGETS, Artifact, load_artifact
from quantization.manifest import Manifest
from quantization.seeded import start_of
from quantization.tasks import IGNORED
from quantization.tokenizer_digest import with_tokenizer

_FIRST_ORDER = "secant, finite_difference or first_order"


class OrtTrainer(FlatTrainer):
    """One device's model under a federation's settings (a backends.base.Trainer)."""

    evaluation_batch: ClassVar[int] = 16  # logits and activations are all that grows with it

    def __init__(
        self,
        settings: FederationSettings,
        artifact: Artifact,
        tokenizer: FastTokenizer,
        *,
        personal_seed: int,
    ) -> None:
        manifest, adapter = artifact.manifest, settings.adapter
        layout = algorithm_for(settings, personal_seed).layout(adapter)
        starts = {
            name: start_of(name, shape, manifest.head_modules, settings.seed, personal_seed)
            for name, shape in manifest.trainable(layout.common_rank, layout.personal_rank).items()
        }
        names = _groups(manifest, layout, starts)
        groups = [_group({name: starts[name] for name in level}) for level in names]
        trained = [group.views(group.values) for group in groups]
        gradients = [group.views(group.gradients) for group in groups]
        scaling = adapter.alpha / (layout.common_rank or layout.personal_rank)
        self._scale = np.array(scaling, np.float32)
        self._arrays: Arrays = starts | trained[0] | trained[1]
        self._artifact = artifact
        self._level = Level.PERSONAL
        self._gradient_graph = GradientGraph(
            artifact, {SCALE: self._scale, **self._arrays}, gradients[0] | gradients[1]
        )
        self._evaluation_graph: EvaluationGraph | None = None
        super().__init__(
            settings,
            _fingerprint(artifact, tokenizer),
            tokenizer,
            Shape(
                tuple(layer.name for layer in manifest.layers),
                manifest.head_modules,
                scaling,
                any(layer.transposed for layer in manifest.layers),
            ),
            (groups[0], groups[1]),
            personal_seed=personal_seed,
            length_max=manifest.length_max,
        )

    def gradients(self, batch: Batch) -> Gradients:
        common, personal = self._common.gradients, self._personal.gradients
        parts = self._batches.parts(batch)
        if len(parts) == 1:
            return Gradients(self._run(batch), common, personal)
        total, sums = 0.0, (common * 0.0, personal * 0.0)
        for part in parts:
            share = part.weight / batch.weight
            total += share * self._run(part)
            for into, found in zip(sums, (common, personal), strict=True):
                into += share * found
        common[:], personal[:] = sums
        return Gradients(total, common, personal)

    def local_gradients(self, batch: Batch) -> Gradients:  # noqa: ARG002
        raise ConfigurationError(
            "backend", "ort has no gradients without the common level", "torch"
        )

    def mixed_product(self, batch: Batch, vector: Vector) -> Vector:  # noqa: ARG002
        raise ConfigurationError(
            "algorithm.hypergradient", "the ort backend has no second derivatives", _FIRST_ORDER
        )

    # --- inside -------------------------------------------------------------------------------

    def _run(self, batch: Batch) -> float:
        given = {**self._inputs(batch), TARGETS: batch.targets}
        if self._artifact.manifest.label_count:
            given[LABEL_OFFSET] = self._label_offset.or_zeros()
        return self._gradient_graph.run(given)

    def _inputs(self, batch: Batch) -> Arrays:
        return {name: batch.inputs[name] for name in self._artifact.manifest.batch_inputs}

    def _logits(self, batch: Batch) -> np.ndarray[Any, Any]:
        if self._evaluation_graph is None:
            self._evaluation_graph = EvaluationGraph(self._artifact)
        given = {**self._inputs(batch), **self._at_present_level()}
        return self._label_offset.added_to(self._evaluation_graph.run(given))

    def _at_present_level(self) -> Arrays:
        arrays = {SCALE: self._scale, **self._arrays}
        first = self._artifact.manifest.layers[0].name
        if self._level is Level.COMMON and len(arrays[f"{first}.A"]):
            for layer in self._artifact.manifest.layers:
                arrays |= {
                    f"{layer.name}.C": np.empty((0, layer.inputs), np.float32),
                    f"{layer.name}.D": np.empty((layer.outputs, 0), np.float32),
                }
        elif self._level is not Level.PERSONAL:
            arrays[SCALE] = np.zeros((), np.float32)
        return arrays

    def _score(self, batch: Batch) -> Score:
        logits, targets = self._rules.compared(self._logits(batch), batch.targets)
        kept = targets != IGNORED
        logits, targets = logits[kept], targets[kept]
        losses = cross_entropy(logits, targets)
        return Score(float(losses.sum(dtype=np.float64)), logits.argmax(-1) == targets, targets)

    def _factors(self, layer: str) -> tuple[Factor, Factor]:
        a, b, c, d = (self._arrays[f"{layer}.{letter}"] for letter in "ABCD")
        return np.concatenate([a, c]), np.concatenate([b, d], axis=1)

    def _put_factors(self, layer: str, down: Factor, up: Factor) -> None:
        """Take over factors; what lies beyond their rank is zero."""
        a, b, c, d = (self._arrays[f"{layer}.{letter}"] for letter in "ABCD")
        at = 0
        for below, above in ((a, b), (c, d)):
            size = min(len(below), len(down) - at)
            below[:size], above[:, :size] = down[at : at + size], up[:, at : at + size]
            below[size:], above[:, size:] = 0.0, 0.0
            at += size

    @contextlib.contextmanager
    def _running_on(self, pairs: Mapping[str, tuple[Factor, Factor]]) -> Iterator[None]:
        kept = {layer: self._factors(layer) for layer in pairs}
        try:
            for layer, (down, up) in pairs.items():
                self._put_factors(layer, down, up)
            yield
        finally:
            for layer, (down, up) in kept.items():
                self._put_factors(layer, down, up)

    @contextlib.contextmanager
    def _running_at(self, level: Level) -> Iterator[None]:
        before, self._level = self._level, level
        try:
            yield
        finally:
            self._level = before


def _groups(manifest: Manifest, layout: Layout, starts: Arrays) -> tuple[list[str], list[str]]:
    """Names of what is trained in each group, in order; arrays of rank 0 are in none."""
    heads = [tensor.name for tensor in manifest.head]
    found = []
    for group, letters in ((Group.COMMON, layout.common), (Group.PERSONAL, layout.personal)):
        factors = [f"{layer.name}.{letter}" for layer in manifest.layers for letter in letters]
        names = factors + (heads if layout.head is group else [])
        found.append(sorted(name for name in names if starts[name].size))
    return found[0], found[1]


def _group(starts: Arrays) -> FlatGroup:
    values = [array.reshape(-1) for array in starts.values()] or [np.empty(0, np.float32)]
    flat = np.concatenate(values)
    return FlatGroup({name: array.shape for name, array in starts.items()}, flat, flat * 0.0)


def load_trainer(
    settings: FederationSettings, *, artifact: Path, digest: str = "", personal_seed: int
) -> OrtTrainer:
    """The trainer of a federation on an artifact; the one of `digest`, if one is given.

    Raises:
        ArtifactError: it is damaged, another, or holds what must not be in one.
        ConfigurationError: it is not this federation's, or the method is not for this backend.
        MissingExtraError: onnxruntime or tokenizers is not installed.
    """
    algorithm = settings.algorithm
    if isinstance(algorithm, PF2LoRA) and algorithm.hypergradient is Hypergradient.EXACT:
        raise ConfigurationError(
            "algorithm.hypergradient",
            "exact needs second derivatives, which the ort backend does not have",
            f"{_FIRST_ORDER} in the federation, or a torch device",
        )
    if isinstance(algorithm, PFedLoRA):
        problem = "ort does not do pfedlora: a compiled layer has no projections"
        raise ConfigurationError("backend", problem, "torch")
    loaded = load_artifact(artifact, digest)
    # Before the graph: reading it leaves memory that the graph then uses.
    tokenizer = tokenizer_of(loaded)
    found, wanted = _fingerprint(loaded, tokenizer), settings.fingerprint
    if found != wanted:
        raise _not_of(f"backbone: {found}", f"{wanted}: {difference(found, wanted)}")
    _check(settings, loaded.manifest)
    return OrtTrainer(settings, loaded, tokenizer, personal_seed=personal_seed)


def tokenizer_of(artifact: Artifact) -> FastTokenizer:
    """An artifact's tokenizer.

    Raises:
        ArtifactError: its file is not one that the library reads.
        MissingExtraError: the library is not installed.
    """
    manifest = artifact.manifest
    return FastTokenizer(
        artifact.tokenizer,
        pad_id=manifest.pad_id,
        end_id=manifest.end_id,
        embedding_count=manifest.embedding_count,
        with_types="token_type_ids" in manifest.batch_inputs,
    )


def _fingerprint(artifact: Artifact, tokenizer: FastTokenizer) -> str:
    """Of the weights that were compiled, and of the tokenizer as it works here."""
    return with_tokenizer(artifact.manifest.fingerprint, tokenizer.digest)


def _check(settings: FederationSettings, manifest: Manifest) -> None:
    task, adapter = settings.task, settings.adapter
    for what, found, wanted in (
        ("task", manifest.task.value, task.kind.value),
        ("number of labels", manifest.label_count, len(task.labels)),
        ("target modules", manifest.target_modules, adapter.target_modules),
    ):
        if found != wanted:
            raise _not_of(f"{what}: {found}", f"{wanted}")
    if manifest.length_max is not None and task.max_length > manifest.length_max:
        problem = f"the backbone does not take {task.max_length} tokens"
        raise ConfigurationError("task.max_length", problem, f"{manifest.length_max} at most")


def _not_of(found: str, wanted: str) -> ConfigurationError:
    problem = f"its {found}; the federation's: {wanted}"
    return ConfigurationError("artifact", problem, "one exported for this federation")
