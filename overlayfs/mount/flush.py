"""Making the kernel write back the dirty pages of a mount: those of memory maps and of the writeback cache.

A call on our own mount waits for a reply of this process, mostly uninterruptibly. If the daemon is killed meanwhile,
its other threads end, but the waiting thread keeps the shared descriptor table, /dev/fuse included. The kernel does not
notice that no reply will come, and every program that uses the mount hangs forever. (This is the deadlock of
Documentation/filesystems/fuse/fuse.rst of Linux, from the inside.)

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
    """Run `work` in a thread with an unshared descriptor table; return its result or raise its error. Blocks.

    `work` has no descriptors but the standard streams: it opens what it needs, and must not log.
    """
    done: Future[R] = Future()
    threading.Thread(target=_run, args=(work, done), name="unshared", daemon=True).start()
    return done.result()


def _run(work: Callable[[], R], done: Future[R]) -> None:
    # Linux before 5.9 and some sandboxes refuse it; then the work is done with the shared table.
    with contextlib.suppress(OSError):
        syscalls.unshare_descriptors()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def prepare_flush(engine: Engine, mountpoint: bytes) -> Callable[[], None]:
    """Return a function, to be called in a thread, that returns when the kernel has written back every dirty page.

    syncfs(2) on the mount starts that, but since about Linux 6.16 it does not wait for a FUSE daemon. Closing a file
    does, in any process (fuse_flush of fs/fuse/file.c). Files are opened by handle, since they may have no names or be
    covered by other mounts. Where that needs a privilege this process lacks, the pages are dropped, which waits too,
    but in a thread that shares /dev/fuse (see above).
    """
    numbers = engine.files_with_pages()

    def write_back() -> None:
        for number in run_unshared(lambda: _sync_and_close(mountpoint, numbers)):
            with contextlib.suppress(OSError):  # forgotten meanwhile, so no page was dirty
                engine.drop_pages(number)

    return write_back


def _sync_and_close(mountpoint: bytes, numbers: Iterable[int]) -> list[int]:
    """Sync the mount, then open and close these files of it; return the numbers of those that may not be opened."""
    directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sysio.syncfs(directory)
        return [number for number in numbers if not _open_and_close(directory, number)]
    finally:
        os.close(directory)


def _open_and_close(directory: int, number: int) -> bool:
    """Open and close a file; False if that is not permitted. Errors of the disk are left to the programs that wrote."""
    try:
        file = syscalls.open_inode(directory, number)
    except OSError as error:
        return error.errno == errno.ESTALE  # forgotten meanwhile, so no page was dirty
    with contextlib.suppress(OSError):
        os.close(file)
    return True
