"""Deliberate bugs, M1 to M9 of docs/reliability.md: each campaign must notice its own.

Nothing of the product knows of them. `seeded(name)` puts one into this process; `python -m tests.support.mutants NAME
OPTIONS MOUNTPOINT` mounts in the foreground with it, which is what campaigns against a real daemon start. Each module
here has a table `MUTANTS` of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tests.support.mutants import confinement

Patch = Callable[[], AbstractContextManager[object]]

MUTANTS: dict[str, Patch] = {**confinement.MUTANTS}
"""By name, M1 to M9: what makes the patch; it is made only when it is asked for."""


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """This process has the bug `name` inside the block."""
    with MUTANTS[name]():
        yield
