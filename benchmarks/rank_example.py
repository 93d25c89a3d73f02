"""The synthetic rank example: does a method learn the rank that each client's data has?

    python -m benchmarks.rank_example --out docs/rank_example.png

Linear regression without noise, `Y_k = X_k W_k*^T` with `W_k* = B* A* + D_k* C_k*`: the common part
has rank r, each client's own part, of rank r2, adds directions or takes some away: true ranks from
r - r2 to r + r2. The paper has such an example; its numbers were not at hand, and this
construction is ours. Every client has enough rows to be learned alone. A start counts as a success
where the rank of every client's learned matrix, singular values above 1 % of the largest, is true.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.aggregation import aggregation_for, fedavg, hetlora
from edge_client.algorithms import algorithm_for
from edge_client.algorithms.base import AlgorithmState, Gradients, Layout, train
from edge_client.algorithms.schedule import plans
from protocol.federation import (
    Adapter,
    Backbone,
    Decay,
    FederationSettings,
    Rounds,
    Task,
    TaskKind,
    Training,
    Weighting,
)
from protocol.methods import (
    Algorithm,
    FedDPA,
    HetLoRA,
    HomLoRA,
    LocalOnly,
    PF2LoRA,
)
from protocol.tensors import NamedTensors, truncated

Array = np.ndarray[Any, Any]
RANK, PERSONAL_RANK = 4, 2
INPUTS, OUTPUTS, ROWS = 24, 16, 40
TRUE_RANKS = (2, 3, 4, 5, 6)
ROUNDS, LOCAL_STEPS = 600, 10
TOLERANCE = 0.01
RATE = 0.01  # of all methods; the default of PF2LoRA's lower level is a fifth
METHODS: dict[str, Algorithm] = {
    "PF2LoRA": PF2LoRA(),
    "PF2LoRA, common first": PF2LoRA(common_warmup_rounds=60),
    "PF2LoRA, equal rates": PF2LoRA(lower_learning_rate=RATE),
    "FedDPA": FedDPA(),
    "HETLoRA": HetLoRA(rank_min=2, rank_share=0.9),
    "HOMLoRA": HomLoRA(),
    "local only": LocalOnly(),
    "local only, r + r2": LocalOnly(),
}


@dataclass
class Client:
    """Inputs [rows, n], outputs [rows, m], and the matrix [m, n] between them."""

    inputs: Array
    outputs: Array
    matrix: Array


def make_clients(seed: int) -> list[Client]:
    """One client for each true rank."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((OUTPUTS, OUTPUTS)))[0]
    right = np.linalg.qr(rng.standard_normal((INPUTS, INPUTS)))[0]
    values = rng.uniform(1.0, 2.0, RANK + PERSONAL_RANK)
    clients = []
    for rank in TRUE_RANKS:
        # The common part without its last directions, or with more beside it.
        matrix = (left[:, :rank] * values[:rank]) @ right[:, :rank].T
        inputs = rng.standard_normal((ROWS, INPUTS))
        clients.append(Client(inputs, inputs @ matrix.T, matrix))
    return clients


class Regression:
    """A client's adapter on zero weights: a gradient oracle on flat float64 vectors."""

    def __init__(self, client: Client, layout: Layout, seed: int, personal_seed: int) -> None:
        self._client = client
        self.personal_head = 0.0
        shapes = {
            "A": (layout.common_rank, INPUTS),
            "B": (OUTPUTS, layout.common_rank),
            "C": (layout.personal_rank, INPUTS),
            "D": (OUTPUTS, layout.personal_rank),
        }
        self._at: dict[str, tuple[int, slice, tuple[int, int]]] = {}
        sizes = [0, 0]
        for name, shape in shapes.items():
            group, size = int(name in "CD"), shape[0] * shape[1]
            self._at[name] = group, slice(sizes[group], sizes[group] + size), shape
            sizes[group] += size
        self.common, self.personal = np.zeros(sizes[0]), np.zeros(sizes[1])
        for name, own_seed in (("A", seed), ("C", personal_seed)):
            rng = np.random.default_rng([own_seed, ord(name)])
            self.factor(name)[:] = rng.standard_normal(shapes[name]) / np.sqrt(INPUTS)

    def factor(self, name: str, vectors: tuple[Array, Array] | None = None) -> Array:
        group, where, shape = self._at[name]
        found: Array = (vectors or (self.common, self.personal))[group][where].reshape(shape)
        return found

    def factors(self, vector: Array) -> list[tuple[Array, Array]]:
        vectors = (vector, self.personal)
        return [(self.factor("A", vectors), self.factor("B", vectors))]

    def personal_factors(self, vector: Array) -> list[tuple[Array, Array]]:
        vectors = (self.common, vector)
        return [(self.factor("C", vectors), self.factor("D", vectors))]

    @property
    def matrix(self) -> Array:
        a, b, c, d = (self.factor(name) for name in "ABCD")
        product: Array = b @ a + d @ c
        return product

    def gradients(self, batch: object) -> Gradients:
        client = self._client
        errors = client.inputs @ self.matrix.T - client.outputs
        slope = errors.T @ client.inputs / len(errors)
        vectors = np.zeros_like(self.common), np.zeros_like(self.personal)
        for down, up in ("AB", "CD"):
            self.factor(down, vectors)[:] = self.factor(up).T @ slope
            self.factor(up, vectors)[:] = slope @ self.factor(down).T
        return Gradients(float((errors**2).sum(1).mean() / 2), *vectors)

    def local_gradients(self, batch: object) -> Gradients:
        raise NotImplementedError

    def mixed_product(self, batch: object, vector: Array) -> Array:
        raise NotImplementedError

    def load(self, base: NamedTensors) -> None:
        self.common[:] = 0.0
        for name, array in base.arrays().items():
            self.factor(name[-1])[tuple(map(slice, array.shape))] = array

    def tensors(self) -> dict[str, Array]:
        names = [name for name, (group, _, _) in self._at.items() if group == 0]
        return {f"w.{name}": self.factor(name).astype(np.float32) for name in names}


def learn(method: str, seed: int) -> list[Array]:
    """The matrix that each client ends with."""
    clients = make_clients(seed)
    rank = RANK + PERSONAL_RANK if method == "local only, r + r2" else RANK
    settings = FederationSettings(
        "example",
        Backbone("none", "sha256:" + "0" * 64),
        Task(TaskKind.CAUSAL_LM),
        Adapter(rank, PERSONAL_RANK),
        Training(LOCAL_STEPS, learning_rate=RATE, warmup_rounds=5, decay=Decay.COSINE),
        METHODS[method],
        Rounds(ROUNDS, len(clients), weighting=Weighting.UNIFORM),
    )
    steps = [algorithm_for(settings, 100 * seed + number) for number in range(len(clients))]
    states = [AlgorithmState() for _ in clients]
    layout = steps[0].layout(settings.adapter)
    models = [
        Regression(client, layout, seed, 100 * seed + number)
        for number, client in enumerate(clients)
    ]
    base = NamedTensors.from_arrays(models[0].tensors() if layout.common_rank else {})
    for number in range(1, ROUNDS + 1):
        aggregate = aggregation_for(settings, base)
        assert isinstance(aggregate, fedavg.FedAvg | hetlora.HetLoRA)  # all is in their sums
        for model, step, state in zip(models, steps, states, strict=True):
            download = aggregate.download(step.rank(state))
            if layout.common_rank:
                model.load(download)
            train(step, model, repeat(None), state, plans(settings, number))
            if layout.common_rank:
                aggregate.accumulate(_update(model, download, step.rank(state)), 1)
        base = aggregate.finalize()
    for model, step, state in zip(models, steps, states, strict=True):
        if layout.common_rank:
            model.load(truncated(base, step.rank(state)) if step.rank(state) else base)
    return [model.matrix for model in models]


def _update(model: Regression, base: NamedTensors, rank: int) -> NamedTensors:
    own = NamedTensors.from_arrays(model.tensors())
    if rank:
        own, base = truncated(own, rank), truncated(base, rank)
    before = base.arrays()
    return NamedTensors.from_arrays({n: a - before[n] for n, a in own.arrays().items()})


def rank_of(matrix: Array) -> int:
    """Singular values above the tolerance."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > TOLERANCE * values[0]).sum()) if values[0] > 0 else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="a PNG file")
    options = parser.parse_args()
    found: dict[str, list[list[int]]] = {}
    print("| method | all ranks right | ranks right | error of the matrices |")
    print("|---|---|---|---|")
    for name in options.methods:
        ranks, errors = [], []
        for seed in range(options.starts):
            learned = learn(name, seed)
            true = [client.matrix for client in make_clients(seed)]
            ranks.append([rank_of(matrix) for matrix in learned])
            errors += list(_relative_errors(learned, true))
        found[name] = ranks
        right = np.array(ranks) == np.array(TRUE_RANKS)
        print(
            f"| {name} | {right.all(1).sum()} of {len(ranks)} | {right.mean():.0%} "
            f"| {np.median(errors):.1e} |",
            flush=True,
        )
    if options.out:
        _draw(found, options.out)


def _relative_errors(learned: list[Array], true: list[Array]) -> Iterator[float]:
    for one, other in zip(learned, true, strict=True):
        yield float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _draw(found: dict[str, list[list[int]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * len(found) + 0.8, 2.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, ranks) in zip(panels, found.items(), strict=True):
        learned = np.array(ranks)
        highest = max(RANK + PERSONAL_RANK, learned.max())
        heat = np.array(
            [[(column == rank).mean() for column in learned.T] for rank in range(highest + 1)]
        )
        image = axes.imshow(heat, origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.plot(
            range(len(TRUE_RANKS)), TRUE_RANKS, "o", color="darkorange", mec="white", markersize=5
        )
        axes.set_xticks(range(len(TRUE_RANKS)), TRUE_RANKS)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("true rank", fontsize=8)
    panels[0].set_ylabel("learned rank (dot: the true one)", fontsize=8)
    figure.colorbar(image, ax=panels).set_label("share of starts", fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
