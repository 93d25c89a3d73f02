"""An artifact's two graphs on plain onnxruntime, reading and writing NumPy's memory in place."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.backends.base import Arrays
from edge_client.errors import MissingExtraError
from quantization.artifact import LOGITS, LOSS, Artifact, gradient_name
from quantization.errors import ArtifactError
from quantization.manifest import ArtifactScheme

Array = np.ndarray[Any, Any]


class GradientGraph:
    """Batch and adapter in, mean loss and gradients out.

    `inputs` are read where they lie, and gradients are written into the arrays of `gradients`, by
    the name of what they are of: both must stay where they are, contiguous. What is not asked for
    is not computed.
    """

    def __init__(self, artifact: Artifact, inputs: Arrays, gradients: Arrays) -> None:
        runtime, self._session = _session(artifact, artifact.gradient_graph)
        self._options = runtime.RunOptions()
        self._options.only_execute_path_to_fetches = True
        self._binding = self._session.io_binding()
        self._loss = np.zeros((), np.float32)
        self._held = [inputs, gradients]  # the binding knows addresses alone
        for name, array in inputs.items():
            self._bind(name, array)
        for name, array in ({LOSS: self._loss} | _outputs(gradients)).items():
            self._binding.bind_output(
                name, "cpu", 0, array.dtype.type, array.shape, _address(name, array)
            )

    def run(self, batch: Mapping[str, Array]) -> float:
        """Write the gradients on a batch (targets among its arrays); the mean loss."""
        arrays = {name: np.ascontiguousarray(array) for name, array in batch.items()}
        for name, array in arrays.items():
            self._bind(name, array)
        self._session.run_with_iobinding(self._binding, self._options)
        return float(self._loss)

    def _bind(self, name: str, array: Array) -> None:
        self._binding.bind_input(
            name, "cpu", 0, array.dtype.type, array.shape, _address(name, array)
        )


class EvaluationGraph:
    """Batch and adapter in, logits out."""

    def __init__(self, artifact: Artifact) -> None:
        _, self._session = _session(artifact, artifact.evaluation_graph)

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Float32 logits [b, labels], [b, t, vocabulary] or [b, 2, t]."""
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        logits: Array = self._session.run([LOGITS], feeds)[0]
        return logits


def _outputs(gradients: Arrays) -> Arrays:
    return {gradient_name(name): array for name, array in gradients.items()}


def _address(name: str, array: Array) -> int:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: its array is not contiguous")
    return int(array.ctypes.data)


def _session(artifact: Artifact, graph: Path) -> tuple[Any, Any]:
    """The runtime and a session of one graph."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # One thread count for every runtime of this project; 0 lets the runtime choose.
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    options.inter_op_num_threads = 1
    # Threads that wait busily between steps would take the device's other work its processor.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Its plan of memory is for one shape of batch, and keeps a third more alive.
    options.enable_mem_pattern = False
    if artifact.manifest.scheme is not ArtifactScheme.NONE:
        # Further rewriting would fold weights back to floats, or round their products otherwise.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has no common base of its errors
        raise ArtifactError(f"{graph}: onnxruntime cannot load it: {error}") from error
    return runtime, session


@functools.cache
def _runtime() -> Any:
    """onnxruntime, with one arena of memory for the sessions of a process.

    A device trains or evaluates, never both: neither needs memory beside the other's.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "ort") from error
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # Its blocks are cut to size: left as they come, a sixteenth of what is held lies idle.
    arena = onnxruntime.OrtArenaCfg({"max_dead_bytes_per_chunk": 1 << 16})
    onnxruntime.create_and_register_allocator(memory, arena)
    return onnxruntime
