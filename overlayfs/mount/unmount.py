"""Unmounting, so that the same upper can be mounted again at once."""

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
    """Unmount, and return when the daemon has ended and the upper is unlocked. MountError with the reason.

    lazy: detach a mount that is in use, and do not wait. If the daemon delays the unmount for more than `wait` seconds,
    its connection is aborted through fusectl: the programs that use the mount get ECONNABORTED, and the unmount
    succeeds. A daemon that was killed and cannot end is aborted at once.
    """
    mount = mounts.find(mountpoint)
    with _process(mount.pid) as daemon, _connection(mount) as connection:
        retry_for = wait if abort_dying(mount) else 0.0
        _detach_or_abort(mount, connection, lazy, wait, retry_for)
        if not lazy and daemon is not None and not _wait_for_end(daemon, wait):
            raise MountError(
                f"{os.fsdecode(mountpoint)} is unmounted, but its daemon (pid {mount.pid}) still runs after {wait:g} s"
            )


@contextlib.contextmanager
def _process(pid: int | None) -> Iterator[int | None]:
    """Give a pidfd, None without a process; opened before the unmount, so that the pid cannot be reused."""
    try:
        descriptor = os.pidfd_open(pid) if pid else None
    except OSError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait_for_end(daemon: int, wait: float) -> bool:
    poller = select.poll()
    poller.register(daemon, select.POLLIN)
    return bool(poller.poll(wait * 1000))


def _detach_or_abort(mount: mounts.Mount, connection: int | None, lazy: bool, wait: float, retry_for: float) -> None:
    """Detach in a thread of its own, since with a daemon that hangs the call waits forever for dirty pages.

    retry_for: for how many seconds to try again while the mount is in use.
    """
    failures: list[MountError] = []

    def work() -> None:
        try:
            _retry_detach(mount.mountpoint, lazy, retry_for)
        except MountError as error:
            failures.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(wait + retry_for)
    if worker.is_alive() and connection is not None:
        os.write(connection, b"1")
        worker.join(wait)
    if worker.is_alive():
        failures.append(MountError(f"cannot unmount {os.fsdecode(mount.mountpoint)}: its daemon hangs"))
    if failures:
        raise failures[0]


def _retry_detach(mountpoint: bytes, lazy: bool, retry_for: float) -> None:
    end = time.monotonic() + retry_for
    while True:
        try:
            return detach(mountpoint, lazy)
        except MountError:
            if time.monotonic() >= end:
                raise
        time.sleep(_PAUSE)


def abort_dying(mount: mounts.Mount) -> bool:
    """Abort the connection of a mount whose daemon was killed and cannot end; return whether it is such a mount.

    A thread that waits uninterruptibly keeps /dev/fuse open, so the kernel goes on waiting for replies.
    """
    if mount.pid is None or not runtime_state.is_dying(mount.pid):
        return False
    abort(mount)
    return True


def abort(mount: mounts.Mount) -> None:
    """Abort the connection of a mount, if it still exists: programs that wait for its daemon get ECONNABORTED."""
    with _connection(mount) as connection:
        if connection is not None:
            os.write(connection, b"1")


@contextlib.contextmanager
def _connection(mount: mounts.Mount) -> Iterator[int | None]:
    """Give a descriptor that aborts the connection of a mount when it is written to; None if it cannot be opened.

    fusectl names connections by the minor number of the mount, which the next mount may get once this one is gone. If
    the mount still exists after the descriptor was opened, it is that of the right connection. Writing to it has no
    effect once the connection is gone.
    """
    with contextlib.ExitStack() as stack:
        descriptor = None
        with contextlib.suppress(OSError), _fusectl():
            minor = mount.device.partition(b":")[2].decode()
            descriptor = os.open(CONNECTIONS / minor / "abort", os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
        yield descriptor if _exists(mount) else None


def _exists(mount: mounts.Mount) -> bool:
    return any((found.device, found.mountpoint) == (mount.device, mount.mountpoint) for found in kernel_mounts())


@contextlib.contextmanager
def _fusectl() -> Iterator[None]:
    """Have fusectl mounted within the context, as a service manager mounts it at boot."""
    if os.path.ismount(CONNECTIONS):
        yield
        return
    point = os.fsencode(CONNECTIONS)
    syscalls.mount(b"fusectl", point, b"fusectl")
    try:
        yield
    finally:
        syscalls.umount(point, syscalls.MNT_DETACH)  # a descriptor that was opened in it stays valid
