"""Tensors and messages as columns of the SQL store, checked when they are read."""

from __future__ import annotations

from typing import Any

from coordinator.store.base import ReportRecord
from protocol import codec
from protocol.errors import ErrorCode, ProtocolError, RemoteProtocolError
from protocol.messages import Assignment, Report
from protocol.scalars import SchemaError
from protocol.tensors import NamedTensors, Payload


def columns(name: str, tensors: NamedTensors) -> dict[str, Any]:
    payload = tensors.payload()
    message = Assignment("specs", 1, payload.digest, 0.0, payload)
    return {f"{name}_specs": codec.encode(message), name: bytes(tensors.buffer)}


def report_columns(federation: str, record: ReportRecord) -> dict[str, Any]:
    payload = record.update.payload()
    message = Report(
        record.assignment,
        record.round - record.staleness,
        record.base_version,
        record.examples,
        record.metrics,
        payload,
        record.signature,
    )
    return {
        "assignment": record.assignment,
        "federation": federation,
        "number": record.round,
        "attempt": record.attempt,
        "received_at": record.received_at,
        "report": codec.encode(message),
        "update_bytes": record.update.buffer,
    }


def tensors(payload: Payload, data: bytes) -> NamedTensors:
    """The tensors of a row, if they are what was written."""
    if len(data) == payload.size_bytes:
        tensors = NamedTensors(payload.tensors, data)
        if tensors.digest() == payload.digest:
            return tensors
    raise RemoteProtocolError("damaged: tensors that do not match their digest", ErrorCode.DIGEST)


def base(row: Any) -> NamedTensors:
    """The base version of a row of `bases`; the error for a damaged one names it."""
    try:
        return tensors(decoded(row.base_specs, Assignment).payload, row.base)
    except (ProtocolError, SchemaError) as error:
        name = f"the base version after round {row.number} ({row.version.hex()[:12]})"
        raise RemoteProtocolError(f"{name}: {error}", ErrorCode.DIGEST) from error


def decoded(data: bytes, cls: type[Any]) -> Any:
    message = codec.decode(data)
    if not isinstance(message, cls):
        raise RemoteProtocolError(f"a {type(message).__name__} in place of a {cls.__name__}")
    return message
