"""Making the kernel write back what it holds for a mount: dirty pages of mappings, and of the writeback cache.

A call on our own mount waits for an answer that this process gives, and in most places no signal ends the wait. If the
daemon is killed meanwhile its other threads end, but the waiting thread keeps the shared descriptor table, /dev/fuse
included. The kernel does not notice that nothing answers any more, and every user of the mount hangs for good. (This
is the deadlock of Documentation/filesystems/fuse/fuse.rst of Linux, from the inside.)

Every call that may wait for our mount is therefore made in a thread with an unshared descriptor table, which
does not contain /dev/fuse. When the daemon is killed the connection ends with the other threads, and with the
connection the wait.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from overlayfs import sysio
from overlayfs.fuse.engine import Engine
from overlayfs.mount import syscalls

R = TypeVar("R")


def run_unshared(work: Callable[[], R]) -> R:
    """Return what `work` returns, or raise what it raises; blocks.

    `work` has none of our descriptors but the standard streams: it opens what it needs, and must not log.
    """
    done: Future[R] = Future()
    threading.Thread(target=_carry_out, args=(work, done), name="unshared", daemon=True).start()
    return done.result()


def _carry_out(work: Callable[[], R], done: Future[R]) -> None:
    # Refused by Linux before 5.9 and by some sandboxes: then the work is done as well as it can be.
    with contextlib.suppress(OSError):
        syscalls.leave_descriptors()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def prepare_flush(engine: Engine, mountpoint: bytes) -> Callable[[], None]:
    """Return the call, for a thread, that returns when the kernel has handed over every dirty page of a mount.

    syncfs(2) on the mount starts that, but since kernel 6.16 or so it no longer waits for a FUSE daemon. Closing a file
    does, whoever has written to it (fuse_flush of fs/fuse/file.c). Files are opened by their handles: they may have no
    names, or other mounts above them. Who may not do that, an unprivileged user, has the pages dropped instead, which
    waits as well, but with /dev/fuse in his hands (see above).
    """
    numbers = engine.files_with_pages()

    def write_out() -> None:
        for number in run_unshared(lambda: _hand_over(mountpoint, numbers)):
            with contextlib.suppress(OSError):  # forgotten meanwhile: then nothing was dirty
                engine.drop_pages(number)

    return write_out


def _hand_over(mountpoint: bytes, numbers: Iterable[int]) -> list[int]:
    """Sync the mount, open and close these files of it; return the numbers of those that we may not open."""
    directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sysio.syncfs(directory)
        return [number for number in numbers if not _visited(directory, number)]
    finally:
        os.close(directory)


def _visited(directory: int, number: int) -> bool:
    """Open and close a file; False if we may not. The kernel keeps an error of the disk for those who wrote."""
    try:
        file = syscalls.open_inode(directory, number)
    except OSError as error:
        return error.errno == errno.ESTALE  # forgotten meanwhile: then nothing was dirty
    with contextlib.suppress(OSError):
        os.close(file)
    return True
