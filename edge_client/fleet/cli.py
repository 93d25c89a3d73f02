"""`pf2lora-loadtest`: many simulated devices against a coordinator, and how it bears them.

The report goes to standard output, progress and what went wrong to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from edge_client.errors import ConfigurationError, EdgeClientError
from edge_client.fleet import plan as reading
from edge_client.fleet.loadtest import Outcome, Own, Theirs, run_load_test
from edge_client.fleet.meter import raise_descriptors
from edge_client.fleet.own_coordinator import Shape, check_settings
from edge_client.fleet.plan import Plan
from edge_client.fleet.report import Files, as_json, progress_line, table
from edge_client.fleet.thresholds import Threshold, read_threshold
from edge_client.session import check_joining
from edge_client.tls import TlsFiles
from edge_client.transport import websocket_dial
from protocol.command_end import exit_code_of, let_go_of_log
from protocol.command_parser import CommandParser

FAILED, USAGE, MISSED, NOBODY = 1, 2, 3, 4
EXIT_CODES = """\
exit codes: 0 good; 1 failed, and says why; 2 usage; 3 a --fail-if was missed; 4 no device was let
in; 130 interrupted twice"""
EPILOG = f"""\
Without --coordinator it starts a coordinator of its own on loopback, with a store that is removed
afterwards. One that runs already needs --spoil-federation: the devices' updates are noise, and
spoil the adapter of the federation they are sent to.

A --fail-if is NAME>BOUND or NAME<BOUND: "upload_p95>2s", "errors>1%", "updates_per_second<50".
{EXIT_CODES}"""
DEFAULT_RUN_TIME_S: Final = 30.0
PROGRESS_EVERY_S: Final = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a load test; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with _devices_unheard():
            return exit_code_of(lambda: _run(options))
    except ConfigurationError as error:
        print(f"pf2lora-loadtest: {error}", file=sys.stderr)
        return USAGE
    except EdgeClientError as error:
        print(f"pf2lora-loadtest: {error}", file=sys.stderr)
        return FAILED
    finally:
        let_go_of_log()


@contextlib.contextmanager
def _devices_unheard() -> Iterator[None]:
    """Without their log: a line for each would say no more than the report's counts do."""
    log = logging.getLogger("pf2lora.client")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="pf2lora-loadtest",
        description="Many simulated devices in one process: how a coordinator bears them.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--devices", metavar="N", type=_as(reading.count), default=100, help="default 100")
    add(
        "--spawn-rate",
        metavar="RATE",
        type=_as(reading.rate),
        default=100.0,
        help="how many begin a second; default 100/s",
    )
    add(
        "--run-time",
        metavar="TIME",
        type=_as(reading.duration_s),
        help="default 30s, if --rounds is not given",
    )
    add("--rounds", metavar="N", type=_as(reading.count), help="end when so many are closed")
    add(
        "--training-time",
        metavar="TIME",
        type=_as(reading.training_time),
        default=reading.training_time("0s"),
        help="between assignment and report: 2s, 1s-5s or lognormal:2s:0.5; default 0s",
    )
    add(
        "--seed",
        metavar="TEXT",
        default="",
        help="keys and chance follow from it; default a new one, which the report tells",
    )
    _add_faults(parser)
    _add_their_coordinator(parser)
    _add_own_coordinator(parser)
    _add_report(parser)
    return parser


def _add_faults(parser: argparse.ArgumentParser) -> None:
    faults = parser.add_argument_group("faults")
    faults.add_argument(
        "--dropout",
        metavar="SHARE",
        type=_as(reading.share),
        default=0.0,
        help="share of assignments in which a device cuts its connection and comes back; default 0",
    )
    faults.add_argument(
        "--stragglers",
        metavar="SHARE",
        type=_as(reading.share),
        default=0.0,
        help="share of assignments that take --straggler-time; default 0",
    )
    faults.add_argument(
        "--straggler-time",
        metavar="TIME",
        type=_as(reading.duration_s),
        default=30.0,
        help="instead of --training-time; default 30s",
    )


def _add_their_coordinator(parser: argparse.ArgumentParser) -> None:
    theirs = parser.add_argument_group("a coordinator that runs already")
    theirs.add_argument("--coordinator", metavar="URL", help="ws://host:port or wss://host:port")
    theirs.add_argument(
        "--spoil-federation", metavar="NAME", help="its very name; its adapter will be noise"
    )
    theirs.add_argument(
        "--ca-file",
        metavar="FILE",
        type=Path,
        help="PEM file of the authorities to trust for wss",
    )
    theirs.add_argument(
        "--client-certificate",
        metavar="FILE",
        type=Path,
        help="PEM file, where TLS is mutual; all devices show it",
    )
    theirs.add_argument("--client-key", metavar="FILE", type=Path, help="its private key")
    theirs.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="what `pf2lora-coordinator devices token --count N` printed: a token a device",
    )


def _add_own_coordinator(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("a coordinator of its own")
    for name, about in (
        ("layers", "adapted layers of the common adapter, two tensors each"),
        ("rank", "its rank"),
        ("width", "the width of its layers"),
    ):
        default = getattr(Shape(), name)
        help_text = f"{about}; default {default}"
        own.add_argument(f"--{name}", metavar="N", type=_as(reading.count), help=help_text)
    own.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the coordinator, as in rounds.report_goal=80; repeatable",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    report = parser.add_argument_group("report")
    report.add_argument(
        "--csv", type=Path, metavar="PREFIX", help="PREFIX_stats.csv and PREFIX_history.csv"
    )
    report.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    report.add_argument(
        "--fail-if", action="append", default=[], metavar="THRESHOLD", help="as below; repeatable"
    )


def _as(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _run(options: argparse.Namespace) -> int:
    target = _target(options)
    limits = [read_threshold(text, own=isinstance(target, Own)) for text in options.fail_if]
    plan = _plan(options)
    raise_descriptors(plan.devices)
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(Files(options.csv)) if options.csv else None
        outcome = asyncio.run(run_load_test(plan, target, _teller(files)))
        if files:
            files.finish(outcome.values)
    return _tell(options, plan, outcome, limits)


def _plan(options: argparse.Namespace) -> Plan:
    run_time_s = options.run_time
    if run_time_s is None and options.rounds is None:
        run_time_s = DEFAULT_RUN_TIME_S
    return Plan(
        options.devices,
        options.seed or secrets.token_hex(8),
        options.spawn_rate,
        run_time_s,
        options.rounds,
        options.training_time,
        options.dropout,
        options.stragglers,
        options.straggler_time,
    )


def _target(options: argparse.Namespace) -> Theirs | Own:
    """Whose coordinator it is; no flag of the other kind is passed over.

    Raises:
        ConfigurationError: naming the flag.
    """
    of_theirs = (
        "spoil_federation",
        "ca_file",
        "client_certificate",
        "client_key",
        "token_file",
    )
    of_own = ("layers", "rank", "width", "set")
    for name in of_own if options.coordinator else of_theirs:
        if getattr(options, name):
            right = "it without --coordinator" if options.coordinator else "it with --coordinator"
            raise ConfigurationError("--" + name.replace("_", "-"), "means nothing here", right)
    if options.coordinator:
        return _theirs(options)
    shape = {name: getattr(options, name) for name in of_own[:3] if getattr(options, name)}
    settings = dict(_setting(text) for text in options.set)
    check_settings(settings)
    return Own(Shape(**shape), settings)


def _theirs(options: argparse.Namespace) -> Theirs:
    if not options.spoil_federation:
        raise ConfigurationError(
            "--spoil-federation",
            "is missing: the devices' updates are noise, and the federation's adapter is spoilt "
            "by them for good",
            "the federation's very name, if that is meant",
        )
    target = Theirs(
        options.coordinator,
        options.spoil_federation,
        TlsFiles(options.ca_file, options.client_certificate, options.client_key),
        _tokens(options),
    )
    websocket_dial(target.address, target.tls)  # refuses what cannot be used
    for token in target.tokens or ("",):
        check_joining(target.federation, token)
    return target


def _tokens(options: argparse.Namespace) -> tuple[str, ...]:
    if not options.token_file:
        return ()
    try:
        tokens = tuple(options.token_file.read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError("--token-file", str(error), "a file of tokens") from error
    if len(tokens) < options.devices:
        problem = f"has {len(tokens)} tokens for {options.devices} devices"
        raise ConfigurationError("--token-file", problem, "one a device")
    return tokens


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigurationError("--set", f"{text!r} is no setting", "KEY=VALUE")
    return key, value


def _teller(files: Files | None) -> Callable[[Mapping[str, float]], None]:
    """Writes a row of the history down, and now and then a line."""
    told_at = -PROGRESS_EVERY_S

    def tell(row: Mapping[str, float]) -> None:
        nonlocal told_at
        if files:
            files.add(row)
        if row["seconds"] >= told_at + PROGRESS_EVERY_S:
            told_at = row["seconds"]
            print(progress_line(row), file=sys.stderr, flush=True)

    return tell


def _tell(
    options: argparse.Namespace, plan: Plan, outcome: Outcome, limits: Sequence[Threshold]
) -> int:
    missed = [found for limit in limits if (found := limit.missed(outcome.values))]
    notes = [*outcome.notes, *(f"missed: {text}" for text in missed)]
    if outcome.failure:
        notes.append(outcome.failure)
    if options.json:
        facts = as_json(outcome.values, outcome.figures, notes)
        print(json.dumps({"seed": plan.seed, **facts, "missed": missed}))
    else:
        print(f"seed      {plan.seed}")
        print(table(outcome.values, outcome.figures, notes))
    if outcome.failure:
        return FAILED
    if not outcome.figures.joined:
        return NOBODY
    return MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
