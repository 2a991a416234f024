"""Bugs that let something in: joined paths in layers, an upper without its lock, set-id bits that stay."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest import mock

from overlayfs import sysio
from overlayfs.fs import stack
from overlayfs.fs.metadata import Metadata
from overlayfs.tree.upper import Upper


def joined_paths() -> AbstractContextManager[object]:
    """M4: a path in a layer is opened as open(2) opens paths, through every symbolic link and mount on it."""

    def open_joined(dirfd: int, path: bytes, flags: int, mode: int = 0) -> int:
        return os.open(path or b".", (flags | os.O_CLOEXEC) & ~os.O_NOFOLLOW, mode, dir_fd=dirfd)

    return mock.patch.object(sysio, "open_beneath", open_joined)


def unlocked_upper() -> AbstractContextManager[object]:
    """M8: uppers and work directories are not locked."""
    return mock.patch.object(stack, "lock")


@contextmanager
def kept_bits() -> Iterator[None]:
    """M9: set-id bits and capabilities survive writes and changes of the owner."""
    set_owner = Upper.set_owner

    def set_only_owner(self: Upper, dirfd: int, name: bytes, uid: int, gid: int) -> None:
        mode = sysio.stat_at(dirfd, name).st_mode
        set_owner(self, dirfd, name, uid, gid)
        if not stat.S_ISLNK(mode):
            sysio.chmod_at(dirfd, name, stat.S_IMODE(mode))

    with (
        mock.patch.object(Metadata, "strip_set_id"),
        mock.patch.object(sysio, "WithoutCapability", return_value=nullcontext()),
        mock.patch.object(Upper, "set_owner", set_only_owner),
    ):
        yield


MUTANTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "M4": joined_paths,
    "M8": unlocked_upper,
    "M9": kept_bits,
}
