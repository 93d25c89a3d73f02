"""The commands of `pf2lora-client` that are about backbones: no device's state is touched."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_client.artifact_export import Use, export
from edge_client.errors import ConfigurationError, importing
from edge_client.federation_file import (
    checked_settings,
    has_own_backbones,
    read_federation,
    settings_in,
)
from edge_client.preflight import preflight
from edge_client.shared_adapter import shared_start
from edge_client.start_file import write_start
from protocol.command_parser import add_command
from protocol.federation import TaskKind
from quantization.manifest import ArtifactScheme, EmbeddingScheme
from quantization.schemes import COMPUTE_DTYPES, Scheme

MODEL_HELP = "a folder, a hub name, or package:NAME/folder"
TASKS = ", ".join(kind.value for kind in TaskKind)
SCHEMES = [scheme.value for scheme in Scheme]
COMPUTE_DTYPE_HELP = "of the products of 4- and 8-bit layers; default float32, on CUDA bfloat16"


def add_commands(commands: Any) -> None:
    """Add prepare, export, preflight, quantize and fingerprint to the parser's."""
    prepare = add_command(commands, "prepare", _prepare, "make the start file of a federation.toml")
    about = "a federation.toml; the start file goes beside it, or where its server.start says"
    prepare.add_argument("config", metavar="FILE", type=Path, help=about)

    about = "compile a backbone for devices without torch (extra: export)"
    compile_ = add_command(commands, "export", _export, about)
    compile_.add_argument("backbone", metavar="MODEL", help=MODEL_HELP)
    compile_.add_argument("--out", metavar="FOLDER", required=True, type=Path, help="a new folder")
    compile_.add_argument(
        "--scheme", default="int8", choices=[s.value for s in ArtifactScheme], help="default int8"
    )
    compile_.add_argument(
        "--embeddings",
        choices=[s.value for s in EmbeddingScheme],
        help="default int8, with --scheme none float32",
    )
    about = "a federation.toml, instead of the three flags below"
    compile_.add_argument("--config", metavar="FILE", type=Path, help=about)
    compile_.add_argument("--task", help=f"{TASKS}; the first is the default")
    about = "of a classification, which needs it"
    compile_.add_argument("--label-count", metavar="N", type=int, help=about)
    about = "as in federation.toml; default query-value"
    compile_.add_argument("--target-modules", metavar="NAME", nargs="+", help=about)
    compile_.add_argument("--json", action="store_true", help="one JSON object a line")

    about = "run a real training step of each scheme on this machine"
    preflight = add_command(commands, "preflight", _preflight, about)
    preflight.add_argument("backbone", metavar="MODEL", help=MODEL_HELP)
    about = f"{', '.join(SCHEMES)}; default all"
    preflight.add_argument(
        "--scheme", metavar="SCHEME", nargs="+", default=[], choices=SCHEMES, help=about
    )
    preflight.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
    preflight.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, help=COMPUTE_DTYPE_HELP)
    preflight.add_argument("--json", action="store_true", help="one JSON object a line")

    about = "write a quantised backbone, for devices to load without its float weights"
    quantize = add_command(commands, "quantize", _quantize, about)
    quantize.add_argument("backbone", metavar="MODEL", help=MODEL_HELP)
    less = [scheme for scheme in SCHEMES if scheme != "none"]
    about = "what its weights are stored as"
    quantize.add_argument("--scheme", required=True, choices=less, help=about)
    quantize.add_argument("--int8-embeddings", action="store_true", help="8 bits for embeddings")
    quantize.add_argument("--out", metavar="FOLDER", required=True, type=Path, help="a new folder")
    quantize.add_argument("--json", action="store_true", help="one JSON object a line")

    about = "print a backbone's fingerprint"
    fingerprint = add_command(commands, "fingerprint", _fingerprint, about)
    fingerprint.add_argument("backbone", metavar="MODEL", help=MODEL_HELP)


def say(options: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Print facts, as JSON where that was asked for."""
    print(json.dumps(facts) if options.json else text, flush=True)


def _prepare(options: argparse.Namespace) -> None:
    table, start = read_federation(options.config)
    if has_own_backbones(table):
        federation = settings_in(table)
        write_start(start, shared_start(federation), federation)
        print(f"wrote {start}")
        return
    with importing("torch"):
        from edge_client.backends.torch_backend import load_trainer

    federation = checked_settings(table, str(table["backbone"]["name"]))
    trainer = load_trainer(federation, backbone=None, scheme="none", device="cpu", personal_seed=0)
    write_start(start, trainer.common().arrays(), federation, trainer.frozen())
    print(f"wrote {start}")


def _export(options: argparse.Namespace) -> None:
    scheme = ArtifactScheme(options.scheme)
    plain = scheme is ArtifactScheme.NONE
    embeddings = options.embeddings or ("float32" if plain else "int8")
    artifact = export(
        options.backbone, options.out, _use(options), scheme, EmbeddingScheme(embeddings)
    )
    manifest = artifact.manifest
    size_bytes = sum(file.size_bytes for file in manifest.files)
    facts = {
        "out": str(options.out),
        "digest": artifact.digest,
        "fingerprint": manifest.fingerprint,
        "layers": len(manifest.layers),
        "bytes": size_bytes,
    }
    text = (
        f"wrote {options.out}: {len(manifest.layers)} adapted layers, "
        f"{size_bytes / 2**20:.1f} MiB\ndigest {artifact.digest}"
    )
    say(options, facts, text)


def _use(options: argparse.Namespace) -> Use:
    """What to compile for: as a federation says it, or as the flags do."""
    if options.config is None:
        targets = options.target_modules or ["query-value"]
        return Use(
            options.task or TaskKind.SEQUENCE_CLASSIFICATION.value,
            options.label_count or 0,
            targets[0] if len(targets) == 1 else tuple(targets),
        )
    given = ("task", "label_count", "target_modules")
    if any(getattr(options, name) is not None for name in given):
        problem = "has task, labels and target modules, and flags have them too"
        raise ConfigurationError("--config", problem, "one of the two")
    table, _ = read_federation(options.config)
    if has_own_backbones(table):
        problem = f"{options.config}: pfedlora trains on torch alone"
        raise ConfigurationError("--config", problem, "a federation of another method")
    settings = checked_settings(table, options.backbone)
    return Use(settings.task.kind.value, len(settings.task.labels), settings.adapter.target_modules)


def _preflight(options: argparse.Namespace) -> None:
    if not options.json:
        print("scheme      step ms  peak MiB  (PF2LoRA, 8 rows of 64 tokens)")
    failed = []
    for found in preflight(options.backbone, options.scheme, options.device, options.compute_dtype):
        text = f"{found.scheme:<10}  {found.step_ms:>7.0f}  {found.peak_mib:>8.0f}"
        if found.problem:
            failed.append(found.scheme)
            text = f"{found.scheme:<10}  does not work here: {found.problem}"
        say(options, asdict(found), text)
    if failed:
        raise ConfigurationError("--scheme", f"{', '.join(failed)} cannot be used", "another")


def _quantize(options: argparse.Namespace) -> None:
    with importing("torch"):
        from quantization.quantize import quantize

    written = quantize(
        options.backbone, options.scheme, options.out, int8_embeddings=options.int8_embeddings
    )
    tasks = [task.value for task in written.tasks]
    facts: dict[str, Any] = {
        "out": str(written.folder),
        "scheme": written.scheme.value,
        "fingerprint": written.fingerprint,
        "tasks": tasks,
        "codes_bytes": written.codes_bytes,
        "absmax_bytes": written.absmax_bytes,
        "other_bytes": written.other_bytes,
    }
    lines = [
        f"wrote {written.folder}: {written.scheme.value}, for {', '.join(tasks)}",
        f"tensors {written.total_bytes} bytes: codes {written.codes_bytes}, "
        f"absmax {written.absmax_bytes}, not quantised {written.other_bytes}",
        f"fingerprint {written.fingerprint}",
    ]
    lines += [f"not for {task.value}: {why}" for task, why in written.not_served.items()]
    say(options, facts, "\n".join(lines))


def _fingerprint(options: argparse.Namespace) -> None:
    from quantization.fingerprint import fingerprint, resolve_backbone

    print(fingerprint(resolve_backbone(options.backbone)))
