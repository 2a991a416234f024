"""Cutting a list down to what matters (delta debugging, Zeller and Hildebrandt 2002)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def smallest(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """Return a part of `items` that still fails and from which no item can be removed; `items` itself must fail."""
    kept, size = list(items), max(1, len(items) // 2)
    while True:
        shorter = _without_pieces(kept, size, fails)
        if len(shorter) < len(kept):
            kept = shorter
        elif size == 1:
            return kept
        else:
            size = max(1, size // 2)


def _without_pieces(items: list[T], size: int, fails: Callable[[list[T]], bool]) -> list[T]:
    """Return `items` without each piece of `size` items that can be removed, the last one first."""
    for start in range((len(items) - 1) // size * size, -1, -size):
        rest = items[:start] + items[start + size :]
        if rest and fails(rest):
            items = rest
    return items
