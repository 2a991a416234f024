"""The kernel's writeback cache, on request: it reads through handles opened for writing, and delays writes."""

import mmap
import os
import signal
from pathlib import Path

import pytest

from tests.mounted.conftest import Mount
from tests.support import processes


@pytest.fixture
def point(mount: Mount) -> Path:
    """A mount with the writeback cache."""
    mount.start(options="writeback=1")
    return mount.point


def test_a_part_of_a_page_through_a_handle_for_writing_only(mount: Mount, point: Path) -> None:
    file = os.open(point / "d" / "f", os.O_WRONLY)
    os.pwrite(file, b"new", 1000)
    os.fsync(file)
    os.close(file)
    expected = b"low" * 1000
    assert (mount.stack.upper / "d" / "f").read_bytes() == expected[:1000] + b"new" + expected[1003:]
    mount.unmount()


def test_appending(mount: Mount, point: Path) -> None:
    for turn in range(5):
        file = os.open(point / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, b"%d\n" % turn)
        os.close(file)
    assert (point / "log").read_bytes() == b"0\n1\n2\n3\n4\n"
    mount.unmount()
    assert (mount.stack.upper / "log").read_bytes() == b"0\n1\n2\n3\n4\n"


def test_sizes_times_and_truncation(mount: Mount, point: Path) -> None:
    path = point / "new"
    path.write_bytes(b"x" * 10_000)
    assert path.stat().st_size == 10_000
    os.truncate(path, 5_000)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[4_999] = 7
    os.utime(path, ns=(1_000_000_007, 2_000_000_009))
    os.sync()
    assert path.stat().st_mtime_ns == 2_000_000_009
    mount.unmount()
    assert (mount.stack.upper / "new").read_bytes() == b"x" * 4_999 + b"\7"
    assert (mount.stack.upper / "new").stat().st_mtime_ns == 2_000_000_009


def test_sigterm_loses_nothing(mount: Mount, point: Path) -> None:
    (point / "new").write_bytes(b"x" * 3_000_000)
    os.kill(mount.pid, signal.SIGTERM)
    assert processes.reap(mount.pids.pop()) == 0
    assert (mount.stack.upper / "new").read_bytes() == b"x" * 3_000_000
