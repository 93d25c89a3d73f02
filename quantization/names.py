"""Names of modules and parameters, dotted as torch has them."""

from __future__ import annotations

from collections.abc import Collection


def is_below(name: str, roots: Collection[str]) -> bool:
    """Whether the module or parameter `name` is one of `roots` or lies inside one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)
