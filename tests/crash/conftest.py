"""The disk of the crash tests: it is in memory, where every sync is fast, since no power is cut here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import disk
from tests.support.launcher import Launcher
from tests.support.requirements import need, need_root

SIZE = 1 << 30  # most of it is never written


@pytest.fixture(scope="session")
def scratch(scratch: Path) -> Iterator[Path]:
    """The run's directory, for these tests: an ext4 whose image is in memory."""
    with disk("tmpfs", scratch / "memory") as memory, disk("ext4", memory / "disk", SIZE) as ext4:
        yield ext4


@pytest.fixture(scope="session")
def launch() -> Iterator[Launcher]:
    """A launcher that mounts fast."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    with Launcher() as launched:
        yield launched
