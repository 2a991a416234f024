"""Directories for disks: in memory, so that thousands of disks can be written and discarded."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.disks import disk


class Memory:
    """Makes empty directories in memory, one at a time: the one before is removed."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._count = 0
        self._used = ExitStack()

    def fresh(self) -> Path:
        """Return an empty directory."""
        self.close()
        self._count += 1
        return self._used.enter_context(disk("tmpfs", self._place / f"memory{self._count}"))

    def close(self) -> None:
        """Remove the last directory."""
        self._used.close()


@pytest.fixture
def memory(place: Path) -> Iterator[Memory]:
    """Factory of directories in memory."""
    made = Memory(place)
    yield made
    made.close()
