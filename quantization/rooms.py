"""Memory of the system's and not of malloc's: where holes in the C library's heap would cost most.

glibc takes a large block that is given back for a sign to serve blocks of that size from its heap,
where holes stay when they are freed.
"""

from __future__ import annotations

import mmap
import threading
from typing import Final

import torch
from torch import Tensor

# A shared mapping, which is Python's default, would be shared with forked processes too, and what
# of it is given back would stay with the system as shared memory.
_OF_ITS_OWN: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def mapped(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros [count] in pages of their own."""
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(_pages(count * dtype.itemsize), dtype=dtype, count=count)


def room(use: str, count: int, dtype: torch.dtype) -> Tensor:
    """Memory [count] of this thread's for one use, anything in it; until the next call for that."""
    memory, size = _ROOMS.memory.get(use), count * dtype.itemsize
    if memory is None or len(memory) < size:
        memory = _ROOMS.memory[use] = _pages(size)
    return torch.frombuffer(memory, dtype=dtype, count=count)


def give_rooms_back() -> None:
    """Let the system have the memory of this thread's rooms, until they are written again.

    To be called where a pass is at its highest without them: after forward, before the loss.
    """
    for memory in _ROOMS.memory.values():
        memory.madvise(mmap.MADV_DONTNEED)


def _pages(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, _OF_ITS_OWN)


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, mmap.mmap] = {}


_ROOMS = _Rooms()
