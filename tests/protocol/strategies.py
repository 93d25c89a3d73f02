"""Hypothesis strategies for any message, derived from the kinds that its fields declare."""

from __future__ import annotations

import typing
from dataclasses import replace
from enum import Enum
from typing import Any

from hypothesis import strategies as st

from protocol import scalars, schema
from protocol.aggregation import Mean, MultiKrum
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Group,
    Loss,
    Mode,
    Rounds,
    Task,
    TaskKind,
    WireDtype,
)
from protocol.messages import Message
from protocol.methods import HetLoRA, LowerOptimizer, PF2LoRA, PFedLoRA
from protocol.tensors import Payload, TensorSpec

MESSAGES = typing.get_args(Message)


def of_kind(kind: scalars.Kind) -> st.SearchStrategy[Any]:
    match kind:
        case scalars.Text(bytes_max, bytes_min, pattern):
            if pattern is not None:
                return st.from_regex(pattern, fullmatch=True).filter(
                    lambda text: bytes_min <= len(text.encode()) <= bytes_max
                )
            text = st.text(min_size=bytes_min, max_size=20)
            return text.filter(lambda text: len(text.encode()) <= bytes_max)
        case scalars.Integer(low, high):
            return st.integers(low, high)
        case scalars.Real(low, high):
            return st.floats(low, high, allow_nan=False, allow_infinity=False)
        case scalars.Flag():
            return st.booleans()
        case scalars.Blob(bytes_max, bytes_min):
            return st.binary(min_size=bytes_min, max_size=min(bytes_max, 200))
        case schema.Maybe(one):
            return st.none() | of_kind(one)
        case schema.Record(cls):
            return of_class(cls)
        case schema.Tagged(records):
            return st.one_of([of_kind(record) for _, record in records])
        case schema.Choice(enum):
            return st.sampled_from(list[Enum](enum))
        case schema._Many(item, size):
            return st.lists(
                of_kind(item), min_size=size.count_min, max_size=min(size.count_max, 4)
            ).map(tuple)
        case schema._TextOrMany(text, many):
            return of_kind(text) | of_kind(many)
    raise TypeError(kind)


def of_class(cls: Any) -> st.SearchStrategy[Any]:
    """Instances within bounds, and consistent where the class asks for more."""
    if cls is Payload:
        return _payloads()
    kinds = schema.record_of(cls).kinds
    plain = st.tuples(*(of_kind(kind) for _, kind in kinds))
    if cls in (Task, Rounds, Adapter, PF2LoRA, FederationSettings):
        return plain.map(lambda values: _built(cls, values)).filter(lambda built: built is not None)
    return plain.map(lambda values: cls(*values))


def _built(cls: type[Any], values: tuple[Any, ...]) -> Any:
    if cls is Task:
        kind, labels, length, loss = values
        labelled = kind is TaskKind.SEQUENCE_CLASSIFICATION
        labels = (*dict.fromkeys(labels), "0 one", "0 two") if labelled else ()
        values = (kind, labels, length, loss if labelled else Loss.CROSS_ENTROPY)
    if cls is Rounds:
        count, cohort, _, deadline_s, weighting, _, *rest = values
        values = (count, cohort, cohort, deadline_s, weighting, cohort, *rest)
    if cls is Adapter:
        values = (values[0], max(1, values[1]), *values[2:])
    if cls is PF2LoRA:
        adam = values[1] is LowerOptimizer.ADAM
        values = (*values[:2], values[2] or 0.1, 0.0 if adam else values[3], *values[4:])
    if cls is FederationSettings:
        backbone, adapter, training, algorithm, rounds = values[1], *values[3:7]
        if isinstance(algorithm, PFedLoRA):
            backbone = None
            adapter = replace(adapter, head=Group.PERSONAL)
            training = replace(training, local_steps=max(2, training.local_steps))
            width = max(algorithm.shared_width, adapter.rank)
            algorithm = replace(algorithm, shared_width=width)
        elif backbone is None:
            backbone = Backbone("any", "sha256:" + "0" * 64)
        plain = isinstance(algorithm, HetLoRA) or rounds.minimum_reports < 5
        aggregation = Mean() if plain else values[7]
        if isinstance(aggregation, MultiKrum):
            aggregation = MultiKrum((rounds.minimum_reports - 3) // 2)
        if isinstance(algorithm, PF2LoRA):
            algorithm = replace(algorithm, personal_rank_max=adapter.personal_rank)
        if isinstance(algorithm, HetLoRA):
            algorithm = replace(algorithm, rank_min=min(algorithm.rank_min, adapter.rank))
            rounds = replace(rounds, mode=Mode.SYNCHRONOUS)
        *rest, update_dtype, download_dtype, seed = values[8:]
        if isinstance(algorithm, HetLoRA) and not update_dtype.is_plain:
            update_dtype = WireDtype.FLOAT32
        dtypes = update_dtype, download_dtype
        kept = values[0], backbone, values[2], adapter, training
        values = (*kept, algorithm, rounds, aggregation, *rest, *dtypes, seed)
    return cls(*values)


@st.composite
def _payloads(draw: st.DrawFn) -> Payload:
    specs = draw(st.lists(of_class(TensorSpec), max_size=3, unique_by=lambda spec: spec.name))
    small = [TensorSpec(s.name, s.dtype, tuple(min(n, 50) for n in s.shape[:2])) for s in specs]
    digest = draw(st.binary(min_size=32, max_size=32))
    return Payload(digest, sum(spec.size_bytes for spec in small), tuple(small))


messages = st.one_of([of_class(cls) for cls in MESSAGES])
