"""Locks of a store: flock(2) on small files, released by the kernel when the process that holds them ends.

The store's lock is held for moments only: shared to add something (put an image, create a workspace, stage a layer),
exclusively to remove something. A layer's lock is held shared while the layer is read or about to be referred to,
exclusively by repair and gc; a workspace's lock is held exclusively while it is mounted, committed or removed. A
process that holds the store's lock never waits for one of the others: gc skips what is locked.

A lock file may be renamed away between opening and locking it, so its place is checked again once it is locked.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Self

from overlayfs import sysio
from overlayfs.store import layout

_POLL = 0.02  # seconds between two attempts at a lock in use: flock(2) has no timeout


class HeldLock:
    """A lock held until `release`; a context manager. `fd` carries the lock, and so does every duplicate of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> None:
        """Release the lock. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            sysio.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def hold(dirfd: int, name: bytes, *, shared: bool) -> Iterator[None]:
    """Hold the lock of the file `name`, which is never renamed, within the context; waits for it."""
    fd = sysio.open_child(dirfd, name, os.O_RDONLY)
    try:
        sysio.wait_lock(fd, shared)
        yield
    finally:
        sysio.close(fd)


def create(dirfd: int, *, shared: bool) -> HeldLock:
    """Create the lock file in a directory that no other process uses yet, and hold it."""
    fd = sysio.open_child(dirfd, layout.LOCK, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
    sysio.wait_lock(fd, shared)
    return HeldLock(fd)


def try_hold(dirfd: int, path: bytes, *, shared: bool, wait: float = 0.0) -> HeldLock | None:
    """Hold the lock file `path`/lock; None if it stays in use for `wait` seconds.

    Raises FileNotFoundError if the file is not there, or was renamed away before it was locked.
    """
    until = time.monotonic() + wait
    lock_path = path + b"/" + layout.LOCK
    fd = sysio.open_beneath(dirfd, lock_path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        while not (sysio.try_share(fd) if shared else sysio.try_lock(fd)):
            if time.monotonic() >= until:
                sysio.close(fd)
                return None
            time.sleep(_POLL)
        _check_in_place(dirfd, lock_path, fd)
    except OSError:
        sysio.close(fd)
        raise
    return HeldLock(fd)


def _check_in_place(dirfd: int, lock_path: bytes, fd: int) -> None:
    """Raise FileNotFoundError if `lock_path` is no longer the locked file `fd`."""
    now = sysio.open_beneath(dirfd, lock_path, os.O_PATH | os.O_NOFOLLOW)
    try:
        found, locked = sysio.stat_at(now, b""), sysio.stat_at(fd, b"")
    finally:
        sysio.close(now)
    if (found.st_dev, found.st_ino) != (locked.st_dev, locked.st_ino):
        raise FileNotFoundError(lock_path)
