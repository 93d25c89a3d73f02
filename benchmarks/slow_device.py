"""What one slow device costs: the same federation in the modes that there are.

    python -m benchmarks.slow_device --seeds 0 1

Eight devices of `sst2-s0.5`; one takes ten times as long for its local steps as the others. Every
mode gets about as many reports. Time is the virtual clock's: training alone, no network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import settings_of
from benchmarks.simulation import Clock, SimulatedDevice, run_federation
from benchmarks.tasks import TASKS, deal, labels_of
from edge_client.backends.torch_backend import load_trainer
from edge_client.session import FinishedReport, Offer
from protocol.messages import Assignment, Receipt, ReceiptStatus
from protocol.tensors import NamedTensors

RESULTS = Path(__file__).parent / "results" / "slow_device.jsonl"
TASK = "sst2-s0.5"
QUICK_S, SLOW_S = 10.0, 100.0
NEVER = 1_000_000  # evaluated at the end alone
MODES: dict[str, list[str]] = {
    "all of the cohort": ["rounds.count=20"],
    "goal of 7 in 8": [
        "rounds.count=23",
        "rounds.report_goal=7",
        "rounds.minimum_reports=7",
    ],
    "asynchronous, buffer of 4": [
        "rounds.count=40",
        "rounds.mode=asynchronous",
        "rounds.report_goal=4",
        "rounds.minimum_reports=1",
    ],
}


@dataclass
class PacedDevice(SimulatedDevice):
    """A simulated device whose local steps take their time."""

    pace_s: float = QUICK_S
    trained: int = 0
    counted: int = 0
    told_at: float = 0.0
    offered: Offer = field(init=False)

    def __post_init__(self) -> None:
        self.offered = super().offer()

    def offer(self) -> Offer:
        return self.offered  # alike at every check-in, of which those who wait make many

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        # Its own place in its data: asynchronously the round's number says nothing of that.
        self.trained += 1
        report = await super().train(replace(assignment, round=self.trained), base)
        await asyncio.sleep(self.pace_s)
        return report

    async def settled(self, receipt: Receipt) -> None:
        self.counted += receipt.status is ReceiptStatus.ACCEPTED
        await super().settled(receipt)

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        self.told_at = asyncio.get_running_loop().time()
        await super().finish(base, rounds)


def run(mode: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """One federation; what it took and where it ended."""
    task = TASKS[TASK]
    shares, labels = deal(task, "test", seed), labels_of(task)
    cell = {
        "task": TASK,
        "method": "pf2lora",
        "rounds": 1,
        "seed": seed,
        "learning_rate": learning_rate,
        "set": MODES[mode],
    }
    settings = settings_of(cell, len(shares), labels)
    trainer = load_trainer(settings, backbone=None, scheme="bf16", device="cpu", personal_seed=0)
    clock = Clock()
    devices = [
        PacedDevice(
            f"device-{number}",
            1000 * seed + number,
            trainer.encode(share.training),
            len(share.training),
            [share],
            trainer,
            settings,
            NEVER,
            0,
            clock,
            pace_s=QUICK_S if number else SLOW_S,
        )
        for number, share in enumerate(shares)
    ]
    run_federation(settings, trainer, devices)
    scores = {
        level: [d.results[settings.rounds.count, level][0]["accuracy"] for d in devices]
        for level in ("personal", "common")
    }
    return {
        "mode": mode,
        "seed": seed,
        "learning_rate": learning_rate,
        "took_s": round(min(device.told_at for device in devices), 1),
        "reports": sum(device.counted for device in devices),
        "reports_of_the_slow": devices[0].counted,
        **{level: round(float(np.mean(found)), 5) for level, found in scores.items()},
        "personal_of_the_slow": scores["personal"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    for seed in options.seeds:
        for mode in options.modes:
            record = run(mode, seed, options.learning_rate)
            print(json.dumps(record), flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
