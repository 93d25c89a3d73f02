"""The forward pass of the two-level model as an ONNX graph: loss and logits from arrays.

Every linear layer of the backbone becomes a Gemm over rows, whose gradient needs no transposed copy
of the weight. An adapted one computes

    y = W0 x + b + s [B D] [A; C] x

with the stacked factors `LAYER.down` = [A; C] [k, n] and `LAYER.up` = [B D] [m, k] as inputs: the
gradient is built for those, and gradient.py stacks them and cuts their gradients apart.

The graph holds no weights: they are inputs until weights.py stores them, so nothing here copies a
large model through protobuf, and no step can fold a frozen weight into something else.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from quantization.artifact import LABEL_OFFSET, LOGITS, LOSS, SCALE, TARGETS
from quantization.backbone import Backbone, logits_of
from quantization.bnb import dense_weight, embeddings, is_transposed, linear_shape
from quantization.checkpoint import output_embeddings, stacked_weights
from quantization.errors import ArtifactError, SchemeError
from quantization.names import is_below
from quantization.onnx.editing import drop_unused, fold_constants, rename
from quantization.onnx.shapes import with_shapes
from quantization.tasks import IGNORED, TaskKind

OPSET: Final = 20  # the newest that the gradient builder knows
_ROWS, _LENGTH, _RANK = 2, 5, 3  # of the example that the export runs
_PREFIX: Final = "model."  # of weights, from the wrapper below
_EXAMPLE: Final = "A text of a few words."


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward graph, the frozen tensors that it takes as inputs, and what they are.

    `linear` names those that are the weight [m, n] of a linear layer of the backbone, `embeddings`
    the tables of embeddings and a head tied to one; the rest stay as they are. `trained` are the
    graph inputs to have gradients for. `by_torch` computes what the graph should, from all
    its inputs but the frozen ones: loss, logits, and gradients under the names of their inputs.
    """

    model: onnx.ModelProto
    frozen: dict[str, NDArray[Any]]
    linear: frozenset[str]
    embeddings: frozenset[str]
    trained: tuple[str, ...]
    batch_inputs: tuple[str, ...]
    by_torch: Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


class _RowLinear(nn.Module):
    """A frozen linear layer over rows, with the factors of the call under way, if it is adapted."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        weight, bias = dense_weight(base)
        self.outputs, self.inputs = weight.shape
        self.is_transposed = is_transposed(base)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.factors: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        if self.bias is None:
            y = torch.mm(rows, self.weight.t())
        else:
            y = torch.addmm(self.bias, rows, self.weight.t())
        if self.factors is not None:
            down, up, scale = self.factors
            y = torch.addmm(y, torch.mm(rows, down.t()) * scale, up.t())
        return y.view(*x.shape[:-1], self.outputs)


class _Model(nn.Module):
    """The model as a function of arrays: batch, the loss's own, scale, factors of each layer."""

    def __init__(self, backbone: Backbone, layers: Sequence[str], names: Sequence[str]) -> None:
        super().__init__()
        self.model: Any = backbone.model
        self._layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in layers}
        self._names = names
        self._is_causal = backbone.task is TaskKind.CAUSAL_LM

    def forward(self, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(self._names, arrays, strict=True))
        scale, targets = given.pop(SCALE), given.pop(TARGETS)
        offset = given.pop(LABEL_OFFSET, None)
        for name, layer in self._layers.items():
            layer.factors = (given.pop(f"{name}.down"), given.pop(f"{name}.up"), scale)
        logits = logits_of(self.model(**given), given["attention_mask"])
        if self._is_causal:
            # Each token's logits foretell the next one. Moving the targets copies no logits.
            targets = functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
        rows, wanted = logits.flatten(0, -2), targets.flatten()
        if offset is not None:
            rows = rows + offset
        return functional.cross_entropy(rows, wanted, ignore_index=IGNORED), logits

    def by_torch(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See Forward. The head's parameters keep the values given."""
        given = [torch.from_numpy(arrays[name].copy()) for name in self._names]
        trained = {n: t for n, t in zip(self._names, given, strict=True) if _is_factor(n)}
        for name, parameter in self.model.named_parameters():
            if name in arrays:
                parameter.data = torch.from_numpy(arrays[name].copy())
                trained[name] = parameter
        for tensor in trained.values():
            tensor.requires_grad_(True)
        loss, logits = self(*given)
        found = torch.autograd.grad(loss, list(trained.values()))
        gradients = {name: g.numpy() for name, g in zip(trained, found, strict=True)}
        return {LOSS: loss.detach().numpy(), LOGITS: logits.detach().numpy()} | gradients


def build_forward(backbone: Backbone, layers: Sequence[str]) -> Forward:
    """Trace the model with the linear layers named adapted. `backbone.model` is used up.

    Raises:
        ArtifactError: the exporter of torch cannot follow this architecture.
    """
    if stacks := stacked_weights(backbone.model):
        kind = type(backbone.model).__name__
        raise ArtifactError(f"{kind}: {stacks[0]!r} is a stack of matrices (experts), not linear")
    tables = _tables(backbone)
    linear = _use_row_linears(backbone)
    names, example = _example(backbone, layers)
    wrapper: _Model = _Model(backbone, layers, names).eval()
    wrapper.training = True  # the wrapper alone: see _traced
    head = [name for name, _ in wrapper.named_parameters() if _is_head(name, backbone)]
    model = _traced(wrapper, names, example)
    rename(model.graph, {name: name.removeprefix(_PREFIX) for name in head})
    _name_constants(model)
    _name_once(model)
    fold_constants(model.graph, OPSET)
    drop_unused(model.graph)
    _give_second_outputs(model)
    tensors = {
        name: tensor.detach().numpy()
        for name, tensor in (*wrapper.named_parameters(), *wrapper.named_buffers())
    }
    given = {value.name for value in model.graph.input}
    trained = [name for name in names if _is_factor(name)]
    trained += [name.removeprefix(_PREFIX) for name in head]
    frozen = {name: tensors[name] for name in given - {*names, *trained}}
    return Forward(
        with_shapes(model),
        frozen,
        frozenset(f"{_PREFIX}{name}.weight" for name in linear) & frozen.keys(),
        frozenset(tables & frozen.keys()),
        tuple(trained),
        tuple(names[: names.index(TARGETS)]),
        wrapper.by_torch,
    )


def _use_row_linears(backbone: Backbone) -> list[str]:
    """Put _RowLinear in every linear layer's place; the names of those that schemes quantise."""
    model: Any = backbone.model
    head = backbone.head_modules
    found = [n for n, m in model.named_modules() if linear_shape(m) and not is_below(n, head)]
    kept = output_embeddings(model)
    for name in found:
        model.set_submodule(name, _RowLinear(model.get_submodule(name)))
    return [name for name in found if name not in kept]


def _tables(backbone: Backbone) -> set[str]:
    """Weights that int8 embeddings replace on torch: plain tables, and a head tied to one."""
    model: Any = backbone.model
    try:
        names = embeddings(model)
    except SchemeError:  # none but of kinds with rules of their own, such as Gemma's
        return set()
    tables = [model.get_submodule(name).weight for name in names]
    names += [
        name
        for name in output_embeddings(model)
        if any(model.get_submodule(name).weight is table for table in tables)
    ]
    return {f"{_PREFIX}{name}.weight" for name in names}


def _example(backbone: Backbone, layers: Sequence[str]) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names and example values of all inputs; the values leave no trace in the graph."""
    given = set(backbone.tokenizer(_EXAMPLE))
    batch = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in given]
    tokens = torch.ones(_ROWS, _LENGTH, dtype=torch.int64)
    values = dict.fromkeys(batch, tokens)
    shape = backbone.task.target_shape(_ROWS, _LENGTH)
    values[TARGETS] = torch.ones(shape, dtype=torch.int64)
    if backbone.task is TaskKind.SEQUENCE_CLASSIFICATION:
        model: Any = backbone.model
        values[LABEL_OFFSET] = torch.zeros(model.config.num_labels)
    values[SCALE] = torch.tensor(1.0)
    for name in layers:
        layer: Any = backbone.model.get_submodule(name)
        values[f"{name}.down"] = torch.zeros(_RANK, layer.inputs)
        values[f"{name}.up"] = torch.zeros(layer.outputs, _RANK)
    return list(values), tuple(value.clone() for value in values.values())


def _traced(wrapper: _Model, names: Sequence[str], example: tuple[Tensor, ...]) -> onnx.ModelProto:
    stream: Any = io.BytesIO()  # the legacy exporter takes one, whatever the signature says
    axes = {name: _dynamic_axes(name, value) for name, value in zip(names, example, strict=True)}
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                wrapper,
                example,
                stream,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(names),
                output_names=[LOSS, LOGITS],
                dynamic_axes={name: named for name, named in axes.items() if named},
                do_constant_folding=False,
                export_params=False,
                # As it is: `_Model` says that it trains, or tensors that happen to be equal (biases
                # of zero) would become one. Those that are tied become one in any case.
                training=torch.onnx.TrainingMode.PRESERVE,
            )
    except Exception as error:  # as many kinds as there are architectures
        kind = type(wrapper.model).__name__
        raise ArtifactError(f"{kind}: cannot be exported to ONNX: {error}") from error
    return onnx.load_from_string(stream.getvalue())


def _dynamic_axes(name: str, value: Tensor) -> dict[int, str]:
    if name == LABEL_OFFSET:
        return {}
    if name.endswith(".down"):
        return {0: "k"}
    if name.endswith(".up"):
        return {1: "k"}
    # Rows may be any, and tokens: an answer's two ends are not tokens.
    sizes = zip(value.shape, "bt", strict=False)
    return {i: axis for i, (size, axis) in enumerate(sizes) if axis == "b" or size == _LENGTH}


def _is_factor(name: str) -> bool:
    return name.endswith((".down", ".up"))


def _is_head(name: str, backbone: Backbone) -> bool:
    return is_below(name.removeprefix(_PREFIX), backbone.head_modules)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on tracing: what it gets wrong, the proof finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _name_constants(model: onnx.ModelProto) -> None:
    """Make every constant an initializer, where shape inference and later steps look for it."""
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _name_once(model: onnx.ModelProto) -> None:
    """Undo the second names that the exporter gives to tensors that are equal."""
    names: dict[str, str] = {}
    outputs = {output.name for output in model.graph.output}
    nodes = []
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.output[0] not in outputs:
            names[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _give_second_outputs(model: onnx.ModelProto) -> None:
    """Ask operators for the optional outputs that their gradients are built from."""
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and len(node.output) == 1:
            node.output.extend([f"{node.output[0]}.mean", f"{node.output[0]}.inverse"])
        if node.op_type == "SoftmaxCrossEntropyLoss" and len(node.output) == 1:
            node.output.append(f"{node.output[0]}.log_probabilities")
