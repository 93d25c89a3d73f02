"""What apps do to their device: ask while it trains, go on after a fault, hold rows out."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import cli, client, own_rows, worker
from edge_client.algorithms.base import Gradients
from edge_client.backends import loading
from edge_client.backends.base import Evaluation, LabelMix, Level
from edge_client.backends.encoding import Batch, EncodedRows
from edge_client.backends.torch_backend import TorchTrainer
from edge_client.client import EdgeClient
from edge_client.data import Example
from edge_client.errors import (
    AdapterError,
    BackboneError,
    ConfigurationError,
    DataError,
    DivergedError,
    EdgeClientError,
    StateError,
    StorageFullError,
)
from edge_client.private_store import PrivateStore
from protocol.federation import (
    Backbone,
    Loss,
    Task,
    TaskKind,
)
from protocol.messages import Assignment
from protocol.methods import PerFedAvg, PF2LoRA
from protocol.tensors import NamedTensors
from quantization.fingerprint import resolve_backbone
from tests.integration.device import ROWS, SETTINGS, Device
from tests.integration.test_federation import (
    MINILM,
    _coordinator,
    _write_config,
    _write_data,
)
from tests.quantization.tiny import write_gpt2


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


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"data": "none.jsonl"}, DataError, r"none\.jsonl: cannot be read: No such file"),
        ({"data": "d.parquet"}, DataError, r"d\.parquet: expected a \.jsonl"),
        ({"data": {"text": ["a"]}}, DataError, "data: expected a file, or rows"),
        ({"data": iter(ROWS)}, DataError, "data: expected rows that can be read again, got list_i"),
        ({"scheme": "nf5"}, ConfigurationError, "scheme: 'nf5' is none; use none, bf16, nf4"),
        ({"compute_dtype": "f8"}, ConfigurationError, "compute_dtype: 'f8' is none; use float32"),
        ({"held_out": 1.0}, ConfigurationError, "held_out: 1.0 is no share"),
        ({"held_out": "0.2"}, ConfigurationError, "held_out: '0.2' is no share"),
        ({"fields": {"text": "t"}}, ConfigurationError, "fields: .*FieldNames"),
        ({"seed": 1.5}, ConfigurationError, "seed: 1.5 is none; use a whole number"),
        ({"seed": "a"}, ConfigurationError, "seed: 'a' is none; use a whole number"),
        ({"federation": "my reviews"}, ConfigurationError, "federation: is none; use the name in"),
        ({"token": "s3cret\n"}, ConfigurationError, "token: is none; use what .* without"),
        ({"token": 5}, ConfigurationError, "token: is none"),
        ({"coordinator": "ws://here:1#top"}, ConfigurationError, "coordinator: .* is no address"),
        ({"coordinator": None}, ConfigurationError, "coordinator: None is no address; use ws://h"),
        ({"state_dir": ""}, ConfigurationError, "state_dir: is ''; use a folder's path"),
        ({"state_dir": None}, ConfigurationError, "state_dir: is None; use a folder's path"),
        (
            {"state_dir": "a\0b"},
            ConfigurationError,
            r"state_dir: is 'a\\x00b'; use a fold",
        ),
        ({"backbone": ""}, ConfigurationError, "backbone: is ''; use a folder, a name, or pack"),
        ({"device": None}, ConfigurationError, 'device: is None; use "cpu" or "cuda"'),
        ({"scheme": ""}, ConfigurationError, "scheme: '' is none; use none, bf16, nf4"),
        ({"tell_accuracy": "no"}, ConfigurationError, "tell_accuracy: is 'no'; use True or False"),
        ({"progress": 5}, ConfigurationError, "progress: 5 cannot be called; use a function"),
    ],
)
def test_what_is_wrong_in_a_call_is_said_before_anyone_is_asked(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], reason: str
) -> None:
    given: dict[str, Any] = {
        "coordinator": "localhost:1",
        "data": ROWS,
        "state_dir": tmp_path / "s",
    }
    with pytest.raises(error, match=reason) as refused:
        EdgeClient(**given | arguments)
    assert not (tmp_path / "s").exists()
    assert "s3cret" not in str(refused.value)


class Table(list[str]):
    """As pandas has it: who goes through it is given the names of its columns."""

    columns = ("text", "label")


@pytest.mark.parametrize("ask", ["predict", "evaluate", "generate"])
def test_a_level_is_none_but_a_level(tmp_path: Path, ask: str) -> None:
    texts: Any = ([],) if ask == "predict" else ("a",)
    with (
        EdgeClient("localhost:1", ROWS, tmp_path, scheme="none") as client,
        pytest.raises(ConfigurationError, match=r"level: 'common' is none; use Level\.BACKBONE"),
    ):
        getattr(client, ask)(*texts, level="common")


def test_more_rows_than_a_device_may_have_are_refused_before_the_backbone_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_rows, "EXAMPLES_MAX", 3)
    monkeypatch.setattr(Device, "_trainer", None)
    with pytest.raises(DataError, match="the rows given: 8 rows to train on; a device has 3 at m"):
        Device(tmp_path)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ("one text", "texts: expected a list of texts, got one text"),
        (["a", None], "the texts given, line 2: expected text, got NoneType"),
        (["\ud800"], "line 1: holds half of a character"),
        (None, "texts: expected a list of texts or rows, got NoneType"),
        ({"text": "a", "text_pair": "b"}, "texts: expected a list of texts or rows, got dict"),
        (Table(), "texts: expected a list of texts or rows, got Table"),
    ],
)
def test_what_cannot_be_foretold_is_refused(tmp_path: Path, texts: Any, reason: str) -> None:
    with (
        EdgeClient("localhost:1", ROWS, tmp_path, scheme="none") as client,
        pytest.raises(DataError, match=reason),
    ):
        client.predict(texts)


def test_an_app_and_the_shell_have_a_text_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = str(write_gpt2(tmp_path / "model")), [{"text": "The gradient So"}] * 4
    task, backbone = Task(TaskKind.CAUSAL_LM, (), 8), Backbone(model, SETTINGS.fingerprint)
    device = Device(tmp_path / "a", replace(SETTINGS, backbone=backbone, task=task), rows=rows)
    device.round(1)
    with EdgeClient("localhost:1", rows, tmp_path / "a", scheme="none") as client:
        assert client.generate("The gradient", 3) == device.worker.trainer.generate(
            "The gradient", 3, Level.PERSONAL
        )
        for wrong in (1, {"text": "The"}):
            with pytest.raises(DataError, match=f"expected text, got {type(wrong).__name__}"):
                client.generate(wrong)  # type: ignore[arg-type]
        for count in (0, -1, 1.5):
            said = f"new_tokens_max: is {count}; use a whole number from 1 on"
            with pytest.raises(ConfigurationError, match=said):
                client.generate("The gradient", count)  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match="nothing to predict for causal-lm; use generate"):
            client.predict(["The"])
    asked = tmp_path / "asked.jsonl"
    asked.write_text(f'{json.dumps(rows[0])}\n\n{{"text": "{"The " * 40}"}}\n')
    flags = ["--data", str(asked), "--state-dir", str(tmp_path / "a"), "--scheme", "none"]
    assert cli.main(["predict", "The", *flags, "--rows", str(asked)]) == 1
    said = capsys.readouterr().err
    assert f"{asked}, line 3: a prompt has 40 tokens, and the model takes 32" in said


def test_a_backbones_folder_is_the_same_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Device(tmp_path / "a")
    (tmp_path / "model").symlink_to(resolve_backbone(MINILM))
    monkeypatch.chdir(tmp_path)
    how: dict[str, Any] = {"scheme": "none", "backbone": "model"}
    with EdgeClient("localhost:1", ROWS, tmp_path / "a", **how) as client:
        monkeypatch.chdir("/")
        client.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    # A federation's own name for it is for devices elsewhere.
    monkeypatch.chdir(tmp_path)
    relative = replace(SETTINGS, backbone=Backbone("model", SETTINGS.fingerprint))
    said = rf"'model': a relative path, here {tmp_path}/model; each device would"
    with pytest.raises(BackboneError, match=said):
        loading.load_trainer(loading.TorchChoice(None, "none"), relative, 0)
    (tmp_path / "federation.toml").write_text('[backbone]\nname = "model"')
    assert cli.main(["prepare", "federation.toml"]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_an_app_catches_all_that_may_be_wrong_as_one_kind_of_error(tmp_path: Path) -> None:
    Device(tmp_path / "a")
    how: dict[str, Any] = {"scheme": "none", "backbone": str(tmp_path)}  # no model in there
    with (
        EdgeClient("localhost:1", ROWS, tmp_path / "a", **how) as client,
        pytest.raises(EdgeClientError, match=r"config\.json") as refused,
    ):
        client.evaluate()
    assert isinstance(refused.value, BackboneError)
    (tmp_path / "quantized.json").write_text("{")
    with pytest.raises(BackboneError, match=r"quantized\.json"):
        EdgeClient("localhost:1", ROWS, tmp_path / "b", **how)


def test_an_app_may_import_what_it_is_answered_with_from_where_the_client_is() -> None:
    asked = [getattr(EdgeClient, name) for name in dir(EdgeClient) if not name.startswith("_")]
    said = " ".join(str(ask.__annotations__["return"]) for ask in asked if callable(ask))
    types = set(re.findall(r"\w+", said)) - {"None", "Any", "str", "dict", "list"}
    assert types <= set(client.__all__)
    assert len(types) == 6


def test_an_adapter_that_cannot_be_written_is_an_error_with_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Device(tmp_path / "a")
    taken = _write_data(tmp_path / "a.jsonl", 0.5)
    command = ["save", "--data", str(taken), "--state-dir", str(tmp_path / "a"), "--scheme", "none"]
    assert cli.main([*command, "--out", str(taken)]) == 1
    assert f"pf2lora-client: folder: {taken} cannot be written" in capsys.readouterr().err
