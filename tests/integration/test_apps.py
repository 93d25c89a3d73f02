"""What apps do to their device: ask while it trains, go on after a fault, hold rows out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import cli, worker
from edge_client.algorithms.base import Gradients
from edge_client.backends.base import Evaluation, LabelMix, Level
from edge_client.backends.encoding import Batch, EncodedRows
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.client import EdgeClient
from edge_client.data import Example
from edge_client.errors import (
    ConfigurationError,
    DataError,
    DivergedError,
    StateError,
    StorageFullError,
)
from edge_client.private_store import PrivateStore
from protocol.federation import (
    Loss,
)
from protocol.messages import Assignment
from protocol.methods import PerFedAvg, PF2LoRA
from protocol.tensors import NamedTensors
from tests.integration.device import ROWS, SETTINGS, Device
from tests.integration.test_federation import (
    _coordinator,
    _write_config,
    _write_data,
)


def _in_the_middle(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Have something done in a round's first step, at its second gradient."""
    steps = list[Batch]()

    def gradients(self: TorchTrainer, batch: Batch) -> Gradients:
        steps.append(batch)
        if len(steps) == 2:
            do()
        return compute(self, batch)

    compute = TorchTrainer.gradients
    monkeypatch.setattr(TorchTrainer, "gradients", gradients)


@pytest.mark.parametrize("algorithm", [PF2LoRA(), PerFedAvg()], ids=["pf2lora", "perfedavg"])
def test_a_question_in_the_middle_of_a_round_is_answered_as_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any
) -> None:
    """After the step that it meets; and what is trained is as if nobody had asked."""
    settings = replace(SETTINGS, algorithm=algorithm)
    device, other = Device(tmp_path / "asked", settings), Device(tmp_path / "left", settings)
    base = device.worker.trainer.common()
    for each in (device, other):
        each.round(1, base)
    asked, answers = threading.Event(), list[Any]()

    def ask() -> list[Any]:
        with device.worker.ready() as model:
            return [model.evaluate(model.held_out_rows, level) for level in Level]

    def from_a_thread() -> None:
        asked.set()
        answers.append(ask())
        answers.append(device.state.rounds_done)

    before, thread = ask(), threading.Thread(target=from_a_thread)

    def meet() -> None:
        thread.start()
        while not device.worker._questions:
            asked.wait(0.01)

    with monkeypatch.context() as patch:
        _in_the_middle(patch, meet)
        update = device.round(2, base)
    thread.join()
    assert answers == [before, 1]
    assert update.digest() == other.round(2, base).digest()
    assert device.personal == other.personal


def test_a_run_that_is_stopped_ends_at_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app that shuts down, or is on battery, cannot wait for a round; which is made again."""
    device, other = Device(tmp_path / "stopped"), Device(tmp_path / "left")
    base, before = device.worker.trainer.common(), device.personal
    loop = asyncio.new_event_loop()
    training = loop.create_task(
        device.worker.train(Assignment("", 1, b"", 60.0, base.payload()), base)
    )

    async def cancel() -> None:
        training.cancel()
        for _ in range(5):  # turns of the loop, until who trains has been told
            await asyncio.sleep(0)

    with monkeypatch.context() as patch:
        _in_the_middle(patch, lambda: asyncio.run_coroutine_threadsafe(cancel(), loop).result(60))
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(training)
    loop.close()
    assert (device.personal, device.state.rounds_done) == (before, 0)
    assert device.round(1, base).digest() == other.round(1, base).digest()


def test_what_diverges_is_not_kept_and_says_what_would_help(tmp_path: Path) -> None:
    training = replace(SETTINGS.training, learning_rate=1.0)
    device = Device(tmp_path, replace(SETTINGS, training=training))
    before, base = device.personal, device.worker.trainer.common()
    with pytest.raises(DivergedError, match=r"round 1: .*loss nan.*smaller training.learning_rate"):
        device.round(1, _not_finite(base))
    assert device.personal == before
    assert device.state.rounds_done == 0


def test_a_round_that_found_no_room_is_as_if_it_had_never_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, other = Device(tmp_path / "full"), Device(tmp_path / "roomy")
    base, before = device.worker.trainer.common(), device.personal

    def full(*_: object) -> None:
        raise StorageFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(PrivateStore, "save", full)
        with pytest.raises(StorageFullError):
            device.round(1, base)
    assert device.personal == before
    assert device.round(1, base).digest() == other.round(1, base).digest()


def test_a_device_that_found_no_room_to_begin_begins_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFullError("no room")

    settings = replace(SETTINGS, task=replace(SETTINGS.task, loss=Loss.BALANCED_SOFTMAX))
    device = Device.__new__(Device)
    with monkeypatch.context() as patch:
        patch.setattr(PrivateStore, "save", full)
        with pytest.raises(StorageFullError):
            Device.__init__(device, tmp_path, settings, split=(0.2, 0))
    asyncio.run(device.worker.prepare(settings))
    assert device.state.rounds_done == 0


def test_a_first_round_that_fails_leaves_a_model_that_answers(tmp_path: Path) -> None:
    device = Device(tmp_path)
    base = device.worker.trainer.common()
    with pytest.raises(DivergedError):
        device.round(1, _not_finite(base))
    assert device.worker.trainer.common().digest() == base.digest()


@pytest.mark.parametrize("algorithm", [PF2LoRA(), PerFedAvg()], ids=["pf2lora", "perfedavg"])
def test_a_device_between_rounds_says_what_it_says_after_a_restart(
    tmp_path: Path, algorithm: Any
) -> None:
    def said(device: Device) -> list[Any]:
        with device.worker.ready() as model:
            return [model.evaluate(model.held_out_rows, level) for level in Level]

    settings = replace(SETTINGS, algorithm=algorithm)
    device = Device(tmp_path, settings)
    device.round(1)
    assert said(device) == said(Device(tmp_path, settings))


def test_a_run_looks_at_so_many_held_out_rows_and_evaluate_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty thousand rows would be minutes before the first round, and twice that in each."""
    looked_at: list[int] = []

    def evaluate(
        trainer: TorchTrainer, rows: EncodedRows, level: Level, *mix: LabelMix
    ) -> Evaluation:
        looked_at.append(len(rows))
        return plain(trainer, rows, level, *mix)

    plain = TorchTrainer.evaluate
    monkeypatch.setattr(TorchTrainer, "evaluate", evaluate)
    monkeypatch.setattr(worker, "LOOKED_AT_MAX", 4)
    device = Device(tmp_path, rows=ROWS * 4, tell_accuracy=True)
    assert looked_at == [4]
    device.round(1)
    assert looked_at == [4, 4, 4]
    with device.worker.ready() as model:
        assert model.evaluate(model.held_out_rows, Level.COMMON).count == 8


def test_a_round_that_is_cancelled_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    """Else the folder would be let go while its round is still to be written."""
    device, begun = Device(tmp_path), threading.Event()
    doing, base = device.worker, device.worker.trainer.common()

    def train(*_: object) -> None:
        begun.set()
        go_on.wait(60)
        done.append(True)

    async def cancel() -> None:
        training = asyncio.create_task(
            doing.train(Assignment("", 1, b"", 1.0, base.payload()), base)
        )
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(2):  # as an app that stops its client and then closes it
            training.cancel()
            await asyncio.sleep(0)
        assert not training.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await training
        assert done

    done: list[bool] = []
    go_on = threading.Event()
    monkeypatch.setattr(doing, "_train", train)
    asyncio.run(cancel())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": replace(SETTINGS.task, labels=("good", "bad"))}, "task"),
        ({"adapter": replace(SETTINGS.adapter, alpha=4.0), "seed": 5}, "adapter, seed"),
    ],
)
def test_what_was_learned_under_other_settings_is_not_taken_for_these(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    Device(tmp_path)
    with pytest.raises(StateError, match=f"its {named} had other settings; use another state fol"):
        Device(tmp_path, replace(SETTINGS, **changes))
    training = replace(SETTINGS.training, learning_rate=0.01)
    device = Device(tmp_path, replace(SETTINGS, training=training))
    device.round(1)
    assert '"learning_rate": 0.01' in str(device.state.facts["settings"])


def test_settings_are_the_coordinators_whoever_asked_before(tmp_path: Path) -> None:
    """An app's question is answered under the settings of the state, and a run goes on from it."""
    device = Device(tmp_path)
    device.round(1)
    training = replace(SETTINGS.training, learning_rate=0.01)
    with EdgeClient("localhost:1", ROWS, tmp_path, scheme="none") as client:
        client.evaluate()
        asyncio.run(client.worker.prepare(replace(SETTINGS, training=training)))
        assert client.worker.settings.training == training
        found = {name: array.tobytes() for name, array in client.worker.trainer.personal().items()}
        assert found == device.personal
        with pytest.raises(StateError, match="its seed had other settings"):
            asyncio.run(client.worker.prepare(replace(SETTINGS, seed=9)))
        client.evaluate()


def test_where_all_was_trained_on_a_run_says_that_no_rows_can_be_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write_config(tmp_path, count=1, cohort=1)
    data = _write_data(tmp_path / "a.jsonl", 0.5)
    device = ["--data", str(data), "--scheme", "none", "--state-dir", str(tmp_path / "a")]
    with _coordinator(config) as address:
        run = ["run", "--coordinator", address, *device]
        assert cli.main([*run, "--held-out", "0"]) == 0
        assert "accuracy" not in capsys.readouterr().out
        assert cli.main([*run, "--held-out", "0.3"]) == 0
        said = capsys.readouterr().out
        assert "no rows can be held out: all are trained on, or were before\n" in said
        assert "20 rows, 0 of them held out" in said
        assert "accuracy" not in said
    assert cli.main(["evaluate", *device, "--held-out", "0.3"]) == 1
    assert "no rows to evaluate on: hold some out, or pass some" in capsys.readouterr().err


def test_what_a_device_holds_out_stays_held_out(tmp_path: Path) -> None:
    def opened(**how: Any) -> EdgeClient:
        return EdgeClient("localhost:1", ROWS, tmp_path, scheme="none", **how)

    def held(**how: Any) -> set[str]:
        with opened(**how) as client:
            found = client.evaluate()
            rows = client.worker.held_out_rows
            assert found.count == len(rows)
            return {row.text for row in rows}

    device = Device(tmp_path, split=(0.5, 3))
    kept = _texts(device.worker.held_out_rows)
    personal = device.personal
    # Before any training another choice is another beginning.
    with opened(held_out=0.2, seed=4) as client:
        client.evaluate()
        assert client.worker.training_rows != device.worker.training_rows
        assert {n: a.tobytes() for n, a in client.worker.trainer.personal().items()} != personal
    assert held() == held(held_out=0.2, seed=4)
    device = Device(tmp_path, split=(0.5, 3))
    assert device.personal == personal
    device.round(1)
    assert held() == held(held_out=0.5) == held(seed=3) == kept
    assert held(held_out=0.6) == kept  # there are no more
    with pytest.raises(ConfigurationError, match=r"^seed: is 4, and this .* trained with 3; use 3"):
        opened(seed=4)
    fewer = held(held_out=0.2)
    assert fewer < kept
    assert held() == kept  # looking at fewer changed nothing
    Device(tmp_path, split=(0.2, None)).round(2)
    assert held() == held(held_out=0.5) == fewer


def test_no_row_is_held_out_that_was_trained_on_from_any_file(tmp_path: Path) -> None:
    more = [{"text": f"a play {n}", "label": ("bad", "good")[n % 2]} for n in range(10)]
    trained: set[str] = set()
    for number, rows in enumerate((ROWS, ROWS + more, more, ROWS[:5] + more[5:], ROWS), 1):
        device = Device(tmp_path, rows=rows)
        division = [device.worker.training_rows, device.worker.held_out_rows]
        trained |= _texts(division[0])
        assert not trained & _texts(division[1])
        # A round that fails has trained on nothing, and is made again.
        with pytest.raises(DivergedError):
            device.round(number, _not_finite(device.worker.trainer.common()))
        device.round(number)
        again = Device(tmp_path, rows=rows).worker
        assert [again.training_rows, again.held_out_rows] == division
    assert trained < {row["text"] for row in ROWS + more}
    assert len(device.state.groups["trained_rows"]["digests"]) == len(trained)


def test_each_run_reads_the_rows_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app that runs every night with one client has more of them each time."""

    async def two_connections(client: EdgeClient) -> bool:
        for _ in range(2):
            await client.worker.prepare(SETTINGS)
        return True

    monkeypatch.setattr(EdgeClient, "_run", two_connections)
    rows, lines = [*ROWS], list[str]()
    Device(tmp_path / "a", rows=rows).round(1)
    with EdgeClient("a:1", rows, tmp_path / "a", scheme="none", progress=lines.append) as client:
        before, held = client.evaluate(), _texts(client.worker.held_out_rows)
        rows += [{"text": f"a play {n}", "label": ("bad", "good")[n % 2]} for n in range(10)]
        assert client.evaluate() == before
        client.run()
        assert lines[1:] == ["20 rows, 4 of them held out; waiting for a round"]
        assert held < _texts(client.worker.held_out_rows)
        assert client.worker.offer().examples == 16
        rows += [{"text": "a play"}]
        with pytest.raises(DataError, match='line 21, field "label": is missing'):
            client.run()
        assert client.evaluate().count == 4


def test_a_state_of_an_earlier_version_holds_out_what_that_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Device(tmp_path, split=(0.5, 3))
    kept = device.worker.held_out_rows
    device.round(1)
    groups = {name: of for name, of in device.state.groups.items() if name != "trained_rows"}
    device.store.save(replace(device.state, groups=groups))
    line = "an earlier version trained this device and did not say on which rows"
    capsys.readouterr()
    for share in (0.5, 0.9):
        device = Device(tmp_path, split=(share, None))
        assert device.worker.held_out_rows == kept
        assert line in capsys.readouterr().out
    device.round(2)
    capsys.readouterr()
    assert Device(tmp_path).worker.held_out_rows == kept
    assert line not in capsys.readouterr().out


def _texts(rows: list[Example]) -> set[str]:
    return {row.text for row in rows}


def _not_finite(base: NamedTensors) -> NamedTensors:
    return NamedTensors.from_arrays({n: a * np.float32("nan") for n, a in base.arrays().items()})


def test_a_common_adapter_outlives_another_choice_of_rows(tmp_path: Path) -> None:
    """A device that came when all was over has trained nothing, and uses what there is."""
    device = Device(tmp_path)
    common = device.worker.trainer.common()
    found = NamedTensors.from_arrays({n: a + 1 for n, a in common.arrays().items()})
    asyncio.run(device.worker.finish(found, 3))
    with EdgeClient("localhost:1", ROWS, tmp_path, scheme="none", seed=5) as client:
        client.evaluate()
        assert client.worker.trainer.common().digest() == found.digest()


def test_a_seed_of_numpys_is_the_same_after_a_restart(tmp_path: Path) -> None:
    def texts(seed: Any) -> tuple[set[str], set[str]]:
        with EdgeClient("localhost:1", ROWS, tmp_path, scheme="none", seed=seed) as client:
            client.evaluate()
            return _texts(client.worker.training_rows), _texts(client.worker.held_out_rows)

    device = Device(tmp_path, split=(None, 7))
    device.round(1)
    assert texts(np.int64(7)) == texts(7) == texts(None)


def test_a_folder_that_was_refused_can_be_tried_again(tmp_path: Path) -> None:
    key = tmp_path / "device.key"
    key.write_text("no key")
    key.chmod(0o600)
    with pytest.raises(StateError, match="the device key is damaged") as refused:
        EdgeClient("localhost:1", ROWS, tmp_path)
    key.unlink()
    EdgeClient("localhost:1", ROWS, tmp_path).close()
    assert refused.value.__traceback__  # which would hold the lock, if the call had kept it
