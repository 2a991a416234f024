"""Unmounting, so that the next mount of the same upper can follow at once."""

import contextlib
import os
import select
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from overlayfs.errors import MountError
from overlayfs.mount import table
from overlayfs.mount.detach import detach

CONNECTIONS = Path("/sys/fs/fuse/connections")


def unmount(mountpoint: bytes, *, lazy: bool = False, wait: float = 10.0) -> None:
    """Unmount and return when the daemon is gone, its upper free. MountError with the reason.

    `lazy` takes a mount in use out of the tree and does not wait. A daemon that does not let the unmount
    go on within `wait` seconds is cut off from the kernel through fusectl, which makes its clients fail
    with ECONNABORTED and the unmount succeed.
    """
    mount = table.find(mountpoint)
    with _watched(mount.pid) as daemon:
        _detach_or_cut_off(mount, lazy, wait)
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


def _detach_or_cut_off(mount: table.Mount, lazy: bool, wait: float) -> None:
    """Detach in a thread of its own, since a hung daemon makes the call wait for dirty pages without end."""
    failures: list[MountError] = []

    def work() -> None:
        try:
            detach(mount.mountpoint, lazy)
        except MountError as error:
            failures.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(wait)
    if worker.is_alive():
        cut_off(mount)
        worker.join(wait)
    if worker.is_alive():
        failures.append(MountError(f"cannot unmount {os.fsdecode(mount.mountpoint)}: its daemon hangs"))
    if failures:
        raise failures[0]


def cut_off(mount: table.Mount) -> None:
    """Cut the connection of a mount; its directory under fusectl is named by the minor number of the mount."""
    minor = mount.device.partition(b":")[2].decode()
    with contextlib.suppress(OSError), _fusectl(minor):
        (CONNECTIONS / minor / "abort").write_text("1")


@contextlib.contextmanager
def _fusectl(minor: str) -> Iterator[None]:
    """See to it that fusectl is mounted at its place, as a service manager does at boot; as it was afterwards."""
    if (CONNECTIONS / minor).exists():
        yield
        return
    subprocess.run(["mount", "-t", "fusectl", "fusectl", CONNECTIONS], check=False, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", CONNECTIONS], check=False, capture_output=True)
