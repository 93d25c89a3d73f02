"""One fixed message of each type."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from protocol.errors import ErrorCode
from protocol.federation import (
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
)
from protocol.messages import (
    Assignment,
    Challenge,
    CheckIn,
    Chunk,
    Fetch,
    Finished,
    Goodbye,
    Hello,
    Join,
    Joined,
    Message,
    Metric,
    Receipt,
    ReceiptStatus,
    Refusal,
    Report,
    Resume,
    RetryWindow,
)
from protocol.tensors import NamedTensors

M = TypeVar("M", bound=Message)
FINGERPRINT = "sha256:" + "0" * 64
PAYLOAD = NamedTensors.from_arrays({"x.A": np.ones((1, 2), np.float32)}).payload()
SETTINGS = FederationSettings(
    "demo",
    Backbone("tiny", FINGERPRINT),
    Task(TaskKind.SEQUENCE_CLASSIFICATION, ("no", "yes"), 32),
)

SAMPLES: dict[type[Message], Message] = {
    type(message): message
    for message in (
        Hello((3,), "test", 65536, 4096),
        Challenge(bytes(range(32))),
        Join("demo", b"\x01" * 32, b"\x02" * 32, "token", b"\x03" * 64),
        Joined(SETTINGS),
        CheckIn(FINGERPRINT, 100),
        Assignment("a1", 3, bytes(32), 60.0, PAYLOAD),
        RetryWindow(1.0, 2.5, "busy"),
        Finished(3, bytes(32), PAYLOAD),
        Fetch(bytes(32), 7),
        Chunk(7, True, b"\x00\x01"),
        Report("a1", 3, bytes(32), 100, (Metric("loss", 0.5),), PAYLOAD, b"\x04" * 64),
        Resume(4096),
        Receipt("a1", ReceiptStatus.ACCEPTED, ""),
        Refusal(ErrorCode.BUSY, "full", 5.0),
        Goodbye("bye"),
    )
}


def sample(kind: type[M]) -> M:
    """The message of one type."""
    (found,) = (message for message in SAMPLES.values() if isinstance(message, kind))
    return found
