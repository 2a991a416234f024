"""Where the crash tests lie: no power is cut here, so that a disk in memory will do, and every sync is a quick one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import disk

SIZE = 1 << 30  # most of it is never written


@pytest.fixture(scope="session")
def scratch(scratch: Path) -> Iterator[Path]:
    """The run's directory, for these tests: an ext4 whose image is in memory."""
    with disk("tmpfs", scratch / "memory") as memory, disk("ext4", memory / "disk", SIZE) as ext4:
        yield ext4
