"""Ending: by umount, by signals, by force; nothing written is lost, the upper is unlocked, the records are removed."""

import dataclasses
import mmap
import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from overlayfs.errors import MountError
from overlayfs.mount import mounts, unmount
from tests.mounted.conftest import DETACH, PROGRAM, Mount
from tests.support import processes, syscalls
from tests.support.polling import until

RECORDS = Path("/run/overlayfs")


def _is_mounted(point: Path) -> bool:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return any(line.split()[4] == str(point) for line in file)


def test_umount_ends_the_daemon(mount: Mount) -> None:
    mount.start()
    pid = mount.pid
    assert (RECORDS / f"{pid}.json").exists()
    assert mount.unmount() == 0
    assert not list(RECORDS.glob(f"{pid}.*"))


def test_our_own_umount_returns_when_the_daemon_has_ended(mount: Mount) -> None:
    mount.start()
    subprocess.run([PROGRAM, "umount", str(mount.point)], check=True, timeout=30)
    assert processes.reap(mount.pids.pop(), limit=0.5) == 0


def test_our_own_umount_of_a_mount_in_use(mount: Mount) -> None:
    mount.start()
    with open(mount.point / "t", "rb"):
        done = subprocess.run(
            [PROGRAM, "umount", str(mount.point)], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 32
        assert done.stderr == f"overlayfs: cannot unmount {mount.point}: Device or resource busy\n"
    assert mount.unmount() == 0


def test_mounting_again_at_once(mount: Mount) -> None:
    """The command does not wait for the daemon that is ending: the next daemon waits for its lock."""
    for turn in range(4):
        mount.start()
        (mount.point / str(turn)).write_bytes(b"x" * 100_000)
        syscalls.umount(os.fsencode(mount.point))
    mount.start()
    assert {"0", "1", "2", "3"} <= set(os.listdir(mount.point))
    assert mount.unmount() == 0
    assert {processes.reap(mount.pids.pop()) for _ in range(4)} == {0}


def test_a_lazily_unmounted_mount_serves_open_files(mount: Mount) -> None:
    mount.start()
    with open(mount.point / "d" / "f", "r+b") as file:
        syscalls.umount(os.fsencode(mount.point), DETACH)
        assert not _is_mounted(mount.point)
        file.write(b"changed")
        file.flush()
        assert os.pread(file.fileno(), 10, 0) == b"changedowl"
    assert processes.reap(mount.pids.pop()) == 0
    assert (mount.stack.upper / "d" / "f").read_bytes().startswith(b"changedowl")


def test_sigterm_unmounts(mount: Mount) -> None:
    mount.start()
    (mount.point / "new").write_bytes(b"x")
    os.kill(mount.pid, signal.SIGTERM)
    assert processes.reap(mount.pids.pop()) == 0
    assert not _is_mounted(mount.point)
    assert (mount.stack.upper / "new").read_bytes() == b"x"


def test_sigterm_ends_a_mount_in_use_in_time(mount: Mount) -> None:
    mount.start()
    file = os.open(mount.point / "t", os.O_RDONLY)
    os.kill(mount.pid, signal.SIGTERM)
    assert processes.reap(mount.pids.pop(), limit=10) == 0
    assert not _is_mounted(mount.point)
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(file)
    with suppress(OSError):
        os.close(file)


def test_sigterm_flushes_mapped_pages(mount: Mount) -> None:
    mount.start()
    file = os.open(mount.point / "d" / "f", os.O_RDWR)
    with mmap.mmap(file, 0) as pages:
        pages[10:17] = b"changed"
        os.kill(mount.pid, signal.SIGTERM)
        assert processes.reap(mount.pids.pop()) == 0
    with suppress(OSError):  # the mount is gone; close reports it once more
        os.close(file)
    assert (mount.stack.upper / "d" / "f").read_bytes()[10:17] == b"changed"


def test_umount_flushes_mapped_pages(mount: Mount) -> None:
    mount.start()
    with open(mount.point / "d" / "f", "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[10:17] = b"changed"
    mount.unmount()
    assert (mount.stack.upper / "d" / "f").read_bytes()[10:17] == b"changed"


def test_sigterm_under_load(mount: Mount) -> None:
    """All acknowledged writes are there; the writer loses its directory, gets an error and does not hang."""
    mount.start()
    acknowledged: list[int] = []
    directory = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY)

    def work() -> None:
        with suppress(OSError):
            for number in range(1_000_000):
                file = os.open(f"n{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=directory)
                os.write(file, b"%d" % number)
                acknowledged.append(number)
                os.close(file)

    worker = threading.Thread(target=work)
    worker.start()
    until(lambda: len(acknowledged) > 50)
    os.kill(mount.pid, signal.SIGTERM)
    assert processes.reap(mount.pids.pop(), limit=10) == 0
    worker.join(10)
    assert not worker.is_alive()
    os.close(directory)
    assert not _is_mounted(mount.point)
    for number in acknowledged:
        assert (mount.stack.upper / f"n{number}").read_bytes() == b"%d" % number


def test_ctrl_c_in_the_foreground(mount: Mount) -> None:
    process = mount.foreground()
    os.kill(process.pid, signal.SIGINT)
    assert process.ended() == (0, "")
    assert not _is_mounted(mount.point)


def test_sighup_is_ignored(mount: Mount) -> None:
    mount.start()
    os.kill(mount.pid, signal.SIGHUP)
    assert (mount.point / "t").read_bytes() == b"top"
    assert mount.unmount() == 0


def test_sigusr1_logs_the_counters(mount: Mount) -> None:
    process = mount.foreground()
    os.stat(mount.point / "t")
    os.kill(process.pid, signal.SIGUSR1)
    assert process.process.stderr is not None
    line = process.process.stderr.readline()
    assert line.startswith(f"overlayfs: INFO: requests of {mount.point}: ")
    assert "LOOKUP=" in line
    syscalls.umount(os.fsencode(mount.point))
    assert process.ended() == (0, "")


def test_an_aborted_connection_is_unmounted_and_an_error(mount: Mount) -> None:
    process = mount.foreground()
    unmount.abort(mounts.find(os.fsencode(mount.point)))
    code, written = process.ended()
    assert code == 32
    assert written == f"overlayfs: the mount at {mount.point} was cut off from the kernel\n"
    assert not _is_mounted(mount.point)


def test_the_next_mount_with_the_same_number_is_not_aborted(mount: Mount) -> None:
    """The kernel reuses the numbers of connections at once."""
    mount.start()
    gone = mounts.find(os.fsencode(mount.point))
    known = gone
    while known == gone or known.device != gone.device:  # others mount, too
        mount.unmount()
        mount.start()
        known = mounts.find(os.fsencode(mount.point))
    unmount.abort(dataclasses.replace(gone, mountpoint=gone.mountpoint + b".gone"))
    assert (mount.point / "t").read_bytes() == b"top"
    assert mount.unmount() == 0


def test_a_daemon_that_hangs_is_reported_in_time(mount: Mount) -> None:
    mount.start()
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        with pytest.raises(MountError, match=rf"is unmounted, but its daemon \(pid {mount.pid}\) still runs after 1 s"):
            unmount.unmount(os.fsencode(mount.point), wait=1)
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    assert processes.reap(mount.pids.pop()) == 0
    assert not _is_mounted(mount.point)
