"""Writing parts of a graph: nodes with fresh names, and constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


class Writer:
    """Collects the nodes of a graph that is being written anew, in order, and its constants."""

    def __init__(self, prefix: str) -> None:
        """Fresh names begin with `prefix`, which no other name in the graph may begin with."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._known: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._prefix = prefix

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """The name of a constant; one for all that are equal."""
        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._known:
            self._known[key] = f"{self._prefix}constant.{len(self._known)}"
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(list(values), np.int64)

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Write a node with one output, called `output` or afresh; returns the output's name."""
        output = output or f"{self._prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def put(self, graph: onnx.GraphProto) -> None:
        """Give `graph` these nodes in place of its own, and the constants besides."""
        del graph.node[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants)


def zero_of(writer: Writer, value: str) -> str:
    """Zero times the first number of a value, as [1]: not to be had before the value is."""
    flat = writer.add("Reshape", value, writer.integers(-1))
    first = writer.add("Slice", flat, writer.integers(0), writer.integers(1))
    return writer.add("Mul", first, writer.constant(0.0))


def fold_constants(graph: onnx.GraphProto, opset: int) -> None:
    """Compute what depends on constants alone, such as shapes that an exporter puts together."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if not inputs or not values.keys() >= set(inputs):
            kept.append(node)
            continue
        found = ReferenceEvaluator(node, opsets={"": opset}).run(
            None, {n: values[n] for n in inputs}
        )
        for name, value in zip(node.output, found, strict=True):
            values[name] = np.asarray(value)
            graph.initializer.append(numpy_helper.from_array(values[name], name))
    del graph.node[:]
    graph.node.extend(kept)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output of the graph comes from."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    initializers = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Call values by other names wherever they are used."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
