"""Names in directories: listing, making, linking, renaming, removing. See renameat2(2), linkat(2), getdents(2)."""

import ctypes
import errno
import os
import struct

from overlayfs.errors import oserror
from overlayfs.sysio.calls import changing, restarted
from overlayfs.sysio.descriptors import close, open_confined
from overlayfs.sysio.libc import AT_SYMLINK_FOLLOW, component, failed, function, through_proc

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_renameat2 = function("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_linkat = function("linkat", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_getdents64 = function("getdents64", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)

# struct linux_dirent64: u64 d_ino, s64 d_off, then these, then the name and NULs up to d_reclen.
_LENGTH_AND_KIND = struct.Struct("=HB")
_LENGTH_AT = 16
_NAME_AT = 19
_LISTING = 64 * 1024
_DOTS = (b".", b"..")


def _entries(block: bytes) -> list[tuple[bytes, int]]:
    found: list[tuple[bytes, int]] = []
    unpack, find, add = _LENGTH_AND_KIND.unpack_from, block.index, found.append
    at, end = 0, len(block)
    while at < end:
        length, kind = unpack(block, at + _LENGTH_AT)
        name = block[at + _NAME_AT : find(b"\0", at + _NAME_AT)]
        at += length
        add((name, kind << 12))  # DT_* values are the S_IFMT bits shifted by 12; DT_UNKNOWN is 0
    return found


def _open_listing(dirfd: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        return open_confined(dirfd, b".", flags | os.O_NOATIME, 0)
    except PermissionError:  # only the owner and root may use O_NOATIME (open(2))
        return open_confined(dirfd, b".", flags, 0)


@restarted
def list_dir(dirfd: int, /) -> list[tuple[bytes, int]]:
    """Return (name, type) of each entry except ``.`` and ``..``, in the order of the file system.

    The type is the S_IFMT part of the mode, or 0 where the file system does not report it and a stat is needed.
    The access time is left unchanged where this is permitted. `dirfd` may be opened with O_PATH; its own offset is
    neither used nor moved.
    """
    fd = _open_listing(dirfd)
    buffer = ctypes.create_string_buffer(_LISTING)
    found: list[tuple[bytes, int]] = []
    try:
        while (size := _getdents64(fd, buffer, _LISTING)) > 0:
            found.extend(_entries(ctypes.string_at(buffer, size)))
        if size < 0:
            raise failed()
    finally:
        close(fd)
    return [entry for entry in found if entry[0] not in _DOTS]


@restarted
def readlink_at(dirfd: int, name: bytes, /) -> bytes:
    """Return the target of a symbolic link; ``b""`` needs a descriptor opened with O_PATH | O_NOFOLLOW."""
    return os.readlink(component(name), dir_fd=dirfd)


@changing
def mkdir_at(dirfd: int, name: bytes, mode: int, /) -> None:
    """Make a directory.  mkdir(2) ignores S_ISUID and S_ISGID: set them with `chmod_at`."""
    os.mkdir(component(name), mode, dir_fd=dirfd)


@changing
def mknod_at(dirfd: int, name: bytes, mode: int, rdev: int, /) -> None:
    """Make a regular file, FIFO, socket or device; `mode` holds type and permissions."""
    os.mknod(component(name), mode, rdev, dir_fd=dirfd)


@changing
def symlink_at(target: bytes, dirfd: int, name: bytes, /) -> None:
    """Make a symbolic link `name` to `target`, which is not resolved."""
    if b"\0" in target:
        raise oserror(errno.EINVAL, target)
    os.symlink(target, component(name), dir_fd=dirfd)


@changing
def link_at(src_dirfd: int, src_name: bytes, dirfd: int, name: bytes, /) -> None:
    """Give an object one more name.  An empty `src_name` links the descriptor, O_TMPFILE and O_PATH included.

    The descriptor goes through /proc because AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH (linkat(2)).
    """
    source = component(src_name) or through_proc(src_dirfd, b"")
    flags = 0 if src_name else AT_SYMLINK_FOLLOW
    if _linkat(src_dirfd, source, dirfd, component(name), flags) < 0:
        raise failed(name)


@changing
def unlink_at(dirfd: int, name: bytes, /) -> None:
    """Remove a name of anything but a directory."""
    os.unlink(component(name), dir_fd=dirfd)


@changing
def rmdir_at(dirfd: int, name: bytes, /) -> None:
    """Remove an empty directory."""
    os.rmdir(component(name), dir_fd=dirfd)


@changing
def rename_at(sdirfd: int, sname: bytes, ddirfd: int, dname: bytes, flags: int = 0, /) -> None:
    """Move a name in one step; `flags` are the RENAME_* constants of renameat2(2)."""
    if _renameat2(sdirfd, component(sname), ddirfd, component(dname), flags) < 0:
        raise failed(sname)
