"""Which layers of a model carry adapters: what `adapter.target_modules` names, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from torch import nn

from edge_client.errors import AdapterError
from quantization.bnb import linear_shape
from quantization.names import is_below

_QUERY_VALUE_NAMES: Final = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    # One layer gives query, key and value here, so the key is adapted too.
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
)


def select_targets(
    model: nn.Module, targets: str | Sequence[str], excluded: Sequence[str]
) -> list[str]:
    """Names of the layers that `inject` would wrap, in order.

    Raises:
        AdapterError: no such target, or one that is not linear.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not is_below(name, excluded)
    }
    linear = {name for name, module in modules.items() if linear_shape(module) is not None}
    if targets == "all-linear":
        output = _output_embeddings(model)
        return sorted(name for name in linear if modules[name] is not output)
    if targets == "query-value":
        targets = _query_value(linear)
    chosen: set[str] = set()
    for target, pattern in _patterns(targets).items():
        hits = {name for name in modules if pattern.fullmatch(name)}
        if not hits:
            raise AdapterError(f"target module {target!r} matches nothing; {_choices(linear)}")
        for other in sorted(hits - linear):
            kind = type(modules[other]).__name__
            raise AdapterError(f"target module {target!r} matches {other!r}, a {kind}: not linear")
        chosen |= hits
    if not chosen:
        raise AdapterError(f"no target module is named; {_choices(linear)}")
    return sorted(chosen)


def _patterns(targets: str | Sequence[str]) -> dict[str, re.Pattern[str]]:
    """A string is a regular expression; each of a list is a whole name or its last parts."""
    if not isinstance(targets, str):
        return {target: re.compile(rf"(.*\.)?{re.escape(target)}") for target in targets}
    try:
        return {targets: re.compile(targets)}
    except re.error as error:
        raise AdapterError(f"{targets!r} is no regular expression: {error}") from error


def _query_value(linear: set[str]) -> tuple[str, ...]:
    suffixes = {name.rpartition(".")[2] for name in linear}
    for names in _QUERY_VALUE_NAMES:
        if suffixes.issuperset(names):
            return names
    raise AdapterError(f"'query-value' matches nothing; {_choices(linear)}")


def _choices(linear: set[str]) -> str:
    return f"linear layers are named: {', '.join(sorted({n.rpartition('.')[2] for n in linear}))}"


def _output_embeddings(model: nn.Module) -> object:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None
