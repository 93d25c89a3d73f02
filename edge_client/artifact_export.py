"""`pf2lora-client export`: a backbone compiled for devices without torch.

What is compiled is this package's adapter on quantization's graph: the layers are chosen here, by
the same rules as on a device with torch, and handed over by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantization.artifact import Artifact
from quantization.errors import MissingExtraError
from quantization.manifest import ArtifactScheme, EmbeddingScheme


@dataclass(frozen=True, slots=True)
class Use:
    """What an artifact is compiled for: the part of a federation's settings that it depends on."""

    task: str
    label_count: int
    target_modules: str | tuple[str, ...]


def export(
    backbone: str,
    folder: Path,
    use: Use,
    scheme: ArtifactScheme,
    embeddings: EmbeddingScheme,
) -> Artifact:
    """Compile a backbone (see `resolve_backbone`) into an artifact in `folder`.

    Raises:
        BackboneError, AdapterError, ArtifactError: naming what is wrong.
        MissingExtraError: the extra `export` is not installed.
    """
    try:
        from edge_client.target_modules import select_targets
        from quantization.backbone import load_backbone
        from quantization.onnx.export import export_artifact
    except ImportError as error:
        library = f"{error.name or 'onnx'} (for Python 3.12 at most)"
        raise MissingExtraError(library, "export") from error
    loaded = load_backbone(
        backbone,
        task=use.task,
        label_count=use.label_count,
        attention="eager",  # the only one that the exporter writes in plain operators
    )
    layers: Sequence[str] = select_targets(loaded.model, use.target_modules, loaded.head_modules)
    return export_artifact(
        loaded,
        folder,
        scheme=scheme,
        embeddings=embeddings,
        layers=layers,
        target_modules=use.target_modules,
        label_count=use.label_count,
    )
