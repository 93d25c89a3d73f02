"""A backbone as its quantised tensors: take them out of a model, write them, read them back.

Tensors are called as in the base model, without its prefix, so that one folder serves every task;
what lies outside the base model (a causal LM's head) keeps its whole name. Layouts are the ones
that CPU and CUDA both compute with, as bitsandbytes quantises into them:

    4 bits   weight uint8 [ceil(m n / 2), 1], two codes a byte, the earlier one in the high half
             absmax float32 [ceil(m n / 64)]; "double": uint8, with nested_absmax float32 and
             nested_offset float32 []
    INT8     weight int8 [m, n], absmax float32 [m]: linear layers and embeddings
    BF16     weight bfloat16 [m, n]

The blocks of weights that bitsandbytes packs anew for its AVX-512 kernel are never stored. Buffers
are stored as well, also those that a checkpoint leaves out: a model read back is the same to the
bit, and is built without computing anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantization.bnb import (
    embeddings,
    linear_4bit,
    linear_shape,
    linears,
    pieces_4bit,
    replace_embedding,
    replace_linear,
    state_4bit,
)
from quantization.checkpoint import build_model, output_embeddings
from quantization.errors import BackboneError, SchemeError
from quantization.expand_4bit import BLOCK_SIZE
from quantization.folder_manifest import (
    FileFacts,
    FolderManifest,
    check_size,
    check_texts,
    file_facts,
    read_manifest,
)
from quantization.layers import FrozenLinear8bit, FrozenLinear16bit
from quantization.names import is_below
from quantization.rooms import mapped
from quantization.schemes import Scheme
from quantization.tasks import TaskKind
from quantization.tensor_file import TensorEntry, read_entries

SHARD_BYTES: Final = 2 << 30
_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def stored_tensors(
    model: PreTrainedModel, head_modules: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a quantised model but its fresh head's, and which names are tied to others."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_below(name, head_modules):
            continue
        pieces = {**module._parameters, **module._buffers, **pieces_4bit(module)}
        for key, tensor in pieces.items():
            if tensor is None:
                continue
            full = _stored_name(model, f"{name}.{key}".lstrip("."))
            if (known := first.setdefault(id(tensor), full)) != full:
                shared[full] = known
            else:
                tensors[full] = tensor.detach()
    return tensors, shared


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileFacts]:
    """Write shards of up to SHARD_BYTES, or of one tensor; returns their facts by file name."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in sorted(tensors.items()):
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    facts = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-quantized-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name)
        (folder / name).chmod(0o644)  # the format's library writes for the owner alone
        facts[name] = file_facts(folder / name)
    return facts


def read_quantized(
    folder: Path,
    kind: TaskKind,
    label_count: int,
    attention: str | None,
    scheme: Scheme,
    device: torch.device,
    compute_dtype: torch.dtype | None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The quantised model on `device`, its head allocated and not started; the head's modules.

    Every file's digest is checked on the very bytes that are used, which are read once, each tensor
    into its own place.

    Raises:
        SchemeError: the folder is quantised in another scheme.
        BackboneError: it does not serve the task, or a file is damaged, foreign or absent.
    """
    manifest = read_manifest(folder)
    if manifest.scheme is not scheme:
        raise SchemeError(
            f"{folder}: quantised as {manifest.scheme.value}, not {scheme.value}: "
            f"ask for scheme {manifest.scheme.value!r}, or give the backbone before quantisation"
        )
    if kind not in manifest.tasks:
        tasks = ", ".join(task.value for task in manifest.tasks)
        raise BackboneError(f"{folder}: has weights for {tasks}, not for {kind.value}")
    check_texts(folder, manifest)
    model, head_modules = build_model(folder, kind, label_count, attention)
    for head in head_modules:
        model.get_submodule(head).to_empty(device="cpu")
    _Filling(folder, manifest, model, device, compute_dtype).fill(head_modules)
    return model, head_modules


class _Filling:
    """One model of shapes being filled with the tensors of a folder."""

    def __init__(
        self,
        folder: Path,
        manifest: FolderManifest,
        model: Any,
        device: torch.device,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.model = model
        self.device = device
        self.compute_dtype = compute_dtype
        self.tensors: dict[str, Tensor] = {}

    def fill(self, head_modules: Sequence[str]) -> None:
        wanted = {_stored_name(self.model, name) for name, _ in self.model.named_modules()}
        for name, facts in self.manifest.weights.items():
            for key, tensor in _read_shard(self.folder / name, facts, wanted):
                self.tensors[key] = tensor.to(self.device)
        keep = (*head_modules, *output_embeddings(self.model))
        for name in linears(self.model, self.manifest.scheme, keep):
            replace_linear(self.model, name, self._linear(name))
        for name in embeddings(self.model) if self.manifest.int8_embeddings else ():
            count, width = self.model.get_submodule(name).weight.shape
            codes = self._tensor(name, "weight", torch.int8, (count, width))
            absmax = self._tensor(name, "absmax", torch.float32, (count,))
            replace_embedding(self.model, name, codes, absmax, self.compute_dtype)
        self._fill_the_rest()

    def _linear(self, name: str) -> nn.Module:
        layer, scheme = self.model.get_submodule(name), self.manifest.scheme
        shape = linear_shape(layer)
        assert shape is not None  # noqa: S101 - `linears` names no other
        outputs, count = shape[0], shape[0] * shape[1]
        bias_dtype = torch.bfloat16 if scheme is Scheme.BF16 else torch.float32
        bias = None if layer.bias is None else self._tensor(name, "bias", bias_dtype, (outputs,))
        if scheme is Scheme.BF16:
            return FrozenLinear16bit(self._tensor(name, "weight", torch.bfloat16, shape), bias)
        if scheme is Scheme.INT8:
            codes = self._tensor(name, "weight", torch.int8, shape)
            absmax = self._tensor(name, "absmax", torch.float32, (outputs,))
            return FrozenLinear8bit(codes, absmax, bias, self.compute_dtype)
        codes = self._tensor(name, "weight", torch.uint8, (math.ceil(count / 2), 1))
        blocks = math.ceil(count / BLOCK_SIZE)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        wanted = {"absmax": (torch.float32, (blocks,))}
        if scheme.is_double:
            wanted = {
                "absmax": (torch.uint8, (blocks,)),
                "nested_absmax": (torch.float32, (math.ceil(blocks / 256),)),
                "nested_offset": (torch.float32, ()),
            }
        pieces = {key: self._tensor(name, key, *facts) for key, facts in wanted.items()}
        return linear_4bit(codes, state_4bit(scheme, shape, pieces), bias, self.compute_dtype)

    def _fill_the_rest(self) -> None:
        """Give every tensor that is still without bytes the stored one; tied ones stay one."""
        placed: dict[str, nn.Parameter] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            for key, meta in (*module._parameters.items(), *module._buffers.items()):
                if meta is None or not meta.is_meta:
                    continue
                tensor = self._tensor(name, key, meta.dtype, tuple(meta.shape))
                if key in module._buffers:
                    module._buffers[key] = tensor
                    continue
                stored = self._key(f"{name}.{key}")
                parameter = placed.setdefault(stored, nn.Parameter(tensor, requires_grad=False))
                module._parameters[key] = parameter
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_meta:
                    raise BackboneError(
                        f"{self.folder}: {type(module).__name__} keeps {key!r} outside parameters "
                        "and buffers; this architecture cannot be read from a quantised folder"
                    )

    def _key(self, name: str) -> str:
        stored = _stored_name(self.model, name.lstrip("."))
        return self.manifest.shared.get(stored, stored)

    def _tensor(self, module: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        stored = self._key(f"{module}.{key}")
        tensor = self.tensors.get(stored)
        if tensor is None:
            raise BackboneError(f"{self.folder}: holds no tensor {stored!r}: not of this backbone")
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise BackboneError(
                f"{self.folder}: tensor {stored!r} is {tensor.dtype} {list(tensor.shape)}, and the "
                f"configuration asks for {dtype} {list(shape)}"
            )
        return tensor


def _stored_name(model: Any, name: str) -> str:
    """The name of a module or tensor in a folder: that of the base model inside it."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _read_shard(path: Path, facts: FileFacts, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the modules `wanted`; the last step judges the digest of the whole."""
    check_size(path, facts)
    try:
        with path.open("rb") as stream:
            entries = read_entries(stream)
            end = stream.tell()
            stream.seek(0)
            digest = hashlib.sha256(stream.read(end))
            for entry in entries:
                if entry.begin != end:
                    raise ValueError(f"a gap before tensor {entry.name!r}")
                end = entry.end
                if entry.name.rpartition(".")[0] in wanted:
                    tensor, buffer = _empty(entry)
                    stream.readinto(buffer)
                    digest.update(buffer)
                    yield entry.name, tensor
                    continue
                for size in entry.pieces():
                    digest.update(stream.read(size))
            digest.update(stream.read())
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: not a whole safetensors file: {error}") from error
    if digest.hexdigest() != facts.sha256:
        raise BackboneError(f"{path}: damaged or replaced: not the digest it was")


def _empty(entry: TensorEntry) -> tuple[Tensor, memoryview]:
    """A tensor for an entry, and its bytes to be written."""
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None or min(entry.shape, default=0) < 0:
        raise ValueError(f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}")
    if math.prod(entry.shape) * dtype.itemsize != entry.end - entry.begin:
        raise ValueError(f"tensor {entry.name!r} does not fill its place")
    flat = mapped(math.prod(entry.shape), dtype)
    return flat.view(entry.shape), flat.view(torch.uint8).numpy().data
