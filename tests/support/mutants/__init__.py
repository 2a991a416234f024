"""Deliberate bugs, M1 to M9 of docs/reliability.md: each campaign must notice its own.

Nothing of the product knows of them. `seeded(name)` puts one into this process; `python -m tests.support.mutants NAME
OPTIONS MOUNTPOINT` mounts in the foreground with it, which is what campaigns against a real daemon start.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from tests.support.mutants import together

Patch = Callable[[], "mock._patch[object]"]

MUTANTS: dict[str, Patch] = {**together.MUTANTS}
"""By name, M1 to M9 or what is wrong: what makes the patch; it is made only when it is asked for."""


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """This process has the bug `name` inside the block."""
    with MUTANTS[name]():
        yield
