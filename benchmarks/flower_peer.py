"""Flower's side of `flower_load`: its server, or one of its clients. Runs where flwr is installed.

    python benchmarks/flower_peer.py server --port 8080 --devices 32 --rounds 21
    python benchmarks/flower_peer.py client --port 8080

This is its older engine (`start_server`, `start_client`), the quicker one: each client has a stream
of gRPC. The arrays are those of the load test's adapter; clients send back what they are given.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import numpy as np
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg

SHAPES = 24 * [(8, 768), (768, 8)]  # 1,179,648 bytes of float32


class Echo(NumPyClient):  # type: ignore[misc]  # flwr is not here when types are checked
    """A client whose training takes no time."""

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, Any]:
        return parameters, 100, {}


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that knows when its first round began, and how many updates it had."""

    cpu_s = wall_s = 0.0
    updates = 0

    def configure_fit(self, server_round: int, *arguments: Any, **named: Any) -> Any:
        asked = super().configure_fit(server_round, *arguments, **named)
        if server_round == 1:  # all clients are here now
            self.cpu_s, self.wall_s = time.process_time(), time.perf_counter()
        return asked

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> Any:
        self.updates += len(results)
        return super().aggregate_fit(server_round, results, failures)


def serve(port: int, devices: int, rounds: int) -> None:
    """Run all rounds; what an update cost, as JSON on the last line."""
    strategy = Timed(
        fraction_evaluate=0.0,
        min_fit_clients=devices,
        min_available_clients=devices,
        initial_parameters=ndarrays_to_parameters([np.zeros(s, np.float32) for s in SHAPES]),
    )
    address, config = f"127.0.0.1:{port}", ServerConfig(num_rounds=rounds)
    start_server(server_address=address, config=config, strategy=strategy)
    updates = strategy.updates
    if updates != devices * rounds:
        raise SystemExit(f"{updates} of {devices * rounds} updates came")
    found = {
        "cpu_ms": 1e3 * (time.process_time() - strategy.cpu_s) / updates,
        "updates_per_second": updates / (time.perf_counter() - strategy.wall_s),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["server", "client"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if options.side == "server":
        serve(options.port, options.devices, options.rounds)
    else:
        start_client(server_address=f"127.0.0.1:{options.port}", client=Echo().to_client())


if __name__ == "__main__":
    main()
