"""A payload arrives whole whatever the chunks and interruptions, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.messages import Chunk
from protocol.tensors import NamedTensors
from protocol.transfer import Receiver, chunks

TENSORS = NamedTensors.from_arrays({"x": np.arange(300, dtype=np.float32)})


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 1500), st.lists(st.integers(0, 5), max_size=5))
def test_any_chunks_and_interruptions_give_the_same_bytes(size: int, breaks: list[int]) -> None:
    receiver = Receiver(TENSORS.payload())
    for taken in breaks:
        for _, chunk in zip(range(taken), chunks(TENSORS.buffer, receiver.offset, size)):  # noqa: B905
            receiver.accept(chunk)
    for chunk in chunks(TENSORS.buffer, receiver.offset, size):
        receiver.accept(chunk)
    assert receiver.tensors().buffer == TENSORS.buffer


def test_an_empty_payload_is_one_empty_chunk() -> None:
    nothing = NamedTensors((), b"")
    sent = list(chunks(nothing.buffer))
    assert [(chunk.offset, chunk.last) for chunk in sent] == [(0, True)]
    receiver = Receiver(nothing.payload())
    receiver.accept(sent[0])
    assert receiver.tensors().specs == ()


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(4, False, b"1234"),
        Chunk(0, False, b""),
        Chunk(0, True, b"1234"),
        Chunk(0, False, bytes(1200)),
        Chunk(0, True, bytes(1201)),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(chunk: Chunk) -> None:
    with pytest.raises(RemoteProtocolError):
        Receiver(TENSORS.payload()).accept(chunk)


def test_a_damaged_byte_is_found_and_the_receiver_begins_anew() -> None:
    receiver = Receiver(TENSORS.payload())
    good = list(chunks(TENSORS.buffer, 0, 500))
    damaged = replace(good[1], data=b"\xff" + bytes(good[1].data)[1:])
    for chunk in (good[0], damaged, good[2]):
        receiver.accept(chunk)
    with pytest.raises(RemoteProtocolError) as refused:
        receiver.tensors()
    assert refused.value.code is ErrorCode.DIGEST
    assert receiver.offset == 0
    for chunk in good:
        receiver.accept(chunk)
    assert receiver.tensors().buffer == TENSORS.buffer


def test_going_on_from_beyond_the_end_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="byte 5 of a payload of 4"):
        list(chunks(b"1234", 5))


def test_what_has_come_is_what_has_come_and_no_more() -> None:
    receiver = Receiver(TENSORS.payload())
    first, second, _ = chunks(TENSORS.buffer, 0, 500)
    receiver.accept(first)
    assert receiver.received(0) == TENSORS.buffer[:500]
    receiver.accept(second)
    assert receiver.received(500) == TENSORS.buffer[500:1000]
