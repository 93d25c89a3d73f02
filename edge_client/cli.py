"""`pf2lora-client`: take part in a federation, look at what was learned, prepare a federation."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_client import backbone_cli
from edge_client.backbone_cli import COMPUTE_DTYPE_HELP, MODEL_HELP, SCHEMES, say
from edge_client.backends.base import FoundAnswer, LabelMix, Level, Prediction
from edge_client.backends.loading import BACKENDS
from edge_client.client import EdgeClient
from edge_client.data import Place, RawRow, check_asked, placed, raw_rows
from edge_client.errors import ConfigurationError, DataError, EdgeClientError
from edge_client.factors import RankReport
from edge_client.rank_plot import check_drawing, draw_ranks
from protocol.command_end import exit_code_of, let_go_of_log
from protocol.command_parser import CommandParser, add_command
from protocol.federation import TaskKind
from quantization.schemes import COMPUTE_DTYPES

ENROLMENT_VARIABLE = "PF2LORA_CLIENT_TOKEN"
EXIT_CODES = "exit codes: 0 done; 1 failed, and says why; 2 usage; 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    def run() -> int:
        options.command(options)
        return 0

    try:
        return exit_code_of(run)
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"pf2lora-client: {error}", file=sys.stderr)
        return 1
    finally:
        let_go_of_log()


def _is_ours(error: Exception) -> bool:
    """Whether the message is meant for the user; anything else is a bug and keeps its trace."""
    if isinstance(error, EdgeClientError):
        return True
    module = type(error).__module__
    return module.startswith(("quantization.", "edge_client."))


class _Command(CommandParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, epilog=EXIT_CODES)


def _parser() -> argparse.ArgumentParser:
    parser = _Command(prog="pf2lora-client", description="One device of a federation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_questions(commands)
    backbone_cli.add_commands(commands)
    return parser


def _add_run(commands: Any) -> None:
    about = "take part until the federation's rounds are over"
    run = add_command(commands, "run", _run, about)
    run.add_argument(
        "--coordinator", metavar="URL", required=True, help="wss://host:port or ws://host:port"
    )
    about = "PEM file of the authorities to trust for wss; default the system's"
    run.add_argument("--ca-file", metavar="FILE", type=Path, help=about)
    about = "PEM file, where TLS is mutual"
    run.add_argument("--client-certificate", metavar="FILE", type=Path, help=about)
    run.add_argument("--client-key", metavar="FILE", type=Path, help="its private key")
    run.add_argument(
        "--token",
        default=os.environ.get(ENROLMENT_VARIABLE, ""),
        help=f"enrols this device; others on this machine cannot see it in ${ENROLMENT_VARIABLE}",
    )
    about = "its name, where the coordinator has several"
    run.add_argument("--federation", metavar="NAME", default="", help=about)
    run.add_argument(
        "--tell-accuracy",
        action="store_true",
        help="let the coordinator's operators see accuracy on held-out rows, and learned ranks",
    )
    _add_device_flags(run)


def _add_questions(commands: Any) -> None:
    """What is asked of a device that has been trained."""

    def add(name: str, ask: Callable[[argparse.Namespace], None], about: str) -> CommandParser:
        command = add_command(commands, name, ask, about)
        _add_device_flags(command)
        return command

    evaluate = add("evaluate", _evaluate, "tell loss and scores on the held-out rows at each level")
    predict = add("predict", _predict, "label texts, answer questions or go on from prompts")
    _add_asking_flags(predict)
    for command in (evaluate, predict):
        mixes = [mix.value for mix in LabelMix]
        about = "answer for the device's own mix of labels, or for an even one; default own"
        command.add_argument("--label-mix", choices=mixes, default="own", help=about)
    ranks = add("ranks", _ranks, "tell the learned rank of each layer")
    ranks.add_argument("--png", metavar="FILE", type=Path, help="also draw a heat map into it")
    save = add("save", _save, "write common + personal as a PEFT adapter")
    about = "a folder; an adapter in it is replaced"
    save.add_argument("--out", metavar="FOLDER", required=True, help=about)
    about = 'cut each layer to rank N, or with "auto" to what --energy asks; default uncut'
    save.add_argument("--rank", metavar="N|auto", type=_rank, help=about)
    about = "share of a layer's energy that --rank auto keeps; default 0.99"
    save.add_argument("--energy", metavar="SHARE", type=float, default=0.99, help=about)


def _add_device_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--data", metavar="FILE", required=True, type=Path, help="a jsonl, csv or tsv file")
    about = "what the device has learned, and its key; made where there is none"
    # No Path, which takes "" for ".".
    add("--state-dir", metavar="FOLDER", required=True, help=about)
    add("--backbone", metavar="MODEL", help=f"{MODEL_HELP}; default the federation's")
    add("--scheme", help=f"{', '.join(SCHEMES)}; default nf4")
    add("--device", default="cpu", help="cpu or cuda; default cpu")
    add("--backend", default="torch", choices=BACKENDS, help="default torch")
    add("--artifact", metavar="FOLDER", type=Path, help="the compiled backbone, for ort")
    about = "refuse any other artifact"
    add("--artifact-digest", metavar="DIGEST", default="", help=about)
    add("--compute-dtype", choices=COMPUTE_DTYPES, help=COMPUTE_DTYPE_HELP)
    about = "of rows, to score on; default as trained with, at first 0.2"
    add("--held-out", metavar="SHARE", type=float, help=about)
    about = "default as trained with, at first 0"
    add("--seed", metavar="N", type=int, help=about)
    add("--json", action="store_true", help="one JSON object a line")


def _add_asking_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("texts", nargs="*", metavar="TEXT", help="to label, or to go on from")
    about = "a file like --data's, without labels or answers"
    command.add_argument("--rows", metavar="FILE", type=Path, help=about)
    names = [level.name.lower() for level in Level]
    command.add_argument("--level", choices=names, default="personal", help="default personal")
    about = "how many at most after a prompt; default 64"
    command.add_argument("--new-tokens", metavar="N", type=int, default=64, help=about)


_TLS_FLAGS = ("ca_file", "client_certificate", "client_key")


def _client(options: argparse.Namespace, coordinator: str | None = None) -> EdgeClient:
    """A device that takes part, or without a coordinator one that is only asked."""
    if coordinator is None and not Path(options.state_dir).is_dir():  # asking makes no device
        problem = f"there is no folder {options.state_dir}"
        raise ConfigurationError("state_dir", problem, "one that a run has trained")

    def progress(line: str) -> None:
        if coordinator is not None:
            with contextlib.suppress(BrokenPipeError):  # the rounds go on, whoever reads of them
                say(options, {"progress": line}, line)
        else:  # what is asked for has the output to itself
            print(line, file=sys.stderr)

    return EdgeClient(
        "localhost:1" if coordinator is None else coordinator,
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
        progress=progress,
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
        name = ""
        if worker.held_out_rows:
            # Nothing was held out when the device began.
            if (before := worker.state.facts.get("before_accuracy")) is not None:
                facts["before"] = before
            for level in _LEVELS:
                found = client.evaluate(level=level)
                name = _shown(next(iter(found.scores)))
                facts[level.name.lower()] = found.accuracy
        say(options, {"summary": facts}, _summary_text(facts, name))


_LEVELS = (Level.COMMON, Level.PERSONAL)


def _label_counts(client: EdgeClient) -> dict[str, int]:
    worker = client.worker
    rows = [*worker.training_rows, *worker.held_out_rows]
    labels = worker.settings.task.labels
    counts = Counter(row.label for row in rows)
    return {name: counts[i] for i, name in enumerate(labels)}


def _shown(score: str) -> str:
    return score.replace("_", " ")


def _summary_text(facts: dict[str, Any], score: str) -> str:
    lines = [
        f"trained {facts['rounds']} rounds; sent {facts['sent_bytes']} bytes, "
        f"received {facts['received_bytes']}"
    ]
    lines += [
        f"{score} {name}: {facts[name]:.3f}"
        for name in ("before", "common", "personal")
        if name in facts
    ]
    return "\n".join(lines)


def _evaluate(options: argparse.Namespace) -> None:
    with _client(options) as client:
        for level in Level:
            found = client.evaluate(level=level, label_mix=LabelMix(options.label_mix))
            facts = {
                "level": level.name.lower(),
                "rows": found.count,
                "loss": found.loss,
                **found.scores,
            }
            scores = "".join(
                f"  {_shown(name)} {value:.3f}" for name, value in found.scores.items()
            )
            say(options, facts, f"{level.name.lower():<9} loss {found.loss:.4f}{scores}")


def _predict(options: argparse.Namespace) -> None:
    rows = placed(options.texts)
    if options.rows:
        rows += raw_rows(options.rows)
    if not rows:
        raise ConfigurationError("predict", "was given nothing", "a TEXT or --rows FILE")
    check_asked(rows)
    level, mix = Level[options.level.upper()], LabelMix(options.label_mix)
    with _client(options) as client, client.worker.ready() as model:
        task = model.settings.task
        if task.kind is TaskKind.CAUSAL_LM:
            if mix is not LabelMix.OWN:
                problem = f"{task.kind.value} has no labels to be {mix.value}"
                raise ConfigurationError("label_mix", problem, LabelMix.OWN.value)
            _go_on(options, client, rows, level)
            return
        for found in model.predict(rows, level, mix):
            say(options, *_answer(found, task.labels))


def _go_on(
    options: argparse.Namespace,
    client: EdgeClient,
    rows: list[tuple[Place, object]],
    level: Level,
) -> None:
    prompts = [
        (place, RawRow(row, place).value("text") if isinstance(row, Mapping) else row)
        for place, row in rows
    ]
    check_asked(prompts, prompts=True)
    for place, prompt in prompts:
        try:
            text = client.generate(str(prompt), options.new_tokens, level)
        except DataError as error:
            raise place.error(str(error)) from None
        say(options, {"prompt": prompt, "text": text}, text)


def _answer(found: Prediction | FoundAnswer, labels: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What was predicted of one row, as facts and as a line."""
    if isinstance(found, FoundAnswer):
        return asdict(found), f"{found.probability:.3f}  {found.text}"
    shares = dict(zip(labels, found.probabilities, strict=True))
    facts = {"label": found.label, "probabilities": shares}
    return facts, f"{shares[found.label]:.3f}  {found.label}"


def _ranks(options: argparse.Namespace) -> None:
    if options.png:
        check_drawing(options.png)
    with _client(options) as client:
        reports = client.rank_report()
    if options.json:
        for layer, report in reports.items():
            print(json.dumps(_rank_facts(layer, report)))
    else:
        print(rank_table(reports))
    if options.png:
        draw_ranks(reports, options.png)
        say(options, {"png": str(options.png)}, f"drew {options.png}")


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
    facts: dict[str, Any] = {"out": options.out, "ranks": export.ranks}
    lowest, highest = min(export.ranks.values()), max(export.ranks.values())
    lines = [f"wrote {options.out}, rank {lowest} to {highest}"]
    if export.full and export.written:
        facts |= {"held_out_loss_full": export.full.loss, "held_out_loss": export.written.loss}
        lines += [f"held-out loss {export.written.loss:.4f}; uncut {export.full.loss:.4f}"]
    say(options, facts, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
