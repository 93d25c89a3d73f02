"""A device without a coordinator, for tests that hand it its rounds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from edge_client.backends.torch_backend import load_trainer
from edge_client.data import FieldNames
from edge_client.own_rows import DataSettings
from edge_client.private_store import DeviceState, PrivateStore
from edge_client.worker import DeviceWorker
from protocol.federation import Adapter, Backbone, FederationSettings, Task, TaskKind, Training
from protocol.messages import Assignment
from protocol.tensors import NamedTensors
from tests.integration.test_federation import MINILM

ROWS = [{"text": f"a film {n}", "label": ("bad", "good")[n % 2]} for n in range(10)]
SETTINGS = FederationSettings(
    "apps",
    Backbone(MINILM, "sha256:" + "0" * 64),
    Task(TaskKind.SEQUENCE_CLASSIFICATION, ("bad", "good"), 8),
    Adapter(rank=2, personal_rank=1),
    Training(local_steps=2, batch_size=4),
)


class Device:
    """A worker without a coordinator: its rounds are handed to it."""

    def __init__(self, folder: Path, settings: FederationSettings = SETTINGS, **how: Any) -> None:
        self.store = PrivateStore(folder)
        data = DataSettings(how.pop("rows", ROWS), FieldNames(), *how.pop("split", ()))
        self.worker = DeviceWorker(data, self.store, self._trainer, print, **how)
        self.settings = settings
        asyncio.run(self.worker.prepare(settings))

    def _trainer(self, settings: FederationSettings) -> Any:
        seed = self.worker.split.seed
        return load_trainer(
            settings, backbone=None, scheme="none", device="cpu", personal_seed=seed
        )

    def round(self, number: int, base: NamedTensors | None = None) -> NamedTensors:
        base = base or self.worker.trainer.common()
        assignment = Assignment(f"{number:032x}", number, base.digest(), 60.0, base.payload())
        return asyncio.run(self.worker.train(assignment, base)).update

    @property
    def state(self) -> DeviceState:
        """As it is on disk."""
        state = self.store.load()
        assert state is not None
        return state

    @property
    def personal(self) -> dict[str, bytes]:
        return {name: a.tobytes() for name, a in self.worker.trainer.personal().items()}
