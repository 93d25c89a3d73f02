"""What an ONNX file says of itself, read without a library that would follow what it says.

A graph is data from elsewhere until it has been checked, and a runtime opens whatever file a tensor
names. So its outline is read here first, by a walk over the protobuf encoding: every tensor that
lies in another file, wherever in the model it hides, the graph's inputs and outputs, and the
operator sets. https://protobuf.dev/programming-guides/encoding, and onnx/onnx.proto3 for the field
numbers, which never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from quantization.errors import ArtifactError

GRAPH_BYTES_MAX: Final = 256 << 20
_DEPTH_MAX: Final = 24
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Message -> field number -> what lies in it. Fields that can hold no tensor are passed over.
_CHILDREN: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "node": {5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor's bytes lie: a file's name as the graph gives it, and a part of that file."""

    location: str
    offset: int
    length: int


@dataclass(slots=True)
class GraphOutline:
    """What goes in and out of the graph, data in other files, operator domains.

    Shapes have a zero for each size that is open.
    """

    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    external: list[ExternalData] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)


def read_outline(path: Path) -> GraphOutline:
    """Walk through the ONNX model in `path`.

    Raises:
        ArtifactError: the file is absent, larger than GRAPH_BYTES_MAX, or no ONNX model.
    """
    outline = GraphOutline()
    try:
        if path.stat().st_size > GRAPH_BYTES_MAX:
            raise ValueError(f"is over {GRAPH_BYTES_MAX} bytes")
        _walk("model", memoryview(path.read_bytes()), outline, 0)
        if not outline.outputs:
            raise ValueError("has no graph with outputs")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not an ONNX model that can be used: {error}") from error
    return outline


def _walk(kind: str, message: memoryview, outline: GraphOutline, depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise ValueError(f"is nested deeper than {_DEPTH_MAX} messages")
    children = _CHILDREN[kind]
    for number, content in _fields(message):
        child = children.get(number)
        if child is None:
            continue
        if not isinstance(content, memoryview):
            raise ValueError(f"field {number} of a {kind} is a number")
        match child:
            case "input" | "output":
                if depth == 1:  # those of the main graph, not of a graph inside an operator
                    _gather_value(child, content, outline)
            case "opset":
                outline.domains.add(_text(content, 1))
            case "domain":
                outline.domains.add(str(content, "utf-8"))
            case "external":
                pass  # gathered with its tensor below
            case _:
                _walk(child, content, outline, depth + 1)
    if kind == "tensor":
        _gather_external(message, outline)


def _gather_value(kind: str, value: memoryview, outline: GraphOutline) -> None:
    """An input or output of the graph: its name and, of an input, its shape."""
    name = _text(value, 1)
    if name in outline.outputs or name in outline.inputs:
        raise ValueError(f"{name!r} goes in or out twice")
    if kind == "output":
        outline.outputs.add(name)
        return
    sizes = []
    for dimension in _inside(value, 2, 1, 2, 1):  # type, tensor type, shape, dimensions
        known = [size for number, size in _fields(dimension) if number == 1]
        sizes.append(known[0] if known and isinstance(known[0], int) else 0)
    outline.inputs[name] = tuple(sizes)


def _inside(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages that lie at a path of field numbers."""
    for number, content in _fields(message):
        if number == path[0] and isinstance(content, memoryview):
            if len(path) == 1:
                yield content
            else:
                yield from _inside(content, *path[1:])


def _gather_external(tensor: memoryview, outline: GraphOutline) -> None:
    """A tensor's external data: key and value pairs, each key once."""
    pairs: dict[str, str] = {}
    for number, content in _fields(tensor):
        if number != 13 or not isinstance(content, memoryview):
            continue
        key, value = _text(content, 1), _text(content, 2)
        if key in pairs:
            raise ValueError(f"a tensor gives its {key} twice")
        pairs[key] = value
    if pairs:
        place = ExternalData(
            pairs.get("location", ""), int(pairs.get("offset", "0")), int(pairs.get("length", "-1"))
        )
        outline.external.append(place)


def _text(message: memoryview, wanted: int) -> str:
    """The text in a field of a message; "" where it is absent, as protobuf has it."""
    found = [content for number, content in _fields(message) if number == wanted]
    if len(found) > 1:
        raise ValueError(f"field {wanted} is given twice")
    if not found:
        return ""
    if not isinstance(found[0], memoryview):
        raise ValueError(f"field {wanted} is no text")
    return str(found[0], "utf-8")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field numbers and contents of a message; numbers of fixed width are passed over."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, at = _varint(message, at)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if size > len(message) - at:
            raise ValueError("is cut off")
        if wire_type == _BYTES:
            yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("is cut off within a number")
