"""Operators that only a training runtime has, written in those of standard ONNX.

The gradient builder of onnxruntime-training makes graphs for itself. Each rule below writes one of
its operators as the formula that it stands for; dy is the gradient that comes in. An operator
without a rule, and outside the standard, is refused by its name: no graph leaves here that the
plain runtime could not run, or that would need an operator of one maker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quantization.errors import ArtifactError
from quantization.onnx.editing import Writer, drop_unused

OPSET: Final = 21  # 4-bit whole numbers in blocks came with it
IR_VERSION: Final = 10
_STANDARD: Final = ("", "ai.onnx")


class _Lowering(Writer):
    """The graph written so far, and what rules ask about the one that is read."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        super().__init__("lowered.")
        self.producers = {output: node for node in graph.node for output in node.output}
        self.used = {name for node in graph.node for name in node.input}
        self.used |= {output.name for output in graph.output}
        self._ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        self._ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}

    def rank(self, name: str) -> int:
        """How many dimensions a value has.

        Raises:
            ValueError: nothing says so.
        """
        if name not in self._ranks:
            raise ValueError(f"the rank of {name} is not known")
        return self._ranks[name]

    def whole_numbers(self, name: str) -> list[int]:
        """The whole numbers of a constant vector.

        Raises:
            ValueError: it is not known before the graph runs.
        """
        if name not in self._initializers:
            raise ValueError(f"{name} is not constant")
        return [int(number) for number in numpy_helper.to_array(self._initializers[name])]

    def times(self, *factors: str, output: str = "") -> str:
        """The product of values, in order."""
        product = factors[0]
        for i, factor in enumerate(factors[1:], 2):
            product = self.add("Mul", product, factor, output=output if i == len(factors) else "")
        return product

    def summed_to(self, value: str, shape: str, other: str, output: str) -> str:
        """`value`, of the shape that `shape` and `other` broadcast to, summed back to `shape`."""
        axes = self.broadcast_axes(shape, other)
        total = self.add("ReduceSum", value, axes, keepdims=1, noop_with_empty_axes=1)
        return self.add("Reshape", total, shape, output=output)

    def broadcast_axes(self, shape: str, other: str, output: str = "") -> str:
        """Axes along which `shape` is repeated to reach what it and `other` broadcast to, [k].

        Axes of size one on both sides are among them: a sum along those changes nothing.
        """
        none = self.integers(0)
        missing = self.add("Sub", self.add("Size", other), self.add("Size", shape))
        missing = self.add("Max", self.add("Unsqueeze", missing, none), none)
        ones = self.add(
            "ConstantOfShape",
            missing,
            value=helper.make_tensor("", onnx.TensorProto.INT64, [1], [1]),
        )
        padded = self.add("Concat", ones, shape, axis=0)
        single = self.add("Equal", padded, self.constant(1, np.int64))
        return self.add("Squeeze", self.add("NonZero", single), none, output=output)


_Rule = Callable[[_Lowering, onnx.NodeProto, dict[str, Any]], None]


def lower(model: onnx.ModelProto) -> None:
    """Rewrite `model` in place with standard operators alone.

    Raises:
        ArtifactError: naming an operator that there is no rule for, or that its rule cannot write.
    """
    graph = model.graph
    drop_unused(graph)
    lowering = _Lowering(graph)
    for node in graph.node:
        rule = _RULES.get(node.op_type)
        if rule is None:
            _check_standard(node)
            lowering.nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        try:
            rule(lowering, node, attributes)
        except ValueError as error:
            raise ArtifactError(f"operator {node.op_type} ({node.name}): {error}") from error
    lowering.put(graph)
    drop_unused(graph)
    del graph.value_info[:]
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.ir_version = IR_VERSION


def _check_standard(node: onnx.NodeProto) -> None:
    if node.domain in _STANDARD and onnx.defs.has(node.op_type, OPSET, ""):
        return
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    raise ArtifactError(
        f"operator {name} ({node.name}) is not standard ONNX, and there is no rule to write it so"
    )


def _softmax(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """y (dy - sum(y dy))"""
    dy, y = node.input
    product = low.times(dy, y)
    total = low.add("ReduceSum", product, low.integers(attributes.get("axis", -1)), keepdims=1)
    low.add("Sub", product, low.times(y, total), output=node.output[0])


def _layer_norm(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """Ba, Kiros, Hinton 2016: with x' = (x - mean) / sd and g = w dy,

    dx = (g - mean(g) - x' mean(g x')) / sd, dw = sum(dy x'), db = sum(dy)
    """
    dy, x, weight, mean, inverse = node.input
    if attributes.get("axis", -1) != -1:
        raise ValueError("only over the last axis")
    last = low.integers(-1)
    normal = low.times(low.add("Sub", x, mean), inverse)
    g = low.times(dy, weight)
    first = low.add("ReduceMean", g, last, keepdims=1)
    second = low.add("ReduceMean", low.times(g, normal), last, keepdims=1)
    inner = low.add("Sub", low.add("Sub", g, first), low.times(normal, second))
    low.times(inner, inverse, output=node.output[0])
    for output, terms in zip(node.output[1:], (low.times(dy, normal), dy), strict=False):
        if output in low.used:
            rows = low.add("Flatten", terms, axis=-1)
            low.add("ReduceSum", rows, low.integers(0), keepdims=0, output=output)


def _gelu(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """The builder writes GeluGrad for both forms of Gelu: the forward node says which it is."""
    dy, x = node.input
    forms = {
        helper.get_node_attr_value(other, "approximate") if other.attribute else b"none"
        for other in low.producers.values()
        if other.op_type == "Gelu" and other.input[0] == x
    }
    if forms == {b"none"}:
        slope = _gelu_slope(low, x)
    elif forms == {b"tanh"}:
        slope = _tanh_gelu_slope(low, x)
    else:
        raise ValueError("cannot tell which form of Gelu it belongs to")
    low.times(dy, slope, output=node.output[0])


def _gelu_slope(low: _Lowering, x: str) -> str:
    """Phi(x) + x phi(x), with the normal distribution and its density."""
    erf = low.add("Erf", low.times(x, low.constant(math.sqrt(0.5))))
    below = low.times(low.add("Add", erf, low.constant(1.0)), low.constant(0.5))
    bell = low.add("Exp", low.times(low.times(x, x), low.constant(-0.5)))
    return low.add("Add", below, low.times(x, bell, low.constant(1 / math.sqrt(2 * math.pi))))


def _tanh_gelu_slope(low: _Lowering, x: str) -> str:
    """With t = tanh(c (x + a x^3)): (1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2"""
    a, c = 0.044715, math.sqrt(2 / math.pi)
    one, half = low.constant(1.0), low.constant(0.5)
    square = low.times(x, x)
    cubic = low.times(x, low.add("Add", low.times(square, low.constant(a)), one))
    t = low.add("Tanh", low.times(cubic, low.constant(c)))
    steep = low.times(low.add("Sub", one, low.times(t, t)), low.constant(c))
    inner = low.add("Add", low.times(square, low.constant(3 * a)), one)
    return low.times(half, low.add("Add", low.add("Add", one, t), low.times(x, steep, inner)))


def _cross_entropy(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """(softmax - one-hot) / count in the rows that count, zero in those to be ignored."""
    if len(node.input) != 3 or attributes["reduction"] != b"mean":
        raise ValueError("only the plain mean")
    dloss, log_probabilities, targets = node.input
    ignored = low.constant(attributes["ignore_index"], np.int64)
    counts = low.add("Not", low.add("Equal", targets, ignored))
    index = low.add("Where", counts, targets, low.constant(0, np.int64))
    weight = low.add("Cast", counts, to=onnx.TensorProto.FLOAT)
    last = low.integers(-1)
    share = low.times(low.add("Div", weight, low.add("ReduceSum", weight, keepdims=0)), dloss)
    index, share = low.add("Unsqueeze", index, last), low.add("Unsqueeze", share, last)
    scaled = low.times(low.add("Exp", log_probabilities), share)
    low.add(
        "ScatterElements",
        scaled,
        index,
        low.add("Neg", share),
        output=node.output[0],
        axis=1,
        reduction="add",
    )


def _tanh(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """dy (1 - y^2)"""
    dy, y = node.input
    low.times(dy, low.add("Sub", low.constant(1.0), low.times(y, y)), output=node.output[0])


def _sigmoid(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """dy y (1 - y)"""
    dy, y = node.input
    low.times(dy, y, low.add("Sub", low.constant(1.0), y), output=node.output[0])


def _gather(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """Of one index: dy between zeros. Of many along the first axis: dy added up there."""
    shape, index, dy = node.input
    axis = attributes.get("axis", 0)
    if low.rank(index) == 0:
        _gather_one(low, shape, index, dy, axis, node.output[0])
    elif axis == 0:
        _add_up(low, shape, low.add("Unsqueeze", index, low.integers(-1)), dy, node.output[0])
    else:
        raise ValueError("of many indices only along the first axis")


def _gather_one(low: _Lowering, shape: str, index: str, dy: str, axis: int, output: str) -> None:
    size = low.add("Gather", shape, low.integers(axis), axis=0)
    begin = low.add("Unsqueeze", index, low.integers(0))
    begin = low.add("Mod", low.add("Add", begin, size), size)  # negative ones count from the end
    end = low.add("Sub", low.add("Sub", size, begin), low.integers(1))
    row = low.add("Unsqueeze", dy, low.integers(axis))
    _between_zeros(low, row, low.rank(dy) + 1, [axis], (begin, end), output)


def _between_zeros(
    low: _Lowering,
    value: str,
    rank: int,
    axes: Sequence[int],
    counts: tuple[str, str],
    output: str,
) -> None:
    """Pad along some axes, so many before and behind.

    Pad's own `axes` are no use: onnxruntime up to 1.31 forgets them when it moves a Transpose past.
    """
    places = [axis % rank for axis in axes]
    indices = low.integers(*places, *(place + rank for place in places))
    zeros = low.integers(*[0] * (2 * rank))
    pads = low.add("ScatterElements", zeros, indices, low.add("Concat", *counts, axis=0), axis=0)
    low.add("Pad", value, pads, output=output)


def _add_up(low: _Lowering, shape: str, indices: str, dy: str, output: str) -> None:
    zeros = low.add("ConstantOfShape", shape)
    low.add("ScatterND", zeros, indices, dy, output=output, reduction="add")


def _gather_nd(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """dy added up at the indices that it was taken from."""
    shape, indices, dy = node.input
    if attributes.get("batch_dims", 0):
        raise ValueError("only without batch dimensions")
    _add_up(low, shape, indices, dy, node.output[0])


def _slice(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """dy between zeros; steps must be one."""
    dy, shape, starts, ends, axes, *steps = node.input
    if steps and set(low.whole_numbers(steps[0])) != {1}:
        raise ValueError("only with steps of one")
    sizes = low.add("Gather", shape, axes, axis=0)
    begin, end = (_within(low, position, sizes) for position in (starts, ends))
    counts = begin, low.add("Sub", sizes, end)
    _between_zeros(low, dy, low.rank(dy), low.whole_numbers(axes), counts, node.output[0])


def _within(low: _Lowering, position: str, sizes: str) -> str:
    """Positions as Slice takes them, negative ones from the end, as ones in [0, size]."""
    zero = low.integers(0)
    from_end = low.add("Add", position, sizes)
    found = low.add("Where", low.add("Less", position, zero), from_end, position)
    return low.add("Min", low.add("Max", found, zero), sizes)


def _div(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """y = a / b: da = dy / b, db = -dy a / b^2"""
    dy, a, b = node.input
    shape_a, shape_b = low.add("Shape", a), low.add("Shape", b)
    to_a, to_b = (*node.output, "")[:2]
    if to_a in low.used:
        low.summed_to(low.add("Div", dy, b), shape_a, shape_b, to_a)
    if to_b in low.used:
        slope = low.add("Div", low.add("Neg", low.times(dy, a)), low.times(b, b))
        low.summed_to(slope, shape_b, shape_a, to_b)


def _scale(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """x / s or x s, s of any type of number"""
    x, factor = node.input
    factor = low.add("Cast", factor, to=onnx.TensorProto.FLOAT)
    operator = "Div" if attributes.get("scale_down", 0) else "Mul"
    low.add(operator, x, factor, output=node.output[0])


def _broadcast_arguments(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """Which axes to sum along to come back to the shape of each operand."""
    a, b = node.input
    for shape, other, output in zip((a, b), (b, a), (*node.output, "")[:2], strict=True):
        if output in low.used:
            low.broadcast_axes(shape, other, output=output)


def _relu(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """dy where y > 0"""
    dy, y = node.input
    zero = low.constant(0.0)
    low.add("Where", low.add("Greater", y, zero), dy, zero, output=node.output[0])


def _reduce_sum(low: _Lowering, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    """Standard already; but no axes found at run time must mean none, not all."""
    producer = low.producers.get(node.input[1]) if len(node.input) > 1 else None
    if producer is not None and producer.op_type == "BroadcastGradientArgs":
        kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("noop_with_empty_axes", 1)])
    low.nodes.append(node)


def _fused_matmul(low: _Lowering, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """A product with operands transposed in their last two axes."""
    if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        raise ValueError("only with the last two axes transposed")
    operands = []
    for name, letter in zip(node.input, "AB", strict=True):
        if attributes.get(f"trans{letter}", 0):
            axes = list(range(low.rank(name)))
            axes[-2:] = reversed(axes[-2:])
            name = low.add("Transpose", name, perm=axes)
        operands.append(name)
    alpha = attributes.get("alpha", 1.0)
    if alpha == 1.0:
        low.add("MatMul", *operands, output=node.output[0])
    else:
        low.times(low.add("MatMul", *operands), low.constant(alpha), output=node.output[0])


_RULES: Final[dict[str, _Rule]] = {
    "BroadcastGradientArgs": _broadcast_arguments,
    "DivGrad": _div,
    "FusedMatMul": _fused_matmul,
    "GatherGrad": _gather,
    "GatherNDGrad": _gather_nd,
    "GeluGrad": _gelu,
    "LayerNormalizationGrad": _layer_norm,
    "ReduceSum": _reduce_sum,
    "ReluGrad": _relu,
    "Scale": _scale,
    "SigmoidGrad": _sigmoid,
    "SliceGrad": _slice,
    "SoftmaxCrossEntropyLossGrad": _cross_entropy,
    "SoftmaxGrad_13": _softmax,
    "TanhGrad": _tanh,
}
