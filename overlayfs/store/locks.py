"""Locks of a store: flock(2) on small files, gone with the process that holds them.

The store's lock is held for moments only: shared by who adds something (puts an image, makes a workspace, stages a
layer), exclusively by who takes something away. A layer's lock is held shared as long as somebody reads the layer or is
about to refer to it, exclusively by repair and by gc; a workspace's exclusively while it is mounted, committed or
removed. Nobody who holds the store's lock waits for one of the others: gc passes by what it cannot have at once.

A lock file may be renamed away between opening and locking it, so a holder looks again.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Self

from overlayfs import sysio
from overlayfs.store import layout

_POLL = 0.02  # seconds between two looks at a lock that is held: nothing tells when a flock becomes free in time


class HeldLock:
    """A lock that is held until `release`; also a context. `fd` carries the lock, and so does every duplicate of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> None:
        """Let go; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            sysio.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def hold(dirfd: int, name: bytes, *, shared: bool) -> Iterator[None]:
    """Hold the lock file `name`, which is never renamed, within the context; waits for it."""
    fd = sysio.open_child(dirfd, name, os.O_RDONLY)
    try:
        sysio.wait_lock(fd, shared)
        yield
    finally:
        sysio.close(fd)


def create(dirfd: int, *, shared: bool) -> HeldLock:
    """Make the lock file in a directory that nobody else looks at yet, and hold it."""
    fd = sysio.open_child(dirfd, layout.LOCK, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
    sysio.wait_lock(fd, shared)
    return HeldLock(fd)


def try_hold(dirfd: int, path: bytes, *, shared: bool, wait: float = 0.0) -> HeldLock | None:
    """Hold the lock file `path`/lock; None if it stays taken for `wait` seconds. FileNotFoundError when it is gone."""
    until = time.monotonic() + wait
    place = path + b"/" + layout.LOCK
    fd = sysio.open_beneath(dirfd, place, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        while not (sysio.try_share(fd) if shared else sysio.try_lock(fd)):
            if time.monotonic() >= until:
                sysio.close(fd)
                return None
            time.sleep(_POLL)
        _check_in_place(dirfd, place, fd)
    except OSError:
        sysio.close(fd)
        raise
    return HeldLock(fd)


def _check_in_place(dirfd: int, place: bytes, fd: int) -> None:
    """FileNotFoundError when the file was renamed away, or another one has taken its place, before we had the lock."""
    now = sysio.open_beneath(dirfd, place, os.O_PATH | os.O_NOFOLLOW)
    try:
        found, held = sysio.stat_at(now, b""), sysio.stat_at(fd, b"")
    finally:
        sysio.close(now)
    if (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
        raise FileNotFoundError(place)
