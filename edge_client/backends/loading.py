"""Which Trainer a device has: its runtime, and how the backbone is held. Imports none of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_client.arguments import named
from edge_client.backends.base import Trainer
from edge_client.errors import (
    BackboneError,
    ConfigurationError,
    MissingExtraError,
    importing,
)
from protocol.federation import FederationSettings
from quantization.errors import MissingExtraError as MissingLibraryError
from quantization.errors import QuantizationError
from quantization.fingerprint import check_shared
from quantization.folder_manifest import is_quantized, read_manifest
from quantization.schemes import COMPUTE_DTYPES, Scheme

BACKENDS: Final = ("torch", "ort")
_SCHEMES: Final = tuple(scheme.value for scheme in Scheme)


@dataclass(frozen=True, slots=True)
class TorchChoice:
    """A backbone loaded and quantised here; `backbone` None is the federation's own name for it."""

    backbone: str | None
    scheme: str = "nf4"
    device: str = "cpu"
    compute_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class OrtChoice:
    """A backbone compiled into the artifact folder, which has the scheme in it; CPU.

    With a `digest` the artifact must be that one.
    """

    artifact: Path
    digest: str = ""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """An app catches this package's errors, wherever the trouble is."""
    try:
        yield
    except MissingLibraryError as error:
        raise MissingExtraError(error.library, error.extra) from error
    except QuantizationError as error:
        raise BackboneError(str(error)) from error


@_translated()
def choose(
    backend: str,
    *,
    backbone: str | None,
    scheme: str | None,
    device: str,
    compute_dtype: str | None,
    artifact: str | Path | None,
    artifact_digest: str,
) -> TorchChoice | OrtChoice:
    """The choice that the arguments of EdgeClient make.

    Raises:
        ConfigurationError: no such backend, or an argument that is not this one's.
        BackboneError: the backbone is a quantised folder that cannot be read.
    """
    if backend not in BACKENDS:
        raise ConfigurationError("backend", f"{backend!r} is none", " or ".join(BACKENDS))
    if backend == "torch":
        if artifact is not None or artifact_digest:
            raise ConfigurationError("artifact", "the torch backend takes none", 'backend "ort"')
        scheme = "nf4" if scheme is None else scheme
        named("device", device, '"cpu" or "cuda"')
        choice = TorchChoice(backbone, scheme, device, compute_dtype)
        _check_torch(choice)
        return choice
    compiled = "a folder that `pf2lora-client export` wrote"
    if artifact is None:
        raise ConfigurationError("artifact", "the ort backend needs one", compiled)
    own = (("backbone", backbone), ("scheme", scheme), ("compute_dtype", compute_dtype))
    for field, given in own:
        if given is not None:
            problem = f"{given!r}: the artifact has its own; leave it out"
            raise ConfigurationError(field, problem)
    if device != "cpu":
        raise ConfigurationError("device", f"{device!r}: the ort backend has one", "cpu")
    return OrtChoice(Path(named("artifact", artifact, compiled)), artifact_digest)


def shared_name(settings: FederationSettings) -> str:
    """The federation's name for its backbone.

    Raises:
        ConfigurationError: it has none.
    """
    if settings.backbone is None:
        problem = f"is not given, and in {settings.name!r} each device has its own"
        raise ConfigurationError("backbone", problem, "a folder, a name, or package:NAME/folder")
    return settings.backbone.name


@_translated()
def load_trainer(
    choice: TorchChoice | OrtChoice, settings: FederationSettings, personal_seed: int
) -> Trainer:
    """The trainer of a federation.

    Raises:
        MissingExtraError: the backend's packages are not installed.
        BackboneError, AdapterError, ConfigurationError: naming what is wrong.
    """
    # Imports are here and not above: a process that never trains need not have either runtime.
    match choice:
        case TorchChoice(backbone, scheme, device, compute_dtype):
            if backbone is None:
                check_shared(shared_name(settings))
            with importing("torch"):
                from edge_client.backends import torch_backend
            return torch_backend.load_trainer(
                settings,
                backbone=backbone,
                scheme=scheme,
                device=device,
                personal_seed=personal_seed,
                compute_dtype=compute_dtype,
            )
        case OrtChoice(artifact, digest):
            from edge_client.backends import ort

            return ort.load_trainer(
                settings, artifact=artifact, digest=digest, personal_seed=personal_seed
            )


def _check_torch(choice: TorchChoice) -> None:
    """Refuse what cannot be loaded so, also a quantised folder, before any coordinator is asked."""
    if choice.scheme not in _SCHEMES:
        raise ConfigurationError("scheme", f"{choice.scheme!r} is none", ", ".join(_SCHEMES))
    if choice.compute_dtype not in (None, *COMPUTE_DTYPES):
        problem = f"{choice.compute_dtype!r} is none"
        raise ConfigurationError("compute_dtype", problem, " or ".join(COMPUTE_DTYPES))
    folder = Path(choice.backbone or "").expanduser()
    if choice.backbone is None or not is_quantized(folder):
        return
    held = read_manifest(folder).scheme.value
    if held != choice.scheme:
        problem = f"is {choice.scheme!r}, and {choice.backbone} is quantised as {held!r}"
        raise ConfigurationError("scheme", problem, repr(held))
