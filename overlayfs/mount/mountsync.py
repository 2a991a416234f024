"""Making the kernel hand over what it holds for a mount: dirty pages of mappings, and of the writeback cache."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable

from overlayfs import sysio
from overlayfs.fuse.engine import Engine
from overlayfs.mount import outside, syscalls


def prepare_write_out(engine: Engine, mountpoint: bytes) -> Callable[[], None]:
    """Return the call, for a thread, that returns when the kernel has handed over every dirty page of a mount.

    syncfs(2) on the mount starts that, but since kernel 6.16 or so it no longer waits for a FUSE daemon. Closing a file
    does, whoever has written to it (fuse_flush of fs/fuse/file.c). Files are opened by their handles: they may have no
    names, or other mounts above them. Who may not do that, an unprivileged user, has the pages dropped instead, which
    waits as well, but with /dev/fuse in his hands (see `outside`).
    """
    numbers = engine.files_with_pages()

    def write_out() -> None:
        for number in outside.run(lambda: _hand_over(mountpoint, numbers)):
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
