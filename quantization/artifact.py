"""The artifact: a backbone compiled once, so that a device can train it without torch.

A folder of five files, made by `pf2lora-client export` (quantization/onnx), used by devices:

    manifest.json     what the rest is, and the size and SHA-256 of each of the others
    gradient.onnx     batch, targets and adapter -> loss and one gradient for each trainable array
    evaluation.onnx   batch and adapter -> logits
    weights.bin       the frozen weights, which both graphs name as external data
    tokenizer.json    for the `tokenizers` library

Inputs of the gradient graph, all of them always given:

    input_ids, attention_mask, ...   int64 [b, t]: those of `Manifest.batch_inputs`
    targets                          int64 [b], [b, t] for a causal LM, [b, 2] for question
                                     answering; IGNORED ones do not count
    label_offset                     float32 [labels], a classification's: what the loss adds to
                                     logits
    scale                            float32 []: alpha / rank
    LAYER.A, .B, .C, .D              float32 [r, n], [m, r], [r2, n], [m, r2]; r and r2 are any,
                                     from layer to layer, but r + r2 is 1 or more
    the head's tensors               float32, `Manifest.head`

Its outputs: `loss`, float32 [], the mean over the targets that count (at least one must), and for
every array NAME of the last two lines `NAME.gradient`, shaped like it. A causal LM's targets lie
beside their tokens as in `input_ids`; the graph itself compares each with the logits one before.
The evaluation graph takes the same without `targets` and `label_offset` and gives `logits`, float32
[b, labels], [b, t, vocabulary] or [b, 2, t]. Level by level: the scale 0 is the backbone alone, a
rank r2 of 0 common alone.

No start values are in it. A common adapter comes with every round; the starts of A, C and the head
follow from names, shapes and seeds (quantization/seeded.py), which needs no torch.

`load_artifact` refuses what is damaged, foreign or unsafe before anything reaches a runtime. It
cannot know who made an artifact: compare `Artifact.digest`, which covers every file, with the one
that `export` printed. Needs the standard library alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from quantization.errors import ArtifactError
from quantization.graph_file import read_outline
from quantization.manifest import (
    EVALUATION_GRAPH,
    FILES,
    GRADIENT_GRAPH,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    ArtifactFile,
    Manifest,
    manifest_bytes,
    read_manifest,
)

TARGETS: Final = "targets"
LABEL_OFFSET: Final = "label_offset"
SCALE: Final = "scale"
LOSS: Final = "loss"
LOGITS: Final = "logits"

_MANIFEST_BYTES_MAX: Final = 16 << 20
_STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx"})


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked artifact. `digest` is that of the manifest, and through it of every file."""

    folder: Path
    manifest: Manifest
    digest: str

    @property
    def gradient_graph(self) -> Path:
        return self.folder / GRADIENT_GRAPH

    @property
    def evaluation_graph(self) -> Path:
        return self.folder / EVALUATION_GRAPH

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER


def loss_inputs(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes, an open size as zero, of what the gradient graph alone takes."""
    labels = {LABEL_OFFSET: (manifest.label_count,)} if manifest.label_count else {}
    return {TARGETS: manifest.task.target_shape(0, 0), **labels}


def gradient_name(name: str) -> str:
    """The output that holds the gradient of the input `name`."""
    return f"{name}.gradient"


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write the manifest of a folder whose files are complete; returns the artifact's digest.

    `manifest.files` is not looked at: sizes and digests are those of what lies there.
    """
    files = tuple(_file_facts(folder, name) for name in FILES)
    raw = manifest_bytes(replace(manifest, files=files))
    (folder / MANIFEST).write_bytes(raw)
    return _digest_of(raw)


def load_artifact(folder: Path, digest: str = "") -> Artifact:
    """Check an artifact, and return what a device needs of it.

    Every file's size and digest must be the manifest's; nothing else may lie in the folder. Each
    graph must have the inputs, in their shapes, and outputs that the manifest calls for, use
    standard operators alone, and name no data but parts of `weights.bin`. With `digest` the
    artifact must be that one.

    Raises:
        ArtifactError: naming the file and what is wrong with it.
    """
    raw = _manifest_file(folder)
    found = _digest_of(raw)
    if digest and digest != found:
        raise ArtifactError(f"{folder}: another artifact: its digest is {found}, not {digest}")
    try:
        manifest = read_manifest(raw)
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST}: {error}") from error
    _check_files(folder, manifest)
    # Ranks are open in the graphs, which stands as zero here and there.
    arrays = manifest.trainable(rank=0, personal_rank=0)
    batch = dict.fromkeys(manifest.batch_inputs, (0, 0))
    inputs = {**batch, SCALE: (), **arrays}
    gradients = {gradient_name(name) for name in arrays}
    _check_graph(folder, GRADIENT_GRAPH, inputs | loss_inputs(manifest), {LOSS, *gradients})
    _check_graph(folder, EVALUATION_GRAPH, inputs, {LOGITS})
    return Artifact(folder, manifest, found)


def _digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _file_facts(folder: Path, name: str) -> ArtifactFile:
    path = folder / name
    with path.open("rb") as stream:
        digest = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    return ArtifactFile(name, path.stat().st_size, digest)


def _manifest_file(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise ArtifactError(f"{folder}: no artifact: {MANIFEST} cannot be read: {error}") from error
    if len(raw) > _MANIFEST_BYTES_MAX:
        raise ArtifactError(f"{path}: is over {_MANIFEST_BYTES_MAX} bytes")
    return raw


def _check_files(folder: Path, manifest: Manifest) -> None:
    foreign = sorted({path.name for path in folder.iterdir()} - {MANIFEST, *FILES})
    if foreign:
        raise ArtifactError(f"{folder}: {foreign[0]!r} is no file of an artifact")
    for wanted in manifest.files:
        path = folder / wanted.name
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path}: absent, or not a plain file")
        size_bytes = path.stat().st_size
        if size_bytes != wanted.size_bytes:
            problem = f"has {size_bytes} bytes, not the manifest's {wanted.size_bytes}"
            raise ArtifactError(f"{path}: {problem}: truncated or replaced")
        if _file_facts(folder, wanted.name) != wanted:
            raise ArtifactError(f"{path}: its digest is not the manifest's: damaged or replaced")


def _check_graph(
    folder: Path, name: str, inputs: Mapping[str, tuple[int, ...]], outputs: set[str]
) -> None:
    path = folder / name
    outline = read_outline(path)
    if differing := sorted(set(outline.inputs.items()) ^ set(inputs.items())):
        raise ArtifactError(f"{path}: its inputs are not the manifest's: {differing[:3]}")
    if others := sorted(outline.outputs ^ outputs):
        raise ArtifactError(f"{path}: its outputs are not the manifest's: {others[:3]}")
    if strange := sorted(outline.domains - _STANDARD_DOMAINS):
        raise ArtifactError(f"{path}: uses operators of {strange[0]!r}; only ONNX's own may be")
    size_bytes = (folder / WEIGHTS).stat().st_size
    for data in outline.external:
        if data.location != WEIGHTS:
            raise ArtifactError(f"{path}: names data in {data.location!r}; only {WEIGHTS} may be")
        if min(data.offset, data.length) < 0 or data.offset + data.length > size_bytes:
            raise ArtifactError(f"{path}: names data beyond the end of {WEIGHTS}")
