"""Values that are cheaper to compute twice than to keep from the forward to the backward pass.

What goes into a linear layer is wanted again for its adapter's gradient. Where it comes out of a
Gelu or a LayerNormalization, whose own input is kept in any case, it is computed again in the
backward pass. Like an expanded weight (weights.py), the second copy of the operator has zero times
a number of the gradient added to an operand: so it comes late, and is not merged with the first.
On a BERT this saves about a third of what is kept.
"""

from __future__ import annotations

from typing import Final

import onnx

from quantization.onnx.editing import Writer, zero_of

# The operand to add zero to: the smallest there is.
_CHEAP: Final = {"Gelu": 0, "LayerNormalization": 1}
_SAME_BYTES: Final = ("Flatten", "Reshape")


def recompute_late(graph: onnx.GraphProto, start: str) -> None:
    """Compute cheap values again where what depends on the value `start` uses them."""
    producers = {output: node for node in graph.node for output in node.output}
    late = {start}
    again: dict[str, str] = {}
    writer = Writer("again.")
    for node in graph.node:
        if late.intersection(node.input):
            late.update(node.output)
            for i, name in enumerate(node.input):
                gradient = next((other for other in node.input if other in late), "")
                if name not in late and gradient and _is_cheap(name, producers):
                    if name not in again:
                        again[name] = _copy(writer, name, producers, gradient)
                    node.input[i] = again[name]
        writer.nodes.append(node)
    writer.put(graph)


def _is_cheap(name: str, producers: dict[str, onnx.NodeProto]) -> bool:
    node = producers.get(name)
    if node is None:
        return False
    if node.op_type in _SAME_BYTES:
        return _is_cheap(node.input[0], producers)
    return node.op_type in _CHEAP and name == node.output[0]


def _copy(writer: Writer, name: str, producers: dict[str, onnx.NodeProto], gradient: str) -> str:
    """Write the operator that `name` comes from once more, with what lies between."""
    node = onnx.NodeProto()
    node.CopyFrom(producers[name])
    if node.op_type in _SAME_BYTES:
        node.input[0] = _copy(writer, node.input[0], producers, gradient)
    else:
        at = _CHEAP[node.op_type]
        node.input[at] = writer.add("Add", node.input[at], zero_of(writer, gradient))
    output = f"{name}.again"
    del node.output[:]
    node.output.append(output)
    node.name = f"{node.name}.again"
    writer.nodes.append(node)
    return output
