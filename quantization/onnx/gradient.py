"""From the forward graph to the two graphs of an artifact, both of standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import onnx
import onnxruntime
from onnx import helper
from onnxruntime.capi import _pybind_state as runtime

from quantization.artifact import LABEL_OFFSET, LOGITS, LOSS, TARGETS, gradient_name
from quantization.errors import ArtifactError, MissingExtraError
from quantization.onnx.editing import Writer, rename
from quantization.onnx.forward import Forward
from quantization.onnx.lowering import lower
from quantization.onnx.recompute import recompute_late

_ERROR: Final = 3  # the builder tells of every step otherwise
_FACTORS: Final = (("down", "A", "C", 0), ("up", "B", "D", 1))


def gradient_graph(forward: Forward, layers: Sequence[str]) -> onnx.ModelProto:
    """Batch, what the loss takes, scale, factors and head -> loss and gradients of the last two.

    Raises:
        ArtifactError: the model has an operator without a gradient, or one that cannot be lowered.
        MissingExtraError: this onnxruntime is not the training one.
    """
    if not hasattr(runtime, "GradientGraphBuilder"):
        raise MissingExtraError("onnxruntime-training-cpu (for Python 3.12 at most)", "export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    try:
        builder = runtime.GradientGraphBuilder(
            _normalised_once(forward.model).SerializeToString(),
            {LOSS},
            set(forward.trained),
            LOSS,
            options,
        )
        builder.build()
        model = onnx.load_from_string(builder.get_model())
    except Exception as error:  # the runtime's own kinds, which have no common base
        raise ArtifactError(f"no gradient graph can be built: {error}") from error
    outputs = [LOSS, *(f"{name}_grad" for name in forward.trained)]
    found = {output.name for output in model.graph.output}
    if without := sorted(set(outputs) - found):
        raise ArtifactError(f"no gradient comes back to {without[0].removesuffix('_grad')}")
    _keep_outputs(model, outputs)
    lower(model)
    recompute_late(model.graph, f"{LOSS}_grad")
    _stack_levels(model, layers)
    return model


def evaluation_graph(forward: Forward, layers: Sequence[str]) -> onnx.ModelProto:
    """Batch, scale, factors and head -> logits."""
    model = onnx.ModelProto()
    model.CopyFrom(forward.model)
    _keep_outputs(model, [LOGITS])
    inputs = [v for v in model.graph.input if v.name not in (TARGETS, LABEL_OFFSET)]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    lower(model)
    _stack_levels(model, layers)
    return model


def _normalised_once(forward: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a name of its own for each use of a normalisation's scale and bias.

    The builder makes gradients for them, wanted or not, and calls those of a layer that is used
    again (ALBERT's are) alike.
    """
    model = onnx.ModelProto()
    model.CopyFrom(forward)
    nodes, seen = [], set()
    for node in model.graph.node:
        for place in range(1, len(node.input) if node.op_type == "LayerNormalization" else 0):
            name = node.input[place]
            if name in seen:
                node.input[place] = f"{name}.of.{node.output[0]}"
                nodes.append(helper.make_node("Identity", [name], [node.input[place]]))
            seen.add(name)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _keep_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    known = {value.name: value for value in (*model.graph.output, *model.graph.value_info)}
    outputs = [known[name] for name in names]
    del model.graph.output[:]
    model.graph.output.extend(outputs)


def _stack_levels(model: onnx.ModelProto, layers: Sequence[str]) -> None:
    """Take A to D in the place of the stacked factors, and give gradients in their place."""
    graph = model.graph
    rename(graph, {v.name: gradient_name(v.name.removesuffix("_grad")) for v in _gradients(graph)})
    values = {value.name: value for value in (*graph.input, *graph.output)}
    before, after = Writer("stack."), Writer("cut.")
    for layer in layers:
        for which, common, personal, axis in _FACTORS:
            whole, pair = f"{layer}.{which}", [f"{layer}.{common}", f"{layer}.{personal}"]
            before.add("Concat", *pair, output=whole, axis=axis)
            _replace(graph.input, values[whole], pair, axis)
            if (gradient := gradient_name(whole)) in values:
                pieces = [gradient_name(name) for name in pair]
                ranks = [after.add("Shape", name, start=axis, end=axis + 1) for name in pair]
                sizes = after.add("Concat", *ranks, axis=0)
                after.nodes.append(helper.make_node("Split", [gradient, sizes], pieces, axis=axis))
                _replace(graph.output, values[gradient], pieces, axis)
    nodes = [*before.nodes, *graph.node, *after.nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def _gradients(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [value for value in graph.output if value.name.endswith("_grad")]


def _replace(values: Any, old: onnx.ValueInfoProto, names: Sequence[str], axis: int) -> None:
    """Declare values of the shape of `old`, but for their own rank on one axis."""
    values.remove(old)
    for name, rank in zip(names, ("r", "r2"), strict=True):
        value = values.add()
        value.CopyFrom(old)
        value.name = name
        value.type.tensor_type.shape.dim[axis].dim_param = rank
