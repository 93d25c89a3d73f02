"""Where a backbone lies, and the fingerprint that says which one it is.

A fingerprint is `sha256:` and 64 hex digits. The first half is of the weights, as they lay in the
folder before any quantisation; the second half is of the tokenizer, as it works here. Each is the
front half of a SHA-256, so what differs between two backbones shows in their fingerprints alone.
Devices that hold the same backbone agree on it, whatever their scheme, device or runtime.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Final

from quantization.errors import BackboneError, MissingExtraError
from quantization.folder_manifest import is_quantized, read_manifest
from quantization.tokenizer_digest import with_tokenizer
from quantization.weights_digest import weights_digest

_PACKAGE_PREFIX: Final = "package:"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_TEXT_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja")


def resolve_backbone(name: str) -> Path:
    """Return the folder that `name` stands for.

    `name` is a folder; or `package:NAME/sub/folder`, a folder inside an installed Python package
    (found without importing it); or a name on the Hugging Face hub, downloaded if not cached.

    Raises:
        BackboneError: nothing usable is there; the text names what was tried.
        MissingExtraError: a hub name, and huggingface_hub is not installed.
    """
    if name.startswith(_PACKAGE_PREFIX):
        return _with_config(_package_folder(name), name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _with_config(folder, name)
    if not _HUB_NAME.fullmatch(name):
        raise BackboneError(
            f"backbone {name!r}: no such folder, and not a hub name (OWNER/NAME) "
            f"nor a package folder ({_PACKAGE_PREFIX}NAME/sub/folder)"
        )
    return _with_config(_hub_folder(name), name)


def whole_name(name: str) -> str:
    """The same name; a folder's by its whole path, which is good in any working directory."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def check_shared(name: str) -> None:
    """Refuse a name that leads elsewhere from another working directory.

    Raises:
        BackboneError: it is a folder's, by a relative path.
    """
    folder = Path(name).expanduser()
    if name.startswith(_PACKAGE_PREFIX) or folder.is_absolute():
        return
    if folder.is_dir() or not _HUB_NAME.fullmatch(name):
        raise BackboneError(
            f"backbone {name!r}: a relative path, here {folder.absolute()}; each device would "
            f"count it from where it runs: give the whole path, {_PACKAGE_PREFIX}NAME/sub/folder, "
            "or a hub name that is no folder here; a device that has it elsewhere says --backbone"
        )


def _with_config(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise BackboneError(f"backbone {name!r}: {folder} has no config.json")
    return folder


def _package_folder(name: str) -> Path:
    package, _, inner = name.removeprefix(_PACKAGE_PREFIX).partition("/")
    # A dotted name would make find_spec import the parent package: only top-level names are taken.
    if not package.isidentifier() or ".." in Path(inner).parts:
        raise BackboneError(f"backbone {name!r}: want {_PACKAGE_PREFIX}NAME/sub/folder")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(f"backbone {name!r}: no Python package {package!r} is installed")
    folders = [Path(place) / inner for place in spec.submodule_search_locations]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise BackboneError(f"backbone {name!r}: package {package!r} has no folder {inner!r}")
    return found


def _hub_folder(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "torch") from error
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=[*_HUB_TEXT_FILES, "model*.safetensors"])
        )
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin*"])
    except Exception as error:  # the hub client lets through errors of three libraries
        raise BackboneError(
            f"backbone {name!r}: no folder of that name in {Path.cwd()}, and the Hugging Face hub "
            f"gave none ({type(error).__name__}: {error}); give an existing folder, "
            f"{_PACKAGE_PREFIX}NAME/sub/folder, or a hub name that is cached or can be reached"
        ) from error
    return folder


def fingerprint(folder: Path) -> str:
    """The fingerprint of the backbone in `folder`.

    A folder written by `pf2lora-client quantize` says which weights it was made from: that half is
    those weights'.

    Raises:
        BackboneError: configuration, weights or tokenizer are absent or damaged.
        MissingExtraError: transformers is not installed, which reads tokenizers.
    """
    try:
        from quantization.tokenizer import digest_of, read_tokenizer
    except ImportError as error:
        raise MissingExtraError(str(error.name), "torch") from error
    return fingerprint_of(folder, digest_of(read_tokenizer(folder)))


def fingerprint_of(folder: Path, tokenizer_digest: str) -> str:
    """The same, for a tokenizer that has been read.

    Raises:
        BackboneError: configuration or weights are absent or damaged.
    """
    if is_quantized(folder):
        return with_tokenizer(read_manifest(folder).fingerprint, tokenizer_digest)
    return with_tokenizer(f"sha256:{weights_digest(folder)}", tokenizer_digest)
