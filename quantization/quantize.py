"""`pf2lora-client quantize`: a backbone quantised once, into a folder that devices load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from quantization.backbone import Backbone, load_backbone, proof_logits
from quantization.errors import BackboneError, SchemeError
from quantization.fingerprint import fingerprint, resolve_backbone
from quantization.folder_manifest import (
    FileFacts,
    FolderManifest,
    file_facts,
    is_quantized,
    write_manifest,
)
from quantization.quantized_folder import stored_tensors, write_tensors
from quantization.schemes import Scheme
from quantization.tasks import TaskKind

_TEXT_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_TEXT_FILES: Final = ("*.index.json", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class QuantizedFolder:
    """What was written: tasks it serves and why not others, and bytes of tensors by their part.

    `codes_bytes` and `absmax_bytes` are of the quantised layers and embeddings; `other_bytes` of
    all that stays as it was.
    """

    folder: Path
    fingerprint: str
    scheme: Scheme
    tasks: tuple[TaskKind, ...]
    not_served: Mapping[TaskKind, str]
    codes_bytes: int
    absmax_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.codes_bytes + self.absmax_bytes + self.other_bytes


def quantize(
    name_or_path: str, scheme: Scheme | str, out: Path, *, int8_embeddings: bool = False
) -> QuantizedFolder:
    """Quantise a backbone for every task that its checkpoint has weights for, into `out`.

    The folder is written beside `out` and takes its name when it has been read back and given, bit
    by bit, the logits of the model that it was written from.

    Raises:
        BackboneError: the backbone cannot be used, or `out` is not empty.
        SchemeError: no such scheme, or none to quantise to.
        MissingExtraError: bitsandbytes is not installed.
    """
    scheme, source = Scheme.parse(scheme), resolve_backbone(name_or_path)
    if scheme is Scheme.NONE:
        raise SchemeError("scheme none quantises nothing; give the backbone itself to the devices")
    if is_quantized(source):
        raise BackboneError(f"{source}: quantised already; give the backbone before that")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BackboneError(f"{out}: exists, and is no empty folder")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        written = _write(name_or_path, source, scheme, partial, int8_embeddings)
        partial.replace(out)
    except OSError as error:
        raise BackboneError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(written, folder=out)


def _write(
    name: str, source: Path, scheme: Scheme, folder: Path, int8_embeddings: bool
) -> QuantizedFolder:
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    logits: dict[TaskKind, Tensor] = {}
    problems: dict[TaskKind, str] = {}
    for kind in TaskKind:
        try:
            backbone = _load(name, scheme, kind, int8_embeddings)
        except BackboneError as error:
            problems[kind] = str(error)
            continue
        logits[kind] = proof_logits(backbone)
        found, ties = stored_tensors(backbone.model, backbone.head_modules)
        tensors |= found
        shared |= ties
    if not logits:
        raise BackboneError("; ".join(problems.values()))
    digest = fingerprint(source)
    manifest = FolderManifest(
        scheme,
        int8_embeddings,
        digest,
        tuple(logits),
        shared,
        write_tensors(folder, tensors),
        _copy_texts(source, folder),
    )
    write_manifest(folder, manifest)
    for kind, wanted in logits.items():
        written = _load(str(folder), scheme, kind, False)
        if written.fingerprint != digest:
            raise BackboneError(f"{source}: its tokenizer is not whole without its other files")
        if not torch.equal(proof_logits(written), wanted):
            raise BackboneError(f"{source}: what was written for {kind.value} gives other logits")
    parts = _bytes_by_part(tensors)
    return QuantizedFolder(folder, digest, scheme, tuple(logits), problems, *parts)


def _load(name: str, scheme: Scheme, kind: TaskKind, int8_embeddings: bool) -> Backbone:
    return load_backbone(
        name, scheme=scheme, task=kind, label_count=2, int8_embeddings=int8_embeddings
    )


def _copy_texts(source: Path, folder: Path) -> dict[str, FileFacts]:
    """Configuration and tokenizer, as they are."""
    paths = {path for pattern in _TEXT_FILES for path in source.glob(pattern)}
    facts: dict[str, FileFacts] = {}
    for path in sorted(paths):
        if any(path.match(pattern) for pattern in _NOT_TEXT_FILES):
            continue
        shutil.copyfile(path, folder / path.name)
        facts[path.name] = file_facts(folder / path.name)
    return facts


def _bytes_by_part(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    codes = absmax = other = 0
    for name, tensor in tensors.items():
        key = name.rpartition(".")[2]
        if key in ("absmax", "nested_absmax", "nested_offset"):
            absmax += tensor.nbytes
        elif key == "weight" and tensor.dtype in (torch.uint8, torch.int8, torch.bfloat16):
            codes += tensor.nbytes
        else:
            other += tensor.nbytes
    return codes, absmax, other
