"""`pf2lora-client`: take part in a federation, look at what was learned, prepare a federation."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_client.artifact_export import Use, export
from edge_client.backends.base import Level, RankReport
from edge_client.backends.loading import BACKENDS
from edge_client.client import EdgeClient
from edge_client.errors import ConfigurationError, EdgeClientError
from edge_client.federation_file import checked_settings, read_federation, write_start
from edge_client.preflight import preflight
from protocol.federation import TaskKind
from quantization.manifest import ArtifactScheme, EmbeddingScheme
from quantization.schemes import Scheme

_SCHEMES = [scheme.value for scheme in Scheme]
_COMPUTE_DTYPES = ["float32", "bfloat16"]
_COMPUTE_DTYPE_HELP = "of the products of 4- and 8-bit layers; default float32, on CUDA bfloat16"
ENROLMENT_VARIABLE = "PF2LORA_CLIENT_TOKEN"
EXIT_CODES = "exit codes: 0 done; 1 failed, and says why; 2 usage; 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # as under `| head`; nothing is left to be flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"pf2lora-client: {error}", file=sys.stderr)
        return 1
    return 0


def _is_ours(error: Exception) -> bool:
    """Whether the message is meant for the user; anything else is a bug and keeps its trace."""
    if isinstance(error, EdgeClientError):
        return True
    module = type(error).__module__
    return module.startswith(("quantization.", "edge_client."))


class _Command(argparse.ArgumentParser):
    """Takes no short forms of flags: the next release's flags could change what they mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pf2lora-client", description="One device of a federation.", epilog=EXIT_CODES
    )
    commands = parser.add_subparsers(required=True, parser_class=_Command)

    run = commands.add_parser("run", help="take part until the federation's rounds are over")
    run.set_defaults(command=_run)
    run.add_argument("--coordinator", required=True, help="wss://host:port or ws://host:port")
    run.add_argument("--ca-file", type=Path, help="PEM file of the authorities to trust for wss")
    run.add_argument("--client-certificate", type=Path, help="PEM file, where TLS is mutual")
    run.add_argument("--client-key", type=Path, help="its private key")
    run.add_argument(
        "--token",
        default=os.environ.get(ENROLMENT_VARIABLE, ""),
        help=f"enrols this device; others on this machine cannot see it in ${ENROLMENT_VARIABLE}",
    )
    run.add_argument("--federation", default="", help="its name; none asks for the only one")
    run.add_argument(
        "--tell-accuracy",
        action="store_true",
        help="let the coordinator's operators see accuracy on held-out rows, and learned ranks",
    )
    _add_device_flags(run)

    for name, function, about in (
        ("evaluate", _evaluate, "accuracy on the held-out rows at each level"),
        ("ranks", _ranks, "the learned rank of each layer"),
        ("save", _save, "write common + personal as a PEFT adapter"),
    ):
        command = commands.add_parser(name, help=about)
        command.set_defaults(command=function)
        _add_device_flags(command)
        if name == "ranks":
            command.add_argument("--png", type=Path, help="also draw a heat map into this file")
        if name == "save":
            command.add_argument("--out", required=True, type=Path)
            command.add_argument(
                "--rank", type=_rank, help='cut layers to a rank; "auto": to what --energy asks'
            )
            command.add_argument("--energy", type=float, default=0.99, help="default 0.99")

    prepare = commands.add_parser("prepare", help="make the start file of a federation.toml")
    prepare.set_defaults(command=_prepare)
    prepare.add_argument("config", type=Path)

    compile_ = commands.add_parser(
        "export", help="compile a backbone for devices without torch (extra: export)"
    )
    compile_.set_defaults(command=_export)
    compile_.add_argument(
        "backbone", metavar="MODEL", help="a folder, a name, or package:NAME/folder"
    )
    compile_.add_argument("--out", required=True, type=Path, help="the artifact's folder")
    compile_.add_argument(
        "--scheme", default="int8", choices=[s.value for s in ArtifactScheme], help="default int8"
    )
    compile_.add_argument(
        "--embeddings",
        choices=[s.value for s in EmbeddingScheme],
        help="default int8, with --scheme none float32",
    )
    compile_.add_argument(
        "--config", type=Path, help="a federation.toml: task, labels and target modules are its own"
    )
    compile_.add_argument("--task", help="sequence-classification (the default) or causal-lm")
    compile_.add_argument("--label-count", type=int, help="of a classification")
    compile_.add_argument(
        "--target-modules", nargs="+", help="as in federation.toml; default query-value"
    )
    compile_.add_argument("--json", action="store_true", help="one JSON object a line")

    preflight = commands.add_parser(
        "preflight", help="run a real training step of each scheme on this machine"
    )
    preflight.set_defaults(command=_preflight)
    preflight.add_argument("backbone", help="a folder, a name, or package:NAME/folder")
    preflight.add_argument("--scheme", nargs="+", default=[], choices=_SCHEMES, help="default: all")
    preflight.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    preflight.add_argument("--compute-dtype", choices=_COMPUTE_DTYPES, help=_COMPUTE_DTYPE_HELP)
    preflight.add_argument("--json", action="store_true", help="one JSON object a line")

    quantize = commands.add_parser(
        "quantize", help="write a quantised backbone, for devices to load without its float weights"
    )
    quantize.set_defaults(command=_quantize)
    quantize.add_argument("backbone", help="a folder, a name, or package:NAME/folder")
    quantize.add_argument("--scheme", required=True, choices=[s for s in _SCHEMES if s != "none"])
    quantize.add_argument("--int8-embeddings", action="store_true", help="8 bits for embeddings")
    quantize.add_argument("--out", required=True, type=Path, help="a folder to be made")
    quantize.add_argument("--json", action="store_true", help="one JSON object")

    fingerprint = commands.add_parser("fingerprint", help="print a backbone's fingerprint")
    fingerprint.set_defaults(command=_fingerprint)
    fingerprint.add_argument("backbone")
    return parser


def _add_device_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, type=Path, help="a jsonl, csv or tsv file")
    command.add_argument("--state-dir", required=True, type=Path)
    command.add_argument("--backbone", help="folder or name to load instead of the federation's")
    command.add_argument("--scheme", help=f"{', '.join(_SCHEMES)}; default nf4")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    command.add_argument("--backend", default="torch", choices=BACKENDS, help="default torch")
    command.add_argument("--artifact", type=Path, help="the compiled backbone's folder, for ort")
    command.add_argument("--artifact-digest", default="", help="refuse any other artifact")
    command.add_argument("--compute-dtype", choices=_COMPUTE_DTYPES, help=_COMPUTE_DTYPE_HELP)
    command.add_argument("--held-out", type=float, default=0.2, help="share of rows, default 0.2")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="one JSON object a line")


_TLS_FLAGS = ("ca_file", "client_certificate", "client_key")


def _client(options: argparse.Namespace, coordinator: str = "localhost:1") -> EdgeClient:
    return EdgeClient(
        coordinator,
        options.data,
        options.state_dir,
        federation=getattr(options, "federation", ""),
        **{name: getattr(options, name, None) for name in _TLS_FLAGS},
        token=getattr(options, "token", ""),
        backbone=options.backbone,
        scheme=options.scheme,
        device=options.device,
        backend=options.backend,
        artifact=options.artifact,
        artifact_digest=options.artifact_digest,
        compute_dtype=options.compute_dtype,
        held_out=options.held_out,
        seed=options.seed,
        tell_accuracy=getattr(options, "tell_accuracy", False),
        progress=lambda line: _say(options, {"progress": line}, line),
    )


def _run(options: argparse.Namespace) -> None:
    with _client(options, options.coordinator) as client:
        summary = client.run()
        worker = client.worker
        facts: dict[str, Any] = {
            "device": summary.device,
            "rounds": summary.rounds_done,
            "sent_bytes": summary.sent_bytes,
            "received_bytes": summary.received_bytes,
            "training_rows": len(worker.training_rows),
            "held_out_rows": len(worker.held_out_rows),
            "labels": _label_counts(client),
            "ranks": [report.numerical_rank for report in client.rank_report().values()],
        }
        if worker.held_out_rows:
            facts["before"] = worker.state.facts["before_accuracy"]
            facts |= {
                level.name.lower(): client.evaluate(level=level).accuracy for level in _LEVELS
            }
        _say(options, {"summary": facts}, _summary_text(facts))


_LEVELS = (Level.COMMON, Level.PERSONAL)


def _label_counts(client: EdgeClient) -> dict[str, int]:
    worker = client.worker
    rows = [*worker.training_rows, *worker.held_out_rows]
    labels = worker.settings.task.labels
    return {name: sum(row.label == i for row in rows) for i, name in enumerate(labels)}


def _summary_text(facts: dict[str, Any]) -> str:
    lines = [
        f"trained {facts['rounds']} rounds; sent {facts['sent_bytes']} bytes, "
        f"received {facts['received_bytes']}"
    ]
    lines += [
        f"accuracy {name}: {facts[name]:.3f}"
        for name in ("before", "common", "personal")
        if name in facts
    ]
    return "\n".join(lines)


def _evaluate(options: argparse.Namespace) -> None:
    with _client(options) as client:
        for level in Level:
            found = client.evaluate(level=level)
            facts = {
                "level": level.name.lower(),
                "rows": found.count,
                "loss": found.loss,
                "accuracy": found.accuracy,
                "balanced_accuracy": found.balanced_accuracy,
            }
            text = f"{level.name.lower():<9} loss {found.loss:.4f}  accuracy {found.accuracy:.3f}"
            _say(options, facts, text)


def _ranks(options: argparse.Namespace) -> None:
    with _client(options) as client:
        reports = client.rank_report()
    if not options.json:
        print(rank_table(reports))
    for layer, report in reports.items() if options.json else ():
        print(json.dumps(_rank_facts(layer, report)))
    if options.png:
        from edge_client.rank_plot import draw_ranks

        draw_ranks(reports, options.png)
        _say(options, {"png": str(options.png)}, f"drew {options.png}")


def _rank_facts(layer: str, report: RankReport) -> dict[str, Any]:
    return {
        "layer": layer,
        "rank": report.numerical_rank,
        "entropy_rank": report.entropy_rank,
        "singular_values": list(report.singular_values),
        "energies": list(report.energies),
    }


def rank_table(reports: Mapping[str, RankReport]) -> str:
    """A row a layer: numerical and entropy rank, and the ranks that keep 90 and 99 % of energy."""
    width = max(map(len, reports))
    lines = [f"{'layer':<{width}}  rank  entropy  90 %  99 %"]
    lines += [
        f"{layer:<{width}}  {report.numerical_rank:>4}  {report.entropy_rank:>7.2f}"
        f"  {report.rank_for(0.9):>4}  {report.rank_for(0.99):>4}"
        for layer, report in reports.items()
    ]
    return "\n".join(lines)


def _rank(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _save(options: argparse.Namespace) -> None:
    with _client(options) as client:
        export = client.save_pretrained(options.out, rank=options.rank, energy=options.energy)
    facts: dict[str, Any] = {"out": str(options.out), "ranks": export.ranks}
    lowest, highest = min(export.ranks.values()), max(export.ranks.values())
    lines = [f"wrote {options.out}, rank {lowest} to {highest}"]
    if export.full and export.written:
        facts |= {"held_out_loss_full": export.full.loss, "held_out_loss": export.written.loss}
        lines += [f"held-out loss {export.written.loss:.4f}; uncut {export.full.loss:.4f}"]
    _say(options, facts, "\n".join(lines))


def _prepare(options: argparse.Namespace) -> None:
    from edge_client.backends.torch_backend import load_trainer

    settings, start = read_federation(options.config)
    federation = checked_settings(settings, str(settings["backbone"]["name"]))
    trainer = load_trainer(federation, backbone=None, scheme="none", device="cpu", personal_seed=0)
    write_start(start, trainer.common().arrays(), federation)
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
    _say(options, facts, text)


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
    settings = checked_settings(read_federation(options.config)[0], options.backbone)
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
        _say(options, asdict(found), text)
    if failed:
        raise ConfigurationError("--scheme", f"{', '.join(failed)} cannot be used", "another")


def _quantize(options: argparse.Namespace) -> None:
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
    _say(options, facts, "\n".join(lines))


def _fingerprint(options: argparse.Namespace) -> None:
    from quantization.fingerprint import fingerprint, resolve_backbone

    print(fingerprint(resolve_backbone(options.backbone)))


def _say(options: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    print(json.dumps(facts) if options.json else text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
