"""Lookups in tables that are checked before they are made.

A CPU says of a row beyond a table's end that there is none. CUDA finds it later, on the device, and
after that no call of this process works there any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class CheckedLookups(TorchFunctionMode):
    """Within the context an index beyond a table is an IndexError before anything looks it up.

    Known are the two ways in which models look up positions.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if function is functional.embedding:
            _check_embedding(*arguments, **named)
        if function is torch.gather:
            _check_gather(*arguments, **named)
        return function(*arguments, **named)


def _check_embedding(ids: Tensor, table: Tensor, *_: Any, **__: Any) -> None:
    _check(ids, len(table))


def _check_gather(input: Tensor, dim: int, index: Tensor) -> None:  # called as torch does
    _check(index, input.shape[dim])


def _check(index: Tensor, count: int) -> None:
    if index.numel() and (highest := int(index.max())) >= count:
        raise IndexError(f"row {highest} of a table of {count}")
