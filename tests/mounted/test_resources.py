"""Resources of a mount: descriptors are closed after any amount of work; few are enough."""

import os
import subprocess
from pathlib import Path

from tests.mounted.conftest import Mount
from tests.support.polling import until


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _work(point: Path) -> None:
    """Use every kind of request that opens something, and leave the tree as it was."""
    for number in range(40):
        (point / f"new{number}").write_bytes(b"x")
        os.link(point / f"new{number}", point / f"twin{number}")
    with open(point / "new0", "rb") as first, open(point / "new1", "r+b") as second:
        (point / "new0").unlink()
        os.rename(point / "new1", point / "new0")
        first.read()
        second.write(b"y")
        os.fsync(second.fileno())
    (point / "e").mkdir()
    for _ in range(20):
        os.listdir(point)
        os.chmod(point / "d" / "f", 0o600)
        os.rename(point / "e", point / "e2")
        os.rename(point / "e2", point / "e")
    (point / "e").rmdir()
    for path in [*point.glob("new*"), *point.glob("twin*")]:
        path.unlink()


def test_descriptors_are_closed(mount: Mount) -> None:
    mount.start()
    _work(mount.point)
    subprocess.run(["sync", "-f", str(mount.point)], check=True)
    before = _descriptors(mount.pid)
    for _ in range(5):
        _work(mount.point)
    until(lambda: _descriptors(mount.pid) <= before + 2)  # the kernel releases and forgets in its own time
    mount.unmount()


def test_many_open_files(mount: Mount) -> None:
    """More files than the soft limit of the process that mounted."""
    mount.start("-q")
    for number in range(3000):
        (mount.point / f"f{number}").touch()
    opened = []
    try:
        for number in range(1000):
            opened.append(os.open(mount.point / f"f{number}", os.O_RDONLY))
            opened.append(os.open(mount.point / f"f{number}", os.O_RDWR))
        assert os.pread(opened[0], 1, 0) == b""
    finally:
        for descriptor in opened:
            os.close(descriptor)
    mount.unmount()


def test_too_few_descriptors_are_an_errno(mount: Mount) -> None:
    import resource

    for number in range(200):
        (mount.stack.base / "low" / f"d{number}").mkdir()
        (mount.stack.base / "low" / f"d{number}" / "f").write_bytes(b"%d" % number)
    mount.start()
    # The daemon has raised its soft limit to the hard one; both are lowered from outside now.
    resource.prlimit(mount.pid, resource.RLIMIT_NOFILE, (64, 64))
    opened, refused = [], 0
    for number in range(200):
        try:
            opened.append(os.open(mount.point / f"d{number}" / "f", os.O_RDWR))
        except OSError:
            refused += 1
    assert refused
    assert opened
    for descriptor in opened:
        os.close(descriptor)
    for number in range(200):
        until(lambda number=number: _reads(mount.point / f"d{number}" / "f") == b"%d" % number)  # type: ignore[misc]
    assert mount.unmount() == 0


def _reads(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
