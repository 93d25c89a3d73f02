"""The daemon's numbers for Prometheus, by what happens in it (table: docs/operations.md)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.events import CloseRound, OpenRound
from coordinator.happenings import Acted, Called, Connected, Disconnected, Happening, Heard, Said
from coordinator.store.base import Outcome
from coordinator.store.sightings import DeviceState
from protocol.messages import Receipt, Refusal, Report

LAG_EVERY_S: Final = 0.5
_QUICK_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LONG_S: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 24 * 3600)
_UPLOAD_S: Final = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# How many connected devices are in which federation and state.
CountDevices = Callable[[], Mapping[tuple[str, DeviceState], int]]


class Metrics:
    """An observer that counts; `render` gives what Prometheus reads."""

    def __init__(self, count_devices: CountDevices) -> None:
        self._registry = registry = CollectorRegistry()
        self.rounds = Counter(
            "pf2lora_rounds", "Rounds that ended.", ("federation", "outcome"), registry=registry
        )
        self.round_seconds = Histogram(
            "pf2lora_round_seconds",
            "From a round's opening to its end.",
            ("federation",),
            buckets=_LONG_S,
            registry=registry,
        )
        self.reports = Counter(
            "pf2lora_reports", "Reports answered.", ("federation", "status"), registry=registry
        )
        self.report_seconds = Histogram(
            "pf2lora_report_seconds",
            "From a report's announcement to its receipt, the upload included.",
            ("federation",),
            buckets=_UPLOAD_S,
            registry=registry,
        )
        self.bytes = Counter(
            "pf2lora_message_bytes", "Bytes of messages.", ("direction",), registry=registry
        )
        self.messages = Counter(
            "pf2lora_messages", "Messages.", ("direction", "type"), registry=registry
        )
        self.refusals = Counter(
            "pf2lora_refusals", "Sessions ended with a refusal.", ("code",), registry=registry
        )
        self.connections = Gauge(
            "pf2lora_connections", "Connections that are open.", registry=registry
        )
        self.connections_taken = Counter(
            "pf2lora_connections_taken", "Connections taken.", registry=registry
        )
        self.action_seconds = Histogram(
            "pf2lora_action_seconds",
            "Carrying out an action of the round machine.",
            ("action",),
            buckets=_QUICK_S,
            registry=registry,
        )
        self.store_seconds = Histogram(
            "pf2lora_store_seconds",
            "A call of the store.",
            ("call",),
            buckets=_QUICK_S,
            registry=registry,
        )
        self.loop_lag = Histogram(
            "pf2lora_event_loop_lag_seconds",
            "How much later than asked for the event loop wakes.",
            buckets=_QUICK_S,
            registry=registry,
        )
        self.certificate_expires = Gauge(
            "pf2lora_certificate_expires_timestamp_seconds",
            "Until when the certificate is good, in Unix seconds; 0 without one.",
            registry=registry,
        )
        registry.register(_Devices(count_devices))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._opened_at: dict[str, float] = {}
        self._reported_at: dict[tuple[str, str], float] = {}

    def __call__(self, happening: Happening) -> None:
        match happening:
            case Heard(federation, device, message, size_bytes):
                self._count("received", message, size_bytes)
                if isinstance(message, Report):
                    self._reported_at[federation, device] = time.perf_counter()
            case Said(federation, device, message, size_bytes):
                self._count("sent", message, size_bytes)
                self._answered(federation, device, message)
            case Acted(federation, action, took_s):
                self.action_seconds.labels(type(action).__name__).observe(took_s)
                self._round(federation, action)
            case Called(call, took_s):
                self.store_seconds.labels(call).observe(took_s)
            case Connected():
                self.connections.inc()
                self.connections_taken.inc()
            case Disconnected(federation, device):
                self.connections.dec()
                self._reported_at.pop((federation, device), None)

    async def measure_lag(self) -> None:
        """Watch how late the event loop is; never returns."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.loop_lag.observe(max(0.0, loop.time() - due))

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _count(self, direction: str, message: object, size_bytes: int) -> None:
        self.bytes.labels(direction).inc(size_bytes)
        self.messages.labels(direction, type(message).__name__).inc()

    def _answered(self, federation: str, device: str, message: object) -> None:
        match message:
            case Receipt(status=status):
                self.reports.labels(federation, status.value).inc()
                began = self._reported_at.pop((federation, device), None)
                if began is not None:
                    self.report_seconds.labels(federation).observe(time.perf_counter() - began)
            case Refusal(code=code):
                self.refusals.labels(code.value).inc()

    def _round(self, federation: str, action: object) -> None:
        match action:
            case OpenRound():
                self._opened_at[federation] = time.perf_counter()
            case CloseRound(aggregate=aggregate):
                outcome = Outcome.AGGREGATED if aggregate else Outcome.ABANDONED
                self.rounds.labels(federation, outcome.value).inc()
                began = self._opened_at.pop(federation, None)
                if began is not None:  # else it was opened before a restart
                    self.round_seconds.labels(federation).observe(time.perf_counter() - began)


class _Devices(Collector):
    """Connected devices by state, counted when they are asked for."""

    def __init__(self, count: CountDevices) -> None:
        self._count = count

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "pf2lora_devices", "Connected devices.", labels=("federation", "state")
        )
        for (federation, state), devices in self._count().items():
            family.add_metric((federation, state.value), devices)
        yield family
