"""That compiled graphs compute what torch does, on a batch of another shape than the traced one.

An exporter turns what it cannot follow into constants: a length, a mask, a branch. The graph then
runs, and is wrong. So both graphs are run once, with their float weights, before one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from quantization.artifact import LABEL_OFFSET, LOGITS, LOSS, SCALE, TARGETS, gradient_name
from quantization.errors import ArtifactError
from quantization.manifest import Manifest
from quantization.onnx.forward import Forward
from quantization.tasks import IGNORED, TaskKind

_LENGTHS: Final = (9, 6, 4)  # of the rows
_RANK, _PERSONAL_RANK, _SCALE, _SPREAD = 3, 1, 2.0, 0.05
# Rounding differs from runtime to runtime by 1e-6; what is wrong differs by far more.
_TOLERANCE: Final = 1e-3
# A gradient that is all but zero beside the others is what rounding has left of large numbers.
_ROUNDING: Final = 1e-6
_ERROR: Final = 3

Arrays = dict[str, NDArray[Any]]


def prove(
    forward: Forward, gradient: onnx.ModelProto, evaluation: onnx.ModelProto, manifest: Manifest
) -> None:
    """Compare loss, logits and every gradient with torch's.

    Raises:
        ArtifactError: a graph does not run, or gives something else; the text names what.
    """
    batch, trained = _batch(forward, manifest), _trained(manifest)
    stacked = _stacked(trained, manifest)
    expected = forward.by_torch(batch | stacked)
    given = forward.frozen | batch | trained
    found = _run(gradient, given) | _run(evaluation, given)
    pairs = {LOSS: found[LOSS], LOGITS: found[LOGITS]}
    gradients = {name: found[gradient_name(name)] for name in trained}
    pairs |= _stacked(gradients, manifest)
    whole = np.sqrt(sum(np.square(expected[name], dtype=float).sum() for name in pairs))
    for name, value in pairs.items():
        wanted = expected[name]
        difference = np.linalg.norm(value - wanted) if value.shape == wanted.shape else np.inf
        # "not <=" and not ">": a NaN is refused too.
        if not difference <= _TOLERANCE * np.linalg.norm(wanted) + _ROUNDING * whole:
            what = name if name in (LOSS, LOGITS) else f"the gradient of {name}"
            raise ArtifactError(f"the compiled graph is wrong: {what} is not torch's")


def _batch(forward: Forward, manifest: Manifest) -> Arrays:
    """Rows of different lengths, padded; one target in the middle does not count."""
    rng = np.random.default_rng(0)
    length = max(_LENGTHS)
    mask = np.arange(length) < np.array(_LENGTHS)[:, None]
    # Ids that every vocabulary has; repeated ones do no harm.
    ids = np.where(mask, rng.integers(2, 12, mask.shape), manifest.pad_id)
    arrays = dict.fromkeys(forward.batch_inputs, np.zeros_like(ids))
    arrays |= {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    match manifest.task:
        case TaskKind.SEQUENCE_CLASSIFICATION:
            targets = np.array([0, IGNORED, manifest.label_count - 1])
        case TaskKind.CAUSAL_LM:
            targets = np.where(mask, ids, IGNORED)
            targets[:, 2] = IGNORED
        case TaskKind.QUESTION_ANSWERING:
            targets = np.array([[1, length - 1], [IGNORED, IGNORED], [0, 2]])
    arrays = {name: arrays[name] for name in forward.batch_inputs}
    if manifest.label_count:
        arrays[LABEL_OFFSET] = np.linspace(-1, 1, manifest.label_count, dtype=np.float32)
    return arrays | {TARGETS: targets, SCALE: np.array(_SCALE, np.float32)}


def _trained(manifest: Manifest) -> Arrays:
    rng = np.random.default_rng(1)
    shapes = manifest.trainable(_RANK, _PERSONAL_RANK)
    return {n: (_SPREAD * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def _stacked(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> Arrays:
    """Arrays named A to D of each layer as `down` and `up`; the head's as they are."""
    found = {tensor.name: arrays[tensor.name] for tensor in manifest.head}
    for name in (layer.name for layer in manifest.layers):
        found[f"{name}.down"] = np.concatenate([arrays[f"{name}.A"], arrays[f"{name}.C"]])
        found[f"{name}.up"] = np.concatenate([arrays[f"{name}.B"], arrays[f"{name}.D"]], axis=1)
    return found


def _run(model: onnx.ModelProto, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    options.intra_op_num_threads = 1  # a batch this small is not worth waking others for
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        inputs = {value.name: arrays[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # the runtime's own kinds, which have no common base
        raise ArtifactError(f"the compiled graph does not run: {error}") from error
