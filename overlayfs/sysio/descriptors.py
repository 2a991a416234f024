"""Descriptors: opening, closing, how a file was opened, flock(2)."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Iterator

from overlayfs.errors import oserror
from overlayfs.sysio.calls import changing, restarted
from overlayfs.sysio.libc import component, failed, function, through_proc

_NR_OPENAT2 = 437

_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_CONFINED = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH

_O_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY
_TAKES_MODE = os.O_CREAT | _O_TMPFILE_BIT  # openat2(2) fails with EINVAL for a mode without one of these
_OPEN_CHANGES = os.O_CREAT | os.O_TRUNC | _O_TMPFILE_BIT

_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_LONGEST_WALK = 4000  # PATH_MAX is 4096 with the final NUL


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_OPEN_HOW_SIZE = ctypes.sizeof(_OpenHow)
_openat2 = function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)


@functools.lru_cache(maxsize=1024)
def _how(flags: int, mode: int) -> _OpenHow:
    # The kernel only reads it, so one object may serve several threads at once.
    return _OpenHow(flags | os.O_CLOEXEC, mode & 0o7777 if flags & _TAKES_MODE else 0, _CONFINED)


def open_confined(dirfd: int, path: bytes, flags: int, mode: int) -> int:
    """Open a path of at most PATH_MAX below `dirfd`, which it cannot leave. It announces nothing."""
    while True:
        fd = _openat2(_NR_OPENAT2, dirfd, path, _how(flags, mode), _OPEN_HOW_SIZE)
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EINTR:
            raise failed(path)


def _reopen(fd: int, flags: int, mode: int) -> int:
    return os.open(through_proc(fd, b""), (flags | os.O_CLOEXEC) & ~os.O_NOFOLLOW, mode)


_open_changing = changing(open_confined, "open")
_reopen_changing = changing(_reopen, "open")


def _chunks(path: bytes) -> Iterator[bytes]:
    while len(path) > _LONGEST_WALK:
        cut = path.rfind(b"/", 0, _LONGEST_WALK)
        if cut <= 0:
            raise oserror(errno.ENAMETOOLONG, path)
        yield path[:cut]
        path = path[cut:].lstrip(b"/")
    yield path


def open_beneath(dirfd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path`, any number of components and any length, below `dirfd`; ``b""`` is the directory itself.

    ELOOP for a symbolic link anywhere (a last one opens with O_PATH | O_NOFOLLOW), EXDEV for a mount point or
    an escape through ``..``.  `mode` only matters with O_CREAT or O_TMPFILE.
    """
    if b"\0" in path:
        raise oserror(errno.EINVAL, path)
    *leading, last = _chunks(path)
    current = dirfd
    try:
        for chunk in leading:
            current, previous = open_confined(current, chunk, _WALK, 0), current
            if previous != dirfd:
                close(previous)
        return (_open_changing if flags & _OPEN_CHANGES else open_confined)(current, last or b".", flags, mode)
    finally:
        if current != dirfd:
            close(current)


def open_child(dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
    """Open one child without following it; ``b""`` opens the descriptor's own object again.

    ELOOP for a symbolic link unless `flags` has O_PATH, EXDEV for a mount point.
    """
    changes = flags & _OPEN_CHANGES
    if name:
        return (_open_changing if changes else open_confined)(dirfd, component(name), flags | os.O_NOFOLLOW, mode)
    return (_reopen_changing if changes else _reopen)(dirfd, flags, mode)


def close(fd: int) -> None:
    """Close a descriptor. It is closed whatever close(2) reports; only EBADF, a defect, is raised.

    Data is synced where durability matters; callers that want the errors of a close use `flush`.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


@restarted
def flush(fd: int, /) -> None:
    """Raise what the file system reports when an open file is closed, as NFS and quotas do; it stays open."""
    os.close(os.dup(fd))


def access_mode(fd: int) -> int:
    """Return how a file was opened: O_RDONLY, O_WRONLY or O_RDWR."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def keep_atime(fd: int) -> None:
    """Make reads through an open file leave the access time unchanged, where this is permitted (O_NOATIME, open(2))."""
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)


def try_lock(fd: int) -> bool:
    """Take the exclusive flock(2) of an open file without waiting; False when another description holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_share(fd: int) -> bool:
    """Take the shared flock(2) of an open file without waiting; False when another description holds it exclusively."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_lock(fd: int, shared: bool) -> None:
    """Take the flock(2) of an open file, and wait for it as long as it takes."""
    fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
