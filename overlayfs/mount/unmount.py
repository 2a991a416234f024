"""Unmounting, so that the next mount of the same upper can follow at once."""

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from overlayfs.errors import MountError
from overlayfs.mount import mounts, runtime_state, syscalls
from overlayfs.mount.fusermount import detach
from overlayfs.mount.mounts import kernel_mounts

CONNECTIONS = Path("/sys/fs/fuse/connections")
_PAUSE = 0.05  # seconds between two attempts


def unmount(mountpoint: bytes, *, lazy: bool = False, wait: float = 10.0) -> None:
    """Unmount and return when the daemon is gone, its upper free. MountError with the reason.

    `lazy` takes a mount in use out of the tree and does not wait. A daemon that does not let the unmount
    go on within `wait` seconds is cut off from the kernel through fusectl, which makes its clients fail
    with ECONNABORTED and the unmount succeed. So is, at once, one that was killed and cannot end.
    """
    mount = mounts.find(mountpoint)
    with _watched(mount.pid) as daemon, _connection(mount) as connection:
        patience = wait if cut_off_dying(mount) else 0.0
        _detach_or_cut_off(mount, connection, lazy, wait, patience)
        if not lazy and daemon is not None and not _ended(daemon, wait):
            raise MountError(
                f"{os.fsdecode(mountpoint)} is unmounted, but its daemon (pid {mount.pid}) still runs after {wait:g} s"
            )


@contextlib.contextmanager
def _watched(pid: int | None) -> Iterator[int | None]:
    """Give a descriptor of a process, None without one; held from before the unmount, so no pid is mistaken."""
    try:
        descriptor = os.pidfd_open(pid) if pid else None
    except OSError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _ended(daemon: int, wait: float) -> bool:
    poller = select.poll()
    poller.register(daemon, select.POLLIN)
    return bool(poller.poll(wait * 1000))


def _detach_or_cut_off(mount: mounts.Mount, connection: int | None, lazy: bool, wait: float, patience: float) -> None:
    """Detach in a thread of its own, since a hung daemon makes the call wait for dirty pages without end.

    patience: seconds in which those who use the mount may yet go.
    """
    failures: list[MountError] = []

    def work() -> None:
        try:
            _detach_patiently(mount.mountpoint, lazy, patience)
        except MountError as error:
            failures.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(wait + patience)
    if worker.is_alive() and connection is not None:
        os.write(connection, b"1")
        worker.join(wait)
    if worker.is_alive():
        failures.append(MountError(f"cannot unmount {os.fsdecode(mount.mountpoint)}: its daemon hangs"))
    if failures:
        raise failures[0]


def _detach_patiently(mountpoint: bytes, lazy: bool, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            return detach(mountpoint, lazy)
        except MountError:
            if time.monotonic() >= end:
                raise
        time.sleep(_PAUSE)


def cut_off_dying(mount: mounts.Mount) -> bool:
    """Cut the connection of a mount whose daemon was killed and cannot end; return whether it is such a mount.

    A thread that no signal ends holds /dev/fuse, so that the kernel waits for answers, and all clients with it.
    """
    if mount.pid is None or not runtime_state.is_dying(mount.pid):
        return False
    cut_off(mount)
    return True


def cut_off(mount: mounts.Mount) -> None:
    """Cut the connection of a mount, if it still is there: whoever waits for its daemon gets ECONNABORTED."""
    with _connection(mount) as connection:
        if connection is not None:
            os.write(connection, b"1")


@contextlib.contextmanager
def _connection(mount: mounts.Mount) -> Iterator[int | None]:
    """Give a descriptor that cuts the connection of a mount when it is written to; None where there is none to be had.

    fusectl names connections by the minor number of the mount, which belongs to the next mount as soon as this one has
    gone. So it is opened first, and is known to be the right one if the mount is there afterwards. Once the connection
    has gone the kernel takes what is written for nothing.
    """
    with contextlib.ExitStack() as stack:
        descriptor = None
        with contextlib.suppress(OSError), _fusectl():
            minor = mount.device.partition(b":")[2].decode()
            descriptor = os.open(CONNECTIONS / minor / "abort", os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
        yield descriptor if _is_there(mount) else None


def _is_there(mount: mounts.Mount) -> bool:
    return any((found.device, found.mountpoint) == (mount.device, mount.mountpoint) for found in kernel_mounts())


@contextlib.contextmanager
def _fusectl() -> Iterator[None]:
    """See to it that fusectl is mounted at its place, as a service manager does at boot; as it was afterwards."""
    if os.path.ismount(CONNECTIONS):
        yield
        return
    point = os.fsencode(CONNECTIONS)
    syscalls.mount(b"fusectl", point, b"fusectl")
    try:
        yield
    finally:
        syscalls.umount(point, syscalls.MNT_DETACH)  # what was opened in it stays open
