"""Attributes of objects: stat, mode, owner, times, flags of chattr(1). See fchmodat(2), utimensat(2), statx(2)."""

import ctypes
import errno
import fcntl
import os
import struct

from overlayfs.errors import oserror
from overlayfs.sysio.calls import changing, restarted
from overlayfs.sysio.descriptors import close, open_confined
from overlayfs.sysio.libc import AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, component, failed, function, through_proc

NOW = 1 << 62
"""As a time: the clock of the file system, which lags behind `time.time_ns` and may not run ahead of other files'."""

_NR_FCHMODAT2 = 452
_fchmodat2 = function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_int)
_utimensat = function("utimensat", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
_statx = function("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)

_SPECIAL_TIMES: dict[int | None, tuple[int, int]] = {
    NOW: (0, (1 << 30) - 1),  # UTIME_NOW
    None: (0, (1 << 30) - 2),  # UTIME_OMIT
}
_TIMES = struct.Struct("=qqqq")  # two of struct timespec: seconds, nanoseconds

_STATX_BTIME = 0x800
_STATX_SIZE = 256


def stat_at(dirfd: int, name: bytes) -> os.stat_result:
    """Return the attributes of the object itself, as lstat does.  For a mount point they are of what is mounted."""
    while True:
        try:
            if name:
                return os.stat(component(name), dir_fd=dirfd, follow_symlinks=False)
            return os.fstat(dirfd)
        except InterruptedError:
            continue


def exists_at(dirfd: int, name: bytes) -> bool:
    """Return whether a name exists, whatever it is; an error other than ENOENT is raised."""
    try:
        stat_at(dirfd, name)
    except FileNotFoundError:
        return False
    return True


@changing
def chmod_at(dirfd: int, name: bytes, mode: int, /) -> None:
    """Set permission bits; EOPNOTSUPP for a symbolic link, whose target is never touched.

    fchmodat2(2) exists since Linux 6.6; before, or where a filter forbids it, the mode goes through an O_PATH
    descriptor, which pins the object between the check and the change.
    """
    flags = AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH
    if _fchmodat2(_NR_FCHMODAT2, dirfd, component(name), mode & 0o7777, flags) == 0:
        return
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
        raise failed(name)
    _chmod_pinned(dirfd, name, mode & 0o7777)


def _chmod_pinned(dirfd: int, name: bytes, mode: int) -> None:
    if not name:
        _chmod_descriptor(dirfd, mode)
        return
    fd = open_confined(dirfd, name, os.O_PATH | os.O_NOFOLLOW, 0)
    try:
        _chmod_descriptor(fd, mode)
    finally:
        close(fd)


def _chmod_descriptor(fd: int, mode: int) -> None:
    # Some file systems (and old kernels) would change the mode of a symbolic link and then report a failure.
    if os.fstat(fd).st_mode & 0o170000 == 0o120000:
        raise oserror(errno.EOPNOTSUPP)
    os.chmod(through_proc(fd, b""), mode)


@changing
def chown_at(dirfd: int, name: bytes, uid: int, gid: int, /) -> None:
    """Set owner and group of the object itself; -1 keeps one.  Clears set-id bits and capabilities of files."""
    if name:
        os.chown(component(name), uid, gid, dir_fd=dirfd, follow_symlinks=False)
    else:
        os.chown(through_proc(dirfd, b""), uid, gid)


@changing
def utimens_at(dirfd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None, /) -> None:
    """Set the times of the object itself, in nanoseconds since 1970 or NOW; None keeps one."""
    atime = _SPECIAL_TIMES.get(atime_ns) or divmod(atime_ns or 0, 1_000_000_000)
    mtime = _SPECIAL_TIMES.get(mtime_ns) or divmod(mtime_ns or 0, 1_000_000_000)
    flags = AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH
    if _utimensat(dirfd, component(name), _TIMES.pack(*atime, *mtime), flags) < 0:
        raise failed(name)


@restarted
def birth_time(dirfd: int, name: bytes, /) -> int | None:
    """Return when an object was made, in nanoseconds since 1970; None where the file system does not record it."""
    found = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(dirfd, component(name), AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH, _STATX_BTIME, found) < 0:
        raise failed(name)
    (mask,) = struct.unpack_from("=I", found, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", found, 80)
    return seconds * 1_000_000_000 + nanoseconds if mask & _STATX_BTIME else None


@restarted
def get_file_attributes(fd: int, request: int, size: int, /) -> bytes:
    """Return the `size` bytes that an ioctl(2) reports about an open file without changing it, as FS_IOC_GETFLAGS."""
    return bytes(fcntl.ioctl(fd, request, bytes(size)))


@changing
def set_file_attributes(fd: int, request: int, value: bytes, /) -> None:
    """Change an open file by an ioctl(2) that takes a structure, as FS_IOC_SETFLAGS does."""
    fcntl.ioctl(fd, request, value)
