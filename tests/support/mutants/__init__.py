"""Deliberate bugs, M1 to M9 of docs/reliability.md: each campaign must notice its own.

The product does not refer to them. `seeded(name)` puts one into this process; `python -m tests.support.mutants NAME
OPTIONS MOUNTPOINT` mounts in the foreground with it, which is what campaigns against a real daemon start. Each module
here has a table `MUTANTS` of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tests.support.mutants import atomicity, confinement, durability, errors, order, together

Patch = Callable[[], AbstractContextManager[object]]

_TABLES = (each.MUTANTS for each in (atomicity, confinement, durability, errors, order, together))
MUTANTS: dict[str, Patch] = {name: patch for table in _TABLES for name, patch in table.items()}
"""By name, M1 to M9 or a description of the bug: functions that return the patch, called only when it is needed."""


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """This process has the bug `name` inside the block."""
    with MUTANTS[name]():
        yield
