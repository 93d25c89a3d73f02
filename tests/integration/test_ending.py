"""Apps end a run at any moment: nothing is lost, and the folder is let go of when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_client.client import EdgeClient
from edge_client.errors import ConfigurationError, StateError
from tests.integration.device import ROWS, Device
from tests.integration.test_federation import _coordinator, _write_config, _write_data


def _training_begins() -> tuple[threading.Event, Callable[[str], None]]:
    """An event that is set when a round is trained, and the client's `progress` that sets it."""
    begins = threading.Event()

    def progress(line: str) -> None:
        if "training" in line:
            begins.set()

    return begins, progress


def _global_state() -> list[Any]:
    root = logging.getLogger()
    return [
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        np.geterr(),
        list(warnings.filters),
        (list(root.handlers), root.level, root.manager.disable),
    ]


def test_an_app_closes_in_the_middle_of_a_run_and_keeps_its_own_state(tmp_path: Path) -> None:
    config = _write_config(tmp_path, count=1000, cohort=1)
    data = _write_data(tmp_path / "a.jsonl", 0.5)
    trains, progress = _training_begins()

    with _coordinator(config) as address:
        before = _global_state()
        client = EdgeClient(address, data, tmp_path / "a", scheme="none", progress=progress)

        async def app() -> int:
            with pytest.raises(ConfigurationError, match=r"await asyncio\.to_thread\(client\.run"):
                client.run()
            running = asyncio.create_task(asyncio.to_thread(client.run))
            await asyncio.to_thread(trains.wait, 60)
            with pytest.raises(ConfigurationError, match="run: is under way in another thread"):
                await asyncio.to_thread(client.run)
            assert len(client.predict(["a film"])) == 1
            client.close()
            return (await running).rounds_done

        rounds = asyncio.run(app())
        assert _global_state() == before
        for ask in (client.run, client.evaluate, client.rank_report, lambda: client.predict([])):
            with pytest.raises(ConfigurationError, match="client: is closed; use a new EdgeClient"):
                ask()
        client.close()
        with EdgeClient(address, data, tmp_path / "a", scheme="none") as again:
            again.predict(["a film"])
            assert again.worker.state.rounds_done == rounds
            trainer: Any = again.worker.trainer
            assert not trainer._model.training


def test_an_interrupted_run_has_ended_when_it_returns(tmp_path: Path) -> None:
    config = _write_config(tmp_path, count=1000, cohort=1)
    data = _write_data(tmp_path / "a.jsonl", 0.5)
    trains, progress = _training_begins()

    async def interrupt(client: EdgeClient) -> None:
        running = asyncio.create_task(client._run())
        await asyncio.to_thread(trains.wait, 60)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert client.worker._alone.acquire(blocking=False)  # nobody trains any more
        client.worker._alone.release()

    with _coordinator(config) as address:
        client = EdgeClient(address, data, tmp_path / "a", scheme="none", progress=progress)
        with client:
            asyncio.run(interrupt(client))


def test_a_client_is_not_a_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a server that makes its app before it forks: what is asked there would hang."""
    client = EdgeClient("localhost:1", ROWS, tmp_path, scheme="none")
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: 0)
        for ask in (client.run, client.evaluate, client.rank_report, lambda: client.predict([])):
            with pytest.raises(ConfigurationError, match="client: is another process's, of which"):
                ask()
        client.close()
    with pytest.raises(ConfigurationError, match="client: is closed"):
        client.evaluate()
    assert repr(client) == f"<EdgeClient {client.device} in {tmp_path}, closed>"


def test_the_folder_stays_locked_until_a_closed_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def stubborn(_: EdgeClient) -> None:
        begun.set()
        await asyncio.to_thread(go_on.wait, 60)

    Device(tmp_path / "a")
    monkeypatch.setattr(EdgeClient, "_run", stubborn)
    client = EdgeClient("localhost:1", ROWS, tmp_path / "a", scheme="none")
    running = threading.Thread(target=client.run)
    running.start()
    begun.wait(60)
    client.close()
    with pytest.raises(StateError, match="in use by another process"):
        EdgeClient("localhost:1", ROWS, tmp_path / "a")
    go_on.set()
    running.join()
    EdgeClient("localhost:1", ROWS, tmp_path / "a").close()


def test_a_run_can_be_stopped_before_a_coordinator_was_found(tmp_path: Path) -> None:
    client = EdgeClient("localhost:1", ROWS, tmp_path, scheme="none")
    asked = threading.Event()

    async def dial() -> Any:
        asked.set()
        await asyncio.sleep(60)

    client._dial = dial
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.run)
        asked.wait(60)
        client.stop()
        summary = running.result(60)
    assert (summary.rounds_done, summary.finished) == (0, False)


def _unanswered(folder: Path) -> tuple[EdgeClient, threading.Event]:
    """A client whose coordinator never answers, and an event that is set when it dials."""
    client = EdgeClient("localhost:1", ROWS, folder, scheme="none")
    dialled = threading.Event()

    async def dial() -> Any:
        dialled.set()
        await asyncio.get_running_loop().create_future()

    client._dial = dial
    return client, dialled


def test_a_stop_before_the_run_has_begun_ends_it_and_only_it(tmp_path: Path) -> None:
    client, dialled = _unanswered(tmp_path)
    client.stop()
    client.stop()
    assert not client.run().finished
    assert not dialled.is_set()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.run)
        assert dialled.wait(60)  # this one goes on
        assert not running.done()
        client.stop()
        assert not running.result(60).finished
    client.close()


@pytest.mark.parametrize("end", [EdgeClient.stop, EdgeClient.close])
def test_a_run_ends_whenever_its_app_says_so(
    tmp_path: Path, end: Callable[[EdgeClient], None]
) -> None:
    """Both begin at once, so that any of a run's first steps may be the one that is met."""
    for number in range(50):
        client, _ = _unanswered(tmp_path / str(number))
        start = threading.Barrier(2)

        def run(client: EdgeClient = client, start: threading.Barrier = start) -> bool:
            start.wait(60)
            with contextlib.suppress(ConfigurationError):  # it was closed before
                return client.run().finished
            return False

        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(run)
            start.wait(60)
            end(client)
            assert running.result(60) is False
        client.close()
