"""Compile a backbone into an artifact: what `pf2lora-client export` does.

    backbone -> forward graph -> gradient graph -> standard operators -> weights by scheme -> folder

Run by the team that owns the backbone, once for each scheme; ranks, alpha, seeds and everything
else of a federation may change afterwards. The last release of onnxruntime-training is needed here
and nowhere else: see docs/devices.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from quantization.artifact import Artifact, load_artifact, write_manifest
from quantization.backbone import Backbone
from quantization.bnb import is_transposed, linear_shape
from quantization.checkpoint import embedding_count_of, longest_input
from quantization.errors import ArtifactError
from quantization.manifest import (
    EVALUATION_GRAPH,
    GRADIENT_GRAPH,
    TOKENIZER,
    WEIGHTS,
    AdaptedLayer,
    ArtifactScheme,
    EmbeddingScheme,
    HeadTensor,
    Manifest,
)
from quantization.names import is_below
from quantization.onnx.forward import build_forward
from quantization.onnx.gradient import evaluation_graph, gradient_graph
from quantization.onnx.proof import prove
from quantization.onnx.weights import give_weights, store_weights
from quantization.tokenizer_digest import digest_of_tokenizers, with_tokenizer


def export_artifact(
    backbone: Backbone,
    folder: Path,
    *,
    scheme: ArtifactScheme,
    embeddings: EmbeddingScheme = EmbeddingScheme.FLOAT32,
    layers: Sequence[str],
    target_modules: str | tuple[str, ...],
    label_count: int = 0,
) -> Artifact:
    """Write the artifact of `backbone` into `folder`, which must not be there or be empty.

    `backbone` is unquantised, on the CPU, with eager attention, and is used up. `layers` names the
    linear layers to adapt: those that `target_modules` chose, which is written down beside them.

    Raises:
        ArtifactError: the architecture cannot be compiled, or the folder is in use.
        MissingExtraError: the extra `export` is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: is there already, and not empty")
    layers = sorted(layers)
    adapted = tuple(_adapted_layer(backbone, name) for name in layers)
    head = _head(backbone)
    embedding_count = embedding_count_of(backbone.model)
    length_max = longest_input(backbone.model)
    forward = build_forward(backbone, layers)  # uses the model up
    if embeddings is EmbeddingScheme.INT8 and not forward.embeddings:
        raise ArtifactError("embeddings int8: the model has no plain table of them; use float32")
    manifest = Manifest(
        fingerprint=backbone.fingerprint,
        scheme=scheme,
        embeddings=embeddings,
        task=backbone.task,
        label_count=label_count,
        target_modules=target_modules,
        layers=adapted,
        head_modules=backbone.head_modules,
        head=head,
        batch_inputs=forward.batch_inputs,
        pad_id=backbone.tokenizer.pad_token_id,
        end_id=backbone.tokenizer.eos_token_id,
        embedding_count=embedding_count,
        length_max=length_max,
    )
    graphs = {
        GRADIENT_GRAPH: gradient_graph(forward, layers),
        EVALUATION_GRAPH: evaluation_graph(forward, layers),
    }
    prove(forward, graphs[GRADIENT_GRAPH], graphs[EVALUATION_GRAPH], manifest)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        weights = store_weights(folder / WEIGHTS, forward, scheme, embeddings)
        for name, graph in graphs.items():
            give_weights(graph, weights)
            (folder / name).write_bytes(graph.SerializeToString())
            onnx.checker.check_model(str(folder / name))
        _write_tokenizer(backbone, manifest, folder / TOKENIZER)
        write_manifest(folder, manifest)
        return load_artifact(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _adapted_layer(backbone: Backbone, name: str) -> AdaptedLayer:
    module = backbone.model.get_submodule(name)
    shape = linear_shape(module)
    if shape is None:
        raise ArtifactError(f"layer {name!r} is a {type(module).__name__}: not linear")
    return AdaptedLayer(name, *shape, transposed=is_transposed(module))


def _head(backbone: Backbone) -> tuple[HeadTensor, ...]:
    model: Any = backbone.model
    return tuple(
        HeadTensor(name, tuple(parameter.shape))
        for name, parameter in sorted(model.named_parameters())
        if is_below(name, backbone.head_modules)
    )


def _write_tokenizer(backbone: Backbone, manifest: Manifest, path: Path) -> None:
    tokenizer: Any = getattr(backbone.tokenizer, "backend_tokenizer", None)
    kind = type(backbone.tokenizer).__name__
    if tokenizer is None:
        raise ArtifactError(f"{kind} has no form that the `tokenizers` library reads")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(path))
    digest = digest_of_tokenizers(
        type(tokenizer).from_file(str(path)),
        pad_id=manifest.pad_id,
        end_id=manifest.end_id,
        with_types="token_type_ids" in manifest.batch_inputs,
    )
    if with_tokenizer(manifest.fingerprint, digest) != manifest.fingerprint:
        raise ArtifactError(f"{kind} gives other ids than its form for the `tokenizers` library")
