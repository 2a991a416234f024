"""The kernel engine: mount options, read-only mounts, killed clients, idle mounts."""

import errno
import mmap
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from overlayfs.mount import control_client
from tests.mounted.conftest import Mount
from tests.support import processes
from tests.support.outcome import errno_of
from tests.support.polling import until
from tests.support.users import ALICE, run_as

pytestmark = pytest.mark.engine("kernel")


def _requests(mount: Mount) -> Counter[str]:
    return Counter(control_client.Client.at(os.fsencode(mount.point)).stats().requests)


def _start_read_only(mount: Mount, options: str = "") -> None:
    base = mount.stack.base
    words = f"lowerdir={base}/top:{base}/low,engine=kernel{options}"
    before = processes.children()
    subprocess.run([*mount.stack.command()[:2], "-o", words, str(mount.point)], check=True)
    mount.note_daemons(before)


# --- read-only -------------------------------------------------------------------------------------------


def test_reading_a_read_only_mount_takes_no_open(mount: Mount) -> None:
    many = mount.stack.base / "low" / "many"
    many.mkdir()
    for number in range(1200):  # more files than the daemon keeps open
        (many / str(number)).write_bytes(b"%d" % number)
    _start_read_only(mount)
    for _ in range(2):
        for number in range(1200):
            assert (mount.point / "many" / str(number)).read_bytes() == b"%d" % number
    found = _requests(mount)
    assert (found["OPEN"], found["RELEASE"]) == (1, 0) and found["READ"] >= 1200
    descriptors = os.listdir(f"/proc/{mount.pid}/fd")
    assert len(descriptors) < 700
    assert mount.unmount() == 0


def test_programs_maps_and_directories_of_a_read_only_mount(mount: Mount) -> None:
    shutil.copy("/usr/bin/true", mount.stack.base / "low" / "program")
    _start_read_only(mount, ",suid,dev")
    subprocess.run([mount.point / "program"], check=True)
    with open(mount.point / "d" / "f", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert pages[:] == b"low" * 1000
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 3000
        os.fsync(file.fileno())
    assert sorted(os.listdir(mount.point)) == ["d", "program", "t"]
    for act in (lambda: (mount.point / "t").write_bytes(b""), (mount.point / "t").unlink):
        assert errno_of(act) == errno.EROFS
    mount.unmount()


# --- options ---------------------------------------------------------------------------------------------


def test_a_timeout_of_zero_sees_what_others_change(mount: Mount) -> None:
    mount.start(options="timeout=0")
    path, below = mount.point / "t", mount.stack.base / "top" / "t"
    assert path.read_bytes() == b"top"
    below.write_bytes(b"changed outside")
    assert path.read_bytes() == b"changed outside"
    assert path.stat().st_size == 15
    mount.unmount()


def test_without_extended_attributes(mount: Mount) -> None:
    mount.start(options="noxattrs")
    path = mount.point / "t"
    for act in (
        lambda: os.setxattr(path, "user.a", b"b"),
        lambda: os.getxattr(path, "user.a"),
        lambda: os.removexattr(path, "user.a"),
    ):
        assert errno_of(act) == errno.EOPNOTSUPP
    path.write_bytes(b"written")
    assert path.read_bytes() == b"written"
    mount.unmount()


def test_only_root_and_the_owner(mount: Mount) -> None:
    mount.start(options="allow_root")
    assert (mount.point / "t").read_bytes() == b"top"
    assert run_as(ALICE, lambda: errno_of(os.listdir, mount.point)) == errno.EACCES
    assert run_as(ALICE, lambda: errno_of(os.stat, mount.point / "t")) == errno.EACCES
    mount.unmount()


@pytest.mark.parametrize("spin", ["0", "auto", "200"])
def test_an_idle_mount_sleeps(mount: Mount, spin: str) -> None:
    mount.start(options=f"spin={spin}")
    for _ in range(2):
        for number in range(200):
            assert not (mount.point / f"absent{number}").exists()
        until(lambda: _state(mount.pid) == "S")
    assert _requests(mount)["LOOKUP"] == 200
    mount.unmount()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- interrupts ------------------------------------------------------------------------------------------


def test_a_killed_client_does_not_wait_for_its_reply(mount: Mount) -> None:
    """The daemon is stopped: a client that is killed meanwhile ends at once, and the mount works afterwards."""
    mount.start()
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        child = os.fork()
        if child == 0:
            os.mkdir(mount.point / "made")
            os._exit(0)
        until(lambda: _state(child) in "SD")
        os.kill(child, signal.SIGKILL)
        assert processes.reap(child) == -signal.SIGKILL
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    assert (mount.point / "t").read_bytes() == b"top"
    assert mount.unmount() == 0
