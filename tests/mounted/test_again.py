"""Mounting what is, or was, mounted already: stale mounts, live ones, locked uppers."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.conftest import Mount
from tests.support import engines, processes, syscalls
from tests.support.polling import until

BIND = 4096


def _kill(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    processes.reap(mount.pids.pop())


def test_a_dead_daemons_mount_is_replaced(mount: Mount) -> None:
    mount.start()
    (mount.point / "kept").write_bytes(b"x" * 5000)
    _kill(mount)
    with pytest.raises(OSError) as caught:
        os.stat(mount.point)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    mount.start()
    assert (mount.point / "kept").read_bytes() == b"x" * 5000
    assert mount.unmount() == 0
    os.stat(mount.point)
    assert not os.path.ismount(mount.point)


def test_a_dead_mount_with_a_working_directory_is_replaced(mount: Mount) -> None:
    mount.start()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=mount.point / "d") as inside:
        _kill(mount)
        mount.start()
        assert (mount.point / "t").exists()
        assert inside.stdin is not None
        inside.stdin.close()
    assert mount.unmount() == 0


def test_a_kill_in_the_middle_of_work_leaves_files_whole(mount: Mount) -> None:
    """kill -9 during copy-ups: at the next mount each file is the old or the new one, and nothing hangs."""
    old, new = b"o" * 200_000, b"n" * 200_000
    for number in range(40):
        (mount.stack.base / "low" / "d" / f"f{number}").write_bytes(old)
    program = (
        "import os, sys\n"
        "for number in range(40):\n"
        "    with open(f'd/f{number}', 'r+b') as file:\n"
        "        file.write(b'n')\n"
        "    os.rename(f'd/f{number}', f'd/g{number}')\n"
        "    print(number, flush=True)\n"
    )
    for stop in (3, 17):
        mount.start()
        with subprocess.Popen(
            [sys.executable, "-c", program], cwd=mount.point, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as worker:
            assert worker.stdout is not None
            while int(worker.stdout.readline() or stop) < stop:
                pass
            _kill(mount)
        mount.start()
        for number in range(40):
            found = [path for kind in "fg" if (path := mount.point / "d" / f"{kind}{number}").exists()]
            assert len(found) == 1
            assert found[0].read_bytes() in (old, b"n" + old[1:])
            found[0].rename(mount.point / "d" / f"f{number}")
        assert mount.unmount() == 0
    assert new[:1] == b"n"
    assert os.listdir(mount.stack.work / "work") == []


def test_a_live_mount_is_not_covered(mount: Mount, make_mount: Callable[[], Mount]) -> None:
    mount.start()
    other = make_mount()
    done = other.attempt(point=mount.point)
    assert done.returncode == 32
    sentence = f"{mount.point} is already a mount of overlayfs (pid {mount.pid}); unmount it first"
    assert done.stderr == f"overlayfs: {sentence}\n"
    assert mount.unmount() == 0


def test_a_mount_may_cover_one_of_another_kind(mount: Mount) -> None:
    syscalls.mount(b"tmpfs", os.fsencode(mount.point), b"tmpfs", 0, b"")
    mount.start()
    assert (mount.point / "t").exists()
    assert mount.unmount() == 0
    syscalls.umount(os.fsencode(mount.point))


def _second_point(mount: Mount) -> Path:
    point = mount.stack.base / "m2"
    point.mkdir()
    return point


def test_an_upper_in_use_names_its_holder(mount: Mount) -> None:
    mount.start()
    done = mount.attempt(point=_second_point(mount))
    assert done.returncode == 32
    sentence = f"upper {mount.stack.upper} is in use by the mount at {mount.point} (pid {mount.pid}); unmount it first"
    assert done.stderr == f"overlayfs: {sentence}\n"
    assert mount.unmount() == 0


def test_an_upper_in_use_is_known_by_any_path(mount: Mount) -> None:
    mount.start()
    alias = mount.stack.base / "alias"
    alias.mkdir()
    syscalls.mount(os.fsencode(mount.stack.base), os.fsencode(alias), b"none", BIND, b"")
    before = processes.children()
    try:
        options = engines.option(f"lowerdir={mount.stack.base}/low,upperdir={alias}/u,workdir={alias}/w")
        command = [mount.stack.command()[0], "mount", "-o", options, str(_second_point(mount))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    finally:
        syscalls.umount(os.fsencode(alias))
    processes.reap_since(before)
    assert done.returncode == 32
    assert f"in use by the mount at {mount.point} (pid {mount.pid}); unmount it first" in done.stderr
    assert mount.unmount() == 0


def test_the_lock_of_a_dead_daemon_is_free(mount: Mount) -> None:
    mount.start()
    _kill(mount)
    point = _second_point(mount)
    mount.start(point=point)
    syscalls.umount(os.fsencode(point))
    assert processes.reap(mount.pids.pop()) == 0
    syscalls.umount(os.fsencode(mount.point))


def test_a_lock_that_is_about_to_be_released_is_waited_for(mount: Mount) -> None:
    holder = os.open(mount.stack.upper, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    before = processes.children()
    process = subprocess.Popen(mount.stack.command(), stderr=subprocess.PIPE, text=True)
    until(lambda: any(_has_open(pid, mount.stack.upper) for pid in _descendants(process.pid)))
    assert process.poll() is None
    os.close(holder)
    _, written = process.communicate(timeout=20)
    assert (process.returncode, written) == (0, "")
    mount.note_daemons(before | {process.pid})
    assert mount.unmount() == 0


def _descendants(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, found)]


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(os.readlink(entry) == str(path) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
