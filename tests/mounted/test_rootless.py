"""Mounting without privilege, through fusermount3: mount, work and unmount, as a user who owns the directories."""

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from overlayfs.errors import MountError
from overlayfs.fuse.pyfuse3 import engine as pyfuse3_engine
from overlayfs.library import Store
from overlayfs.mount import (  # all of it: a user may not read our interpreter
    control_client,
    daemon,
    image_mount,
    live_commit,
    runtime_state,
    start,
    unmount,
)
from overlayfs.mount.control_protocol import CommitImage
from overlayfs.mount.mounts import kernel_mounts
from overlayfs.mount.options import Draft
from overlayfs.store import commit, hashing
from overlayfs.store.store import LayerStore
from tests.mounted.conftest import Mount
from tests.store.samples import add_image
from tests.support import engines, processes, syscalls
from tests.support.campaign import Campaign
from tests.support.outcome import errno_of
from tests.support.polling import until
from tests.support.requirements import need_program
from tests.support.users import ALICE, BOB, ROOT, run_as

T = TypeVar("T")
DEVICE = "/dev/fuse"
_NEW_USER, _NEW_MOUNTS = 0x1000_0000, 0x0002_0000  # unshare(2)
assert daemon and live_commit and commit and hashing and pyfuse3_engine


@pytest.fixture
def _device_for_all() -> Iterator[None]:
    with open(DEVICE, "rb+", buffering=0) as device:
        fcntl.flock(device, fcntl.LOCK_EX)  # another worker of this run may do the same
        mode = stat.S_IMODE(os.stat(DEVICE).st_mode)
        os.chmod(DEVICE, mode | 0o666)
        yield
        os.chmod(DEVICE, mode)


@pytest.fixture
def alices(mount: Mount, _device_for_all: None) -> Mount:
    """A stack owned by a user."""
    need_program("fusermount3")
    (mount.stack.base / "run").mkdir()
    for path in [mount.stack.base, *mount.stack.base.rglob("*")]:
        os.chown(path, ALICE.uid, ALICE.gid)
    return mount


def _as_alice(mount: Mount, act: Callable[[], T]) -> T:
    def with_directory() -> T:
        os.environ["XDG_RUNTIME_DIR"] = str(mount.stack.base / "run")
        return act()

    return run_as(ALICE, with_directory)


def _start(mount: Mount, options: str = "") -> None:
    def act() -> None:
        draft = Draft()
        draft.read(os.fsencode(f"{mount.stack.options},{options}"))
        start.mount(draft.build(), os.fsencode(mount.point))

    before = processes.children()
    _as_alice(mount, act)
    mount.note_daemons(before)


def test_a_whole_life(alices: Mount) -> None:
    _start(alices)
    point, upper = alices.point, alices.stack.upper

    def act() -> None:
        (point / "d" / "f").write_bytes(b"changed")
        (point / "t").unlink()
        os.rename(point / "d", point / "moved")
        (point / "d").mkdir()

    _as_alice(alices, act)
    assert _as_alice(alices, lambda: sorted(os.listdir(point))) == ["d", "moved"]
    with pytest.raises(PermissionError):
        os.listdir(point)  # allow_other is not for users
    assert _as_alice(alices, lambda: control_client.Client.at(os.fsencode(point)).status().pid) == alices.pid
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(point)))
    assert processes.reap(alices.pids.pop(), limit=1) == 0
    assert (upper / "moved" / "f").read_bytes() == b"changed"

    _start(alices)
    assert _as_alice(alices, (point / "moved" / "f").read_bytes) == b"changed"
    assert _as_alice(alices, lambda: os.listdir(point / "d")) == []
    os.kill(alices.pid, signal.SIGTERM)
    assert processes.reap(alices.pids.pop()) == 0
    until(lambda: not os.path.ismount(point))


def test_a_users_mount_gives_no_rights(alices: Mount) -> None:
    """Whatever the options: no set-id programs, no devices, no access for other users, no forged marks."""
    shutil.copy("/usr/bin/id", alices.stack.base / "top" / "id")
    os.chown(alices.stack.base / "top" / "id", 0, 0)
    (alices.stack.base / "top" / "id").chmod(0o4755)
    _start(alices, options="suid,dev")
    (mount,) = [each for each in kernel_mounts() if each.mountpoint == os.fsencode(alices.point)]
    assert {b"nosuid", b"nodev"} <= mount.options

    def forge() -> tuple[int | None, ...]:
        point = alices.point
        return (
            errno_of(os.mknod, point / "hidden", stat.S_IFCHR, 0),
            errno_of(os.setxattr, point / "d", "user.fuseoverlayfs.opaque", b"y"),
            errno_of(os.setxattr, point / "d", "user.overlay.opaque", b"y"),
            errno_of(os.stat, point / "d" / "f"),
        )

    assert _as_alice(alices, forge) == (errno.EPERM, errno.EPERM, None, None)
    assert _as_alice(alices, lambda: subprocess.check_output([alices.point / "id", "-u"])) == b"1000\n"
    for other in (ROOT, BOB):
        assert run_as(other, lambda: errno_of(os.stat, alices.point)) == errno.EACCES
        assert run_as(other, lambda: errno_of(os.listdir, alices.stack.base / "run" / "overlayfs")) in (
            (None,) if other == ROOT else (errno.EACCES,)
        )
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(alices.point)))
    assert processes.reap(alices.pids.pop()) == 0


def _enter_namespace() -> None:
    """Become root of a new user namespace with a mount namespace of its own (user_namespaces(7))."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(_NEW_USER | _NEW_MOUNTS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def test_inside_a_user_namespace(alices: Mount) -> None:
    """Root of a user namespace may mount without fusermount3; new files belong to the user outside."""
    point = alices.point

    def live() -> tuple[int | None, list[str], bytes]:
        _enter_namespace()
        draft = Draft()
        draft.read(os.fsencode(alices.stack.options))
        start.mount(draft.build(), os.fsencode(point))
        try:
            (point / "d" / "f").write_bytes(b"changed")
            (point / "t").unlink()
            os.rename(point / "d", point / "moved")
            forged = errno_of(os.mknod, point / "hidden", stat.S_IFCHR, 0)
            return forged, sorted(os.listdir(point)), (point / "moved" / "f").read_bytes()
        finally:
            syscalls.umount(os.fsencode(point))

    before = processes.children()
    found = _as_alice(alices, live)
    processes.reap_since(before)
    assert found == (errno.EPERM, ["moved"], b"changed")
    assert (alices.stack.upper / "moved" / "f").stat().st_uid == ALICE.uid
    assert not os.path.ismount(point)


def test_a_dead_daemons_mount_is_replaced(alices: Mount) -> None:
    _start(alices)
    os.kill(alices.pid, signal.SIGKILL)
    processes.reap(alices.pids.pop())
    with pytest.raises(OSError) as caught:
        _as_alice(alices, lambda: os.statvfs(alices.point))
    assert caught.value.errno == errno.ENOTCONN
    _start(alices)
    assert _as_alice(alices, (alices.point / "t").read_bytes) == b"top"
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(alices.point)))
    assert processes.reap(alices.pids.pop()) == 0


DIES = "#!/bin/sh\nkill -9 $$\n"
MOUNTS_AND_DIES = """#!/usr/bin/python3
import os, socket, subprocess, sys
ours, theirs = socket.socketpair()
environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
subprocess.run(["/usr/bin/fusermount3", *sys.argv[1:]], env=environment, pass_fds=[theirs.fileno()], check=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.engine(engines.KERNEL)
@pytest.mark.campaign("T17")
@pytest.mark.parametrize("program", [DIES, MOUNTS_AND_DIES])
def test_a_helper_that_is_killed(
    campaign: Campaign, alices: Mount, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fusermount3 dies before or after it mounts, or before it unmounts: it is reported, and the next mount works."""
    helper = alices.stack.base / "bin" / "fusermount3"
    helper.parent.mkdir()
    helper.write_text(program)
    helper.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{helper.parent}:{path}")
    before = processes.children()
    with pytest.raises(MountError, match=r"cannot mount on .*: fusermount3 was ended by signal 9"):
        _start(alices)
    processes.reap_since(before)
    monkeypatch.setenv("PATH", path)
    _start(alices)
    assert _as_alice(alices, (alices.point / "t").read_bytes) == b"top"
    helper.write_text(DIES)
    monkeypatch.setenv("PATH", f"{helper.parent}:{path}")
    with pytest.raises(MountError, match=r"cannot unmount .*: fusermount3 was ended by signal 9"):
        _as_alice(alices, lambda: unmount.unmount(os.fsencode(alices.point)))
    monkeypatch.setenv("PATH", path)
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(alices.point)))
    assert processes.reap(alices.pids.pop()) == 0
    campaign.held("ways to die, fusermount3", 2, [])


def test_the_reason_of_a_refusal_is_reported(alices: Mount) -> None:
    os.chown(alices.point, 0, 0)
    alices.point.chmod(0o755)
    before = processes.children()
    with pytest.raises(MountError, match=r"cannot mount on .*: user has no write access to mountpoint"):
        _start(alices)
    processes.reap_since(before)
    assert not os.path.ismount(alices.point)


def test_records_are_in_the_users_runtime_directory(alices: Mount) -> None:
    _start(alices)
    directory = alices.stack.base / "run" / "overlayfs"
    assert sorted(path.name for path in directory.iterdir()) == [f"{alices.pid}.json", f"{alices.pid}.sock"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not runtime_state.record_path(alices.pid).exists()
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(alices.point)))
    assert processes.reap(alices.pids.pop()) == 0
    assert list(directory.iterdir()) == []
    assert Path("/run/overlayfs") != directory


def _mount_image(alices: Mount) -> bytes:
    """Make an image of the user's own and mount it; return the store."""
    store, point = os.fsencode(alices.stack.base / "store"), alices.point

    def mount_image() -> None:
        with LayerStore(store) as opened:
            add_image(opened, "site", {"d/f": "old", "t": "top"})
        with image_mount.lease_workspace(store, "site", "mine", ephemeral=False, create=False) as lease:
            draft = Draft(lower=list(lease.lower), upper=lease.upper, work=lease.work)
            start.mount(dataclasses.replace(draft.build(), image_mount=lease.image_mount), os.fsencode(point))

    before = processes.children()
    _as_alice(alices, mount_image)
    alices.note_daemons(before)
    return store


def test_a_live_commit(alices: Mount) -> None:
    """A handle that could not be reopened, a moved directory, a file with two names."""
    store, point = _mount_image(alices), alices.point

    def live() -> list[tuple[str, bytes]]:
        os.rename(point / "d", point / "moved")
        (point / "one").write_bytes(b"one")
        os.link(point / "one", point / "moved" / "two")
        with open(os.open(point / "object", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb", buffering=0) as file:
            file.write(b"before, ")
            numbers = os.stat(point / "one").st_ino, os.fstat(file.fileno()).st_ino
            made = control_client.Client.at(os.fsencode(point)).commit_image(CommitImage(image="next"))
            file.write(b"after")
            (point / "one").write_bytes(b"ONE")
            assert numbers == (os.stat(point / "moved" / "two").st_ino, os.fstat(file.fileno()).st_ino)
        tree = Path(os.fsdecode(store)) / "layers" / made.layer / "tree"
        places = (tree / "object", point / "object", tree / "one", point / "moved" / "two", point / "moved" / "f")
        return [(place.name, place.read_bytes()) for place in places]

    assert _as_alice(alices, live) == [
        ("object", b"before, "),
        ("object", b"before, after"),
        ("one", b"one"),
        ("two", b"ONE"),
        ("f", b"old"),
    ]
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(point)))
    assert processes.reap(alices.pids.pop()) == 0


def test_an_image_and_its_commit(alices: Mount) -> None:
    """The store, the workspace and the layer are the user's own."""
    store, point = _mount_image(alices), alices.point

    def change() -> None:
        os.rename(point / "d", point / "moved")
        (point / "t").unlink()

    _as_alice(alices, change)
    _as_alice(alices, lambda: unmount.unmount(os.fsencode(point)))
    assert processes.reap(alices.pids.pop()) == 0

    def commit() -> list[bytes]:
        with Store(store, create=False) as opened:
            return sorted(os.listdir(opened.commit_workspace("mine", image="next").tree_path))

    assert _as_alice(alices, commit) == [b"d", b"moved", b"t"]
