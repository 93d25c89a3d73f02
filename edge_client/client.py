"""EdgeClient: the one import of the SDK.

    with EdgeClient("ws://host:8765", data="reviews.jsonl", state_dir="state") as client:
        client.run()                         # trains until the federation's rounds are over
        client.predict(["a text"])           # with common + personal adapter
        client.save_pretrained("adapter")    # for peft.PeftModel.from_pretrained

Calls block; an app with an event loop of its own runs them in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from edge_client.arguments import check_told, counted, named
from edge_client.aside import has_event_loop
from edge_client.backends.base import (
    Evaluation,
    Export,
    FoundAnswer,
    LabelMix,
    Level,
    Prediction,
    Trainer,
)
from edge_client.backends.loading import choose, load_trainer, shared_name
from edge_client.data import FieldNames, check_asked, placed
from edge_client.errors import ConfigurationError
from edge_client.factors import RankReport
from edge_client.identity import Identity, new_key
from edge_client.line import Traffic
from edge_client.own_rows import DataSource, data_settings
from edge_client.private_store import PrivateStore
from edge_client.session import Session, check_joining
from edge_client.tls import TlsFiles
from edge_client.transport import websocket_dial
from edge_client.worker import DeviceWorker, Progress
from protocol.federation import FederationSettings
from quantization.fingerprint import whole_name
from quantization.folder_manifest import is_quantized

# What an app names, and what it is answered with; errors that it may catch: edge_client.errors.
__all__ = [
    "EdgeClient",
    "FieldNames",
    "LabelMix",
    "Level",
    "RunSummary",
    "Evaluation",
    "Export",
    "FoundAnswer",
    "Prediction",
    "RankReport",
]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run did: rounds this device has trained in all, and bytes of messages either way.

    `finished` says that the federation's rounds are over; if not, `stop` or `close` ended the run.
    """

    device: str
    rounds_done: int
    sent_bytes: int
    received_bytes: int
    finished: bool


def _silent(_: str) -> None:
    """No progress wanted."""


class EdgeClient:
    """One device of a federation.

    Args:
        coordinator: `ws://host:port`, `wss://host:port` or `host:port`.
        data: this device's rows: a jsonl, csv or tsv file, a list of mappings, or a data set of the
            `datasets` library. They never leave the device. Each run reads them when it begins.
        state_dir: folder for what must survive restarts; made with mode 0700.
        federation: name of the federation; none asks for the coordinator's only one.
        backbone: folder or name to load the backbone from instead of the federation's own name for
            it; the fingerprint must agree in any case.
        scheme: how the frozen backbone is held here: "none", "bf16", "int8", "nf4", "fp4",
            "nf4-double" or "fp4-double"; none given is "nf4". A quantised folder must be of that
            scheme. An artifact has its own.
        device: torch device, such as "cpu" or "cuda".
        compute_dtype: what NF4, FP4 and INT8 layers multiply in, "float32" or "bfloat16"; none
            takes float32 on a CPU and bfloat16 on CUDA.
        backend: "torch"; or "ort", which trains on onnxruntime and needs no torch.
        artifact: with "ort", the folder that holds the backbone, compiled for this federation's
            task and target modules by `pf2lora-client export`.
        artifact_digest: what `export` printed; any other artifact is then refused. A graph is a
            program: give it wherever artifacts come over a network.
        held_out: share of the rows kept apart for `evaluate`, in [0, 1). None given is the share
            that this device was trained with, or 0.2 at first. Rows that it was ever trained on are
            never among them, so there may be fewer.
        fields: the names of the data's fields.
        tell_accuracy: send the coordinator, with each report, this device's accuracy on the rows it
            holds out (with the common adapter alone, and with its personal one) and the range of
            its learned ranks: four numbers for its operators to look at. Of many held-out rows a
            thousand are looked at.
        seed: of the held-out choice, the batches, the personal adapter's start and HETLoRA's rank.
            None given is the one that this device was trained with, or 0 at first; another is
            refused then.
        ca_file: PEM file of the authorities to trust for wss, where the system's do not do.
        client_certificate: PEM file, where the coordinator wants to see one.
        client_key: its private key.
        token: enrols this device where the coordinator does not know it yet; used up by that.
        progress: called with one line of text now and then, possibly from another thread; what it
            raises ends the run. It must not wait for a question that another thread asks.

    Raises:
        ConfigurationError: an argument is wrong, or not what this device was trained with.
        BackboneError: `backbone` is a quantised folder that cannot be read.
        DataError: `data` is nothing that can be read.
        StateError: the state folder is damaged or in use.
    """

    def __init__(
        self,
        coordinator: str,
        data: DataSource,
        state_dir: str | Path,
        *,
        federation: str = "",
        backbone: str | None = None,
        scheme: str | None = None,
        device: str = "cpu",
        compute_dtype: str | None = None,
        backend: str = "torch",
        artifact: str | Path | None = None,
        artifact_digest: str = "",
        held_out: float | None = None,
        fields: FieldNames | None = None,
        seed: int | None = None,
        tell_accuracy: bool = False,
        ca_file: str | Path | None = None,
        client_certificate: str | Path | None = None,
        client_key: str | Path | None = None,
        token: str = "",
        progress: Progress = _silent,
    ) -> None:
        folder = Path(named("state_dir", state_dir, "a folder's path"))
        if backbone is not None:
            right = "a folder, a name, or package:NAME/folder"
            backbone = whole_name(named("backbone", backbone, right))
        self._choice = choose(
            backend,
            backbone=backbone,
            scheme=scheme,
            device=device,
            compute_dtype=compute_dtype,
            artifact=artifact,
            artifact_digest=artifact_digest,
        )
        rows = data_settings(data, fields, held_out, seed)
        check_joining(federation, token)
        tls = TlsFiles(ca_file, client_certificate, client_key)
        self._dial = websocket_dial(coordinator, tls)
        self._federation = federation
        self._token = token
        self._backbone = backbone
        self._traffic = Traffic()
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._run_lock = threading.Lock()
        self._stop_asked = threading.Event()
        self._is_closed = False
        self._process = os.getpid()
        check_told(tell_accuracy, progress)
        store = PrivateStore(folder)
        self._folder = folder
        with contextlib.ExitStack() as opened:
            opened.enter_context(store.lock())
            self._identity = Identity.from_pem(store.secret("device.key", new_key))
            self._worker = DeviceWorker(rows, store, self._make_trainer, progress, tell_accuracy)
            self._open = opened.pop_all()

    def run(self) -> RunSummary:
        """Take part until the federation's rounds are over, or `stop` or `close` is called.

        Raises:
            ConfigurationError: this thread has an event loop, or a run is under way.
            RefusedError: the coordinator will not have this device, and says why.
            UnreachableError: no coordinator answered, for a quarter of a minute at first and for a
                day once one has.
            DataError, BackboneError, AdapterError, DivergedError, MissingExtraError, StateError,
                StorageFullError: naming what is wrong here.
        """
        self._check_open()
        if has_event_loop():
            problem = "it blocks, and this thread runs an event loop"
            raise ConfigurationError("run", problem, "await asyncio.to_thread(client.run)")
        if not self._run_lock.acquire(blocking=False):
            raise ConfigurationError("run", "is under way in another thread", "one run at a time")
        self._worker.begin_run()
        try:
            finished = asyncio.run(self._run())
        finally:
            self._stop_asked.clear()  # this return is the answer
            self._run_lock.release()
            self._let_go()
        return RunSummary(
            self._identity.device,
            self._worker.rounds_done,
            self._traffic.sent_bytes,
            self._traffic.received_bytes,
            finished,
        )

    def evaluate(
        self,
        data: DataSource | None = None,
        level: Level = Level.PERSONAL,
        label_mix: LabelMix = LabelMix.OWN,
    ) -> Evaluation:
        """Loss and scores at a level, on `data` or on the device's held-out rows.

        Args:
            data: rows with labels or answers.
            level: how much of the adapter is at work.
            label_mix: EVEN answers as if all labels were equally frequent (docs/methods.md).
        """
        self._check_asked(level, label_mix)
        with self._worker.ready() as model:
            rows = model.held_out_rows if data is None else model.read(data)
            return model.evaluate(rows, level, label_mix)

    @overload
    def predict(
        self, rows: Sequence[str], level: Level = ..., label_mix: LabelMix = ...
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self, rows: Sequence[Mapping[str, object]], level: Level = ..., label_mix: LabelMix = ...
    ) -> list[Any]: ...

    def predict(
        self,
        rows: Sequence[str | Mapping[str, object]],
        level: Level = Level.PERSONAL,
        label_mix: LabelMix = LabelMix.OWN,
    ) -> list[Prediction] | list[FoundAnswer]:
        """What the adapted model says of rows: texts, or mappings as in the data.

        Classification gives a `Prediction` for a text, or for a row that may have a `text_pair`;
        question answering a `FoundAnswer` for a row `{"question": ..., "context": ...}`. Level and
        label mix are those of `evaluate`.
        """
        self._check_asked(level, label_mix)
        asked = placed(rows)
        check_asked(asked)
        with self._worker.ready() as model:
            return model.predict(asked, level, label_mix)

    def generate(self, prompt: str, new_tokens_max: int = 64, level: Level = Level.PERSONAL) -> str:
        """How a causal LM goes on from a prompt: the likeliest token, one after the other."""
        self._check_asked(level)
        new_tokens_max = counted("new_tokens_max", new_tokens_max)
        check_asked(placed([prompt]), prompts=True)
        with self._worker.ready() as model:
            return model.trainer.generate(prompt, new_tokens_max, level)

    def rank_report(self) -> dict[str, RankReport]:
        """The learned rank of `B A + D C`, layer by layer."""
        self._check_open()
        with self._worker.ready() as model:
            return model.trainer.rank_report()

    def save_pretrained(
        self, folder: str | Path, *, rank: int | str | None = None, energy: float = 0.99
    ) -> Export:
        """Write common + personal as one LoRA in PEFT's layout.

        Args:
            folder: where to; made if it is not there.
            rank: none writes r + r2, exactly. "auto" cuts each layer to the smallest rank that
                keeps the share `energy` of the squared singular values; a number cuts all to it.
            energy: in (0, 1].

        Returns:
            The ranks written, and the evaluation of the held-out rows before and after the cut.
        """
        self._check_open()
        where = Path(named("folder", folder, "a folder's path"))
        with self._worker.ready() as model:
            shared, own = model.settings.backbone, self._backbone
            # A quantised folder PEFT cannot load.
            if own is None or (shared is not None and is_quantized(Path(own))):
                own = shared_name(model.settings)
            return model.save_pretrained(where, own, rank, energy)

    @property
    def device(self) -> str:
        """This device's id, which follows from its key; its coordinator's operator sees it."""
        return self._identity.device

    @property
    def worker(self) -> DeviceWorker:
        """What the device holds and remembers, for reports."""
        return self._worker

    def close(self) -> None:
        """Stop a run under way, if any, and let go of the state folder; nothing can be asked then.

        The folder is this process's until the run has ended.
        """
        self._is_closed = True
        self.stop()
        self._let_go()

    def stop(self) -> None:
        """Make a `run` in another thread return at its next step.

        Rounds that were trained are kept, with a report that could not be sent yet; one in the
        middle of its training is as if it had never begun.

        No call is lost: where a thread has yet to come to `run`, that returns at once. So call it
        for a run that is there or on its way; the one after goes on.
        """
        self._stop_asked.set()
        running = self._running
        if running is not None:
            loop, task = running
            with contextlib.suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel)

    def _let_go(self) -> None:
        """Of the state folder, if this is closed and no run writes there."""
        if self._is_closed and self._run_lock.acquire(blocking=False):
            self._open.close()
            self._run_lock.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigurationError("client", "is closed", "a new EdgeClient")
        if os.getpid() != self._process:  # torch and locks do not outlive a fork
            problem = "is another process's, of which this one is a fork"
            raise ConfigurationError("client", problem, "an EdgeClient made here, once that ended")

    def _check_asked(self, level: Level, label_mix: LabelMix = LabelMix.OWN) -> None:
        self._check_open()
        for name, given, kind in (("level", level, Level), ("label_mix", label_mix, LabelMix)):
            if not isinstance(given, kind):
                known = ", ".join(map(str, kind))
                raise ConfigurationError(name, f"{given!r} is none", f"{known} of {__name__}")

    def __repr__(self) -> str:
        ended = ", closed" if self._is_closed else ""
        return f"<EdgeClient {self.device} in {self._folder}{ended}>"

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _run(self) -> bool:
        """Whether the federation is finished; False if this was stopped."""
        session = Session(
            self._dial,
            self._worker,
            federation=self._federation,
            identity=self._identity,
            rng=random.Random(),
            token=self._token,
            traffic=self._traffic,
        )
        task = asyncio.ensure_future(session.run())
        self._running = (asyncio.get_running_loop(), task)
        # Whoever asks from here on finds `_running`.
        if self._is_closed or self._stop_asked.is_set():
            task.cancel()
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # Ctrl-C
            task.cancel()
            await asyncio.wait({task})  # for a round that is being written
            raise
        finally:
            self._running = None
        if task.cancelled():
            return False
        task.result()
        return True

    def _make_trainer(self, settings: FederationSettings) -> Trainer:
        return load_trainer(self._choice, settings, self._worker.split.seed)
