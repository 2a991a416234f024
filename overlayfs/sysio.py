"""The only door to raw system calls.

Every function takes descriptors and bytes, and returns a value or raises `OSError`.

A *place* is the pair ``(dirfd, name)``.  `name` is ONE component, without a slash; it is never followed if it
is a symbolic link.  ``b""`` means the object behind the descriptor itself, which may be opened with O_PATH.
Paths of several components go through `open_beneath` alone, and that never leaves the directory it starts
from: openat2(2) refuses symbolic links, magic links, mount points and ``..`` above the start.
Descriptors made here are close-on-exec.  Modes are subject to the process's umask, which a daemon sets to 0.

Calls that change something announce themselves to `fuse`, which a test replaces to make the n-th one fail.
A call that a signal has interrupted is made again: where the interpreter does so by itself (PEP 475 has the list) it
is left to it.

Sources: the manual pages openat2(2), renameat2(2), name_to_handle_at(2), fchmodat(2), utimensat(2),
getdents(2), xattr(7), copy_file_range(2), ioctl_ficlone(2), preadv2(2), statfs(2); for ioctl numbers
``include/uapi/linux/fs.h``, ``fs/ext4/ext4.h``, ``fs/xfs/libxfs/xfs_fs.h``, ``include/uapi/linux/btrfs.h``.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

from overlayfs.errors import oserror

P = ParamSpec("P")
R = TypeVar("R")

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

fuse: Callable[[str], None] | None = None
"""Called with the name of each changing call before it acts; what it raises is what the call raises."""


class Guard(Protocol):
    """Told when a changing call begins and ends, in any thread; `end` may wait before it lets the caller go on."""

    def begin(self) -> None:
        """A call is about to be made."""

    def end(self) -> None:
        """It is back."""


guard: Guard | None = None
"""Whoever wants to know that a changing call takes long: a disk may be slow, or its file system frozen."""


def _changing(call: Callable[P, R], announced: str = "") -> Callable[P, R]:
    """Announce a changing call, and make it again when a signal has interrupted it."""
    name = announced or call.__name__

    @functools.wraps(call)
    def changing(*args: P.args, **keywords: P.kwargs) -> R:
        watching = guard
        if watching is not None:
            watching.begin()
        try:
            while True:
                try:
                    if fuse is not None:
                        fuse(name)
                    return call(*args, **keywords)
                except InterruptedError:
                    continue
        finally:
            if watching is not None:
                watching.end()

    return changing


def _restarted(call: Callable[P, R]) -> Callable[P, R]:
    """Make a call again when a signal has interrupted it: disks never do that, but a layer may lie on FUSE or CIFS."""

    @functools.wraps(call)
    def restarted(*args: P.args, **keywords: P.kwargs) -> R:
        while True:
            try:
                return call(*args, **keywords)
            except InterruptedError:
                continue

    return restarted


# --- the C library -----------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_Function = Callable[..., int]

# System calls without a wrapper in every supported C library.  Numbers from 424 on are the same everywhere.
_NR_OPENAT2 = 437
_NR_FCHMODAT2 = 452
_NR_GETXATTRAT = 464
_NR_LISTXATTRAT = 465

_AT_SYMLINK_NOFOLLOW = 0x100
_AT_SYMLINK_FOLLOW = 0x400
_AT_EMPTY_PATH = 0x1000

_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_CONFINED = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH

_O_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY
_TAKES_MODE = os.O_CREAT | _O_TMPFILE_BIT  # openat2 answers EINVAL to a mode without one of these
_OPEN_CHANGES = os.O_CREAT | os.O_TRUNC | _O_TMPFILE_BIT


def _function(symbol: str, *arguments: Any) -> _Function:
    # Indexing makes a new object each time, so that one symbol (syscall) can have several signatures.
    made = _libc[symbol]
    made.argtypes = arguments
    made.restype = ctypes.c_long if symbol == "syscall" else ctypes.c_int
    return made


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _XattrArguments(ctypes.Structure):
    _fields_ = (("value", ctypes.c_uint64), ("size", ctypes.c_uint32), ("flags", ctypes.c_uint32))


_XATTR_ARGUMENTS_SIZE = ctypes.sizeof(_XattrArguments)

_openat2 = _function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)
_fchmodat2 = _function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_int)
_getxattrat = _function(
    "syscall",
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_char_p,
    ctypes.POINTER(_XattrArguments),
    ctypes.c_size_t,
)
_listxattrat = _function(
    "syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)
_renameat2 = _function("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_linkat = _function("linkat", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_utimensat = _function("utimensat", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
_getdents64 = _function("getdents64", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_fstatfs = _function("fstatfs", ctypes.c_int, ctypes.c_void_p)
_syncfs = _function("syncfs", ctypes.c_int)
_name_to_handle_at = _function(
    "name_to_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int
)


def _failed(name: bytes | None = None) -> OSError:
    return oserror(ctypes.get_errno(), name)


def _component(name: bytes) -> bytes:
    # ctypes would cut a name at a NUL, and a slash or ".." would leave the directory: both are bugs or attacks.
    if b"/" in name or b"\0" in name or name == b"..":
        raise oserror(errno.EINVAL, name)
    return name


def _through_proc(dirfd: int, name: bytes) -> bytes:
    # A magic link leads to the object itself, also for O_PATH, and its last step does not follow a symlink.
    return b"/proc/self/fd/%d/%b" % (dirfd, _component(name)) if name else b"/proc/self/fd/%d" % dirfd


# --- opening -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _how(flags: int, mode: int) -> _OpenHow:
    # The kernel only reads it, so one object may serve several threads at once.
    return _OpenHow(flags | os.O_CLOEXEC, mode & 0o7777 if flags & _TAKES_MODE else 0, _CONFINED)


_HOW_SIZE = ctypes.sizeof(_OpenHow)
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_LONGEST_WALK = 4000  # PATH_MAX is 4096 with the final NUL


@_restarted
def _open(dirfd: int, path: bytes, flags: int, mode: int) -> int:
    fd = _openat2(_NR_OPENAT2, dirfd, path, _how(flags, mode), _HOW_SIZE)
    if fd < 0:
        raise _failed(path)
    return fd


def _reopen(fd: int, flags: int, mode: int) -> int:
    return os.open(_through_proc(fd, b""), (flags | os.O_CLOEXEC) & ~os.O_NOFOLLOW, mode)


_open_changing = _changing(_open, "open")
_reopen_changing = _changing(_reopen, "open")


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
    an escape through ``..``.  `mode` counts with O_CREAT or O_TMPFILE only.
    """
    if b"\0" in path:
        raise oserror(errno.EINVAL, path)
    *leading, last = _chunks(path)
    current = dirfd
    try:
        for chunk in leading:
            current, previous = _open(current, chunk, _WALK, 0), current
            if previous != dirfd:
                close(previous)
        return (_open_changing if flags & _OPEN_CHANGES else _open)(current, last or b".", flags, mode)
    finally:
        if current != dirfd:
            close(current)


def open_child(dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
    """Open one child without following it; ``b""`` opens the descriptor's own object anew.

    ELOOP for a symbolic link unless O_PATH is asked, EXDEV for a mount point.
    """
    changes = flags & _OPEN_CHANGES
    if name:
        return (_open_changing if changes else _open)(dirfd, _component(name), flags | os.O_NOFOLLOW, mode)
    return (_reopen_changing if changes else _reopen)(dirfd, flags, mode)


def close(fd: int) -> None:
    """Close a descriptor, which it is afterwards whatever is reported (close(2)): only EBADF, a defect, is raised.

    What is written is synced where it counts; `flush` is for those who want to hear what a close reports.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


@_restarted
def flush(fd: int) -> None:
    """Raise what the file system reports when an open file is closed, as NFS and quotas do; it stays open."""
    os.close(os.dup(fd))


# --- looking -----------------------------------------------------------------------------------------------


@_restarted
def stat_at(dirfd: int, name: bytes) -> os.stat_result:
    """Return the attributes of the object itself, as lstat does.  A mount point answers for what is mounted."""
    if name:
        return os.stat(_component(name), dir_fd=dirfd, follow_symlinks=False)
    return os.fstat(dirfd)


def exists_at(dirfd: int, name: bytes) -> bool:
    """Return whether a name exists, whatever it is; an error other than ENOENT is raised."""
    try:
        stat_at(dirfd, name)
    except FileNotFoundError:
        return False
    return True


def statvfs_fd(fd: int) -> os.statvfs_result:
    """Return capacity and limits of the file system behind any descriptor."""
    return os.fstatvfs(fd)


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
        return _open(dirfd, b".", flags | os.O_NOATIME, 0)
    except PermissionError:  # O_NOATIME is for the owner and root (open(2))
        return _open(dirfd, b".", flags, 0)


@_restarted
def list_dir(dirfd: int) -> list[tuple[bytes, int]]:
    """Return (name, type) of each entry but ``.`` and ``..``, in the order of the file system.

    The type is the S_IFMT part of the mode, or 0 where the file system does not tell and a stat is needed.
    The access time stays where it may. `dirfd` may be opened with O_PATH; its own offset is neither used nor moved.
    """
    fd = _open_listing(dirfd)
    buffer = ctypes.create_string_buffer(_LISTING)
    found: list[tuple[bytes, int]] = []
    try:
        while (size := _getdents64(fd, buffer, _LISTING)) > 0:
            found.extend(_entries(ctypes.string_at(buffer, size)))
        if size < 0:
            raise _failed()
    finally:
        close(fd)
    return [entry for entry in found if entry[0] not in _DOTS]


@_restarted
def readlink_at(dirfd: int, name: bytes) -> bytes:
    """Return the target of a symbolic link; ``b""`` needs a descriptor opened with O_PATH | O_NOFOLLOW."""
    return os.readlink(_component(name), dir_fd=dirfd)


# --- names -------------------------------------------------------------------------------------------------


@_changing
def mkdir_at(dirfd: int, name: bytes, mode: int) -> None:
    """Make a directory.  mkdir(2) ignores S_ISUID and S_ISGID: set them with `chmod_at`."""
    os.mkdir(_component(name), mode, dir_fd=dirfd)


@_changing
def mknod_at(dirfd: int, name: bytes, mode: int, rdev: int) -> None:
    """Make a regular file, FIFO, socket or device; `mode` holds type and permissions."""
    os.mknod(_component(name), mode, rdev, dir_fd=dirfd)


@_changing
def symlink_at(target: bytes, dirfd: int, name: bytes) -> None:
    """Make a symbolic link `name` holding `target`, which is not looked at."""
    if b"\0" in target:
        raise oserror(errno.EINVAL, target)
    os.symlink(target, _component(name), dir_fd=dirfd)


@_changing
def link_at(src_dirfd: int, src_name: bytes, dirfd: int, name: bytes) -> None:
    """Give an object one more name.  An empty `src_name` links the descriptor, O_TMPFILE and O_PATH included.

    The descriptor goes through /proc because AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH (linkat(2)).
    """
    source = _component(src_name) or _through_proc(src_dirfd, b"")
    flags = 0 if src_name else _AT_SYMLINK_FOLLOW
    if _linkat(src_dirfd, source, dirfd, _component(name), flags) < 0:
        raise _failed(name)


@_changing
def unlink_at(dirfd: int, name: bytes) -> None:
    """Remove a name that is not a directory's."""
    os.unlink(_component(name), dir_fd=dirfd)


@_changing
def rmdir_at(dirfd: int, name: bytes) -> None:
    """Remove an empty directory."""
    os.rmdir(_component(name), dir_fd=dirfd)


@_changing
def rename_at(sdirfd: int, sname: bytes, ddirfd: int, dname: bytes, flags: int = 0) -> None:
    """Move a name in one step; `flags` are the RENAME_* constants of renameat2(2)."""
    if _renameat2(sdirfd, _component(sname), ddirfd, _component(dname), flags) < 0:
        raise _failed(sname)


# --- attributes --------------------------------------------------------------------------------------------


@_changing
def chmod_at(dirfd: int, name: bytes, mode: int) -> None:
    """Set permission bits; EOPNOTSUPP for a symbolic link, whose target is never touched.

    fchmodat2(2) exists since Linux 6.6; before, or where a filter forbids it, the mode goes through an O_PATH
    descriptor, which pins the object between the check and the change.
    """
    flags = _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH
    if _fchmodat2(_NR_FCHMODAT2, dirfd, _component(name), mode & 0o7777, flags) == 0:
        return
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
        raise _failed(name)
    _chmod_pinned(dirfd, name, mode & 0o7777)


def _chmod_pinned(dirfd: int, name: bytes, mode: int) -> None:
    if not name:
        _chmod_descriptor(dirfd, mode)
        return
    fd = _open(dirfd, name, os.O_PATH | os.O_NOFOLLOW, 0)
    try:
        _chmod_descriptor(fd, mode)
    finally:
        close(fd)


def _chmod_descriptor(fd: int, mode: int) -> None:
    # Some file systems (and old kernels) would change the mode of a symbolic link and then report a failure.
    if os.fstat(fd).st_mode & 0o170000 == 0o120000:
        raise oserror(errno.EOPNOTSUPP)
    os.chmod(_through_proc(fd, b""), mode)


@_changing
def chown_at(dirfd: int, name: bytes, uid: int, gid: int) -> None:
    """Set owner and group of the object itself; -1 keeps one.  Clears set-id bits and capabilities of files."""
    if name:
        os.chown(_component(name), uid, gid, dir_fd=dirfd, follow_symlinks=False)
    else:
        os.chown(_through_proc(dirfd, b""), uid, gid)


NOW = 1 << 62
"""As a time: the clock of the file system, which lags behind `time.time_ns` and may not run ahead of other files'."""

_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2


_TIMES = struct.Struct("=qqqq")  # two of struct timespec: seconds, nanoseconds


def _timespec(nanoseconds: int | None) -> tuple[int, int]:
    if nanoseconds is None:
        return 0, _UTIME_OMIT
    if nanoseconds == NOW:
        return 0, _UTIME_NOW
    return divmod(nanoseconds, 1_000_000_000)


@_changing
def utimens_at(dirfd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set the times of the object itself, in nanoseconds since 1970 or NOW; None keeps one."""
    times = _TIMES.pack(*_timespec(atime_ns), *_timespec(mtime_ns))
    flags = _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH
    if _utimensat(dirfd, _component(name), times, flags) < 0:
        raise _failed(name)


# --- extended attributes -----------------------------------------------------------------------------------


_USUAL_VALUE = 256
_Value = ctypes.c_char * _USUAL_VALUE
_NO_ATTRIBUTE = (errno.ENODATA, errno.EOPNOTSUPP)


def _has_getxattrat() -> bool:
    # An impossible descriptor: EBADF where the call exists, ENOSYS or EPERM (a filter) where it does not.
    _getxattrat(_NR_GETXATTRAT, -1, b".", 0, b"user.x", _XattrArguments(0, 0, 0), _XATTR_ARGUMENTS_SIZE)
    return ctypes.get_errno() == errno.EBADF


_HAS_GETXATTRAT = _has_getxattrat()


def _get_at(dirfd: int, name: bytes, attr: bytes) -> bytes | int:
    # getxattrat(2), since Linux 6.13, takes half the time of a walk through /proc.  It refuses an O_PATH
    # descriptor but not the name "." below it; whatever fails here is asked again through /proc.
    value = _Value()
    arguments = _XattrArguments(ctypes.addressof(value), _USUAL_VALUE, 0)
    size = _getxattrat(
        _NR_GETXATTRAT, dirfd, name or b".", _AT_SYMLINK_NOFOLLOW, attr, arguments, _XATTR_ARGUMENTS_SIZE
    )
    if size >= 0:
        return value.raw[:size]
    return ctypes.get_errno()


@_restarted
def getxattr_at(dirfd: int, name: bytes, attr: bytes) -> bytes:
    """Return the value of an extended attribute; ENODATA when there is none."""
    return os.getxattr(_through_proc(dirfd, name), attr, follow_symlinks=not name)


def find_xattr(dirfd: int, name: bytes, attr: bytes) -> bytes | None:
    """Return the value, or None when the object has none or the file system knows no such attributes."""
    if _HAS_GETXATTRAT:
        answer = _get_at(dirfd, _component(name), attr)
        if isinstance(answer, bytes):
            return answer
        if answer in _NO_ATTRIBUTE:
            return None
    try:
        return getxattr_at(dirfd, name, attr)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTE:
            return None
        raise


@_restarted
def listxattr_at(dirfd: int, name: bytes) -> list[bytes]:
    """Return the names of all extended attributes that the caller may see."""
    if _HAS_GETXATTRAT and name:  # listxattrat(2) came with it
        names = _Value()
        size = _listxattrat(_NR_LISTXATTRAT, dirfd, _component(name), _AT_SYMLINK_NOFOLLOW, names, _USUAL_VALUE)
        if size >= 0:
            return names.raw[:size].split(b"\0")[:-1]
    try:
        return [os.fsencode(attr) for attr in os.listxattr(_through_proc(dirfd, name), follow_symlinks=not name)]
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise


@_changing
def setxattr_at(dirfd: int, name: bytes, attr: bytes, value: bytes, flags: int = 0) -> None:
    """Set an extended attribute; `flags` may be os.XATTR_CREATE or os.XATTR_REPLACE."""
    os.setxattr(_through_proc(dirfd, name), attr, value, flags, follow_symlinks=not name)


@_changing
def removexattr_at(dirfd: int, name: bytes, attr: bytes) -> None:
    """Remove an extended attribute; ENODATA when there is none."""
    os.removexattr(_through_proc(dirfd, name), attr, follow_symlinks=not name)


# --- data --------------------------------------------------------------------------------------------------

_FICLONE = 0x40049409
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_CANNOT_COPY_RANGE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
_RANGE = 64 * 1024 * 1024  # a frozen or killed copy is noticed between two of these
_BLOCK = 1024 * 1024


@_changing
def clone_file(src_fd: int, dst_fd: int) -> bool:
    """Share all data of `src_fd` with `dst_fd` (FICLONE); False where the file systems cannot."""
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


@_changing
def copy_data(src_fd: int, dst_fd: int, size: int) -> int:
    """Copy the first `size` bytes into an empty file, or a hole, keep holes, set its size; return the data in bytes.

    A source that has shrunk meanwhile ends in a hole.  The offset of `src_fd` moves.
    """
    copied = sum(_copy_extent(src_fd, dst_fd, start, end) for start, end in _extents(src_fd, size))
    os.ftruncate(dst_fd, size)
    return copied


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    start, end = next_data(fd, 0)
    while start < min(end, size):
        yield start, min(end, size)
        start, end = next_data(fd, end)


def next_data(fd: int, offset: int) -> tuple[int, int]:
    """Return where the next data at or after `offset` begins, and where a hole follows it.

    Where none is left, twice the size of the file; all the rest of it where the file system cannot tell.
    """
    try:
        start = seek_data(fd, offset, os.SEEK_DATA)
        return start, seek_data(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EINVAL):
            raise
        size = os.fstat(fd).st_size
        return size if error.errno == errno.ENXIO else offset, size


def _copy_extent(src_fd: int, dst_fd: int, start: int, end: int) -> int:
    at = start
    while at < end:
        try:
            done = os.copy_file_range(src_fd, dst_fd, min(end - at, _RANGE), at, at)
        except OSError as error:
            if error.errno not in _CANNOT_COPY_RANGE:
                raise
            done = 0
        if done == 0:  # also what some file systems say instead of an error
            return at - start + _copy_blocks(src_fd, dst_fd, at, end)
        at += done
    return at - start


def _copy_blocks(src_fd: int, dst_fd: int, start: int, end: int) -> int:
    at = start
    while at < end and (data := os.pread(src_fd, min(end - at, _BLOCK), at)):
        at += _write_all(dst_fd, at, data)
    return at - start


def _write_all(fd: int, offset: int, data: bytes | bytearray | memoryview) -> int:
    done = os.pwrite(fd, data, offset)
    if done == len(data):
        return done
    left = memoryview(data)[done:]
    while left:
        step = os.pwrite(fd, left, offset + done)
        done, left = done + step, left[step:]
    return done


@_changing
def write_at(fd: int, offset: int, data: bytes | bytearray | memoryview) -> int:
    """Write all of `data` at `offset`; return its length.  An error after a part has been written is raised."""
    return _write_all(fd, offset, data)


def read_at(fd: int, offset: int, size: int, nowait: bool = False) -> bytes:
    """Read up to `size` bytes at `offset`; fewer only at the end of the file.

    A short answer means the end of the file to FUSE, so a read cut short by an error goes on and raises it.
    With `nowait`, BlockingIOError when not all of it is in memory (RWF_NOWAIT); where the file system does not
    know the flag the read is a plain one.
    """
    if nowait:
        buffer = memoryview(bytearray(size))
        return bytes(buffer[: fill_at(fd, offset, buffer)])
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def fill_at(fd: int, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` with what is in memory, as `read_at` with `nowait` does; return how many bytes came.

    A buffer that is used again saves a large read the fresh pages, which cost as much as the copying.
    """
    done = step = _fill_once(fd, offset, buffer)
    while step and done < len(buffer):
        step = _fill_once(fd, offset + done, buffer[done:])
        done += step
    return done


def _fill_once(fd: int, offset: int, buffer: memoryview) -> int:
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return os.preadv(fd, [buffer], offset)
        raise


def read_into(fd: int, buffer: memoryview | bytearray, offset: int) -> int:
    """Fill `buffer` from `offset` on; return how many bytes came, which may be fewer, and 0 at the end of the file."""
    return os.preadv(fd, [buffer], offset)


@_changing
def truncate_fd(fd: int, size: int) -> None:
    """Set the size of an open file."""
    os.ftruncate(fd, size)


@_changing
def fsync(fd: int) -> None:
    """Make data and attributes of an open file, or the names of a directory, durable."""
    os.fsync(fd)


@_changing
def fdatasync(fd: int) -> None:
    """Make the data of an open file durable, with what is needed to read it back."""
    os.fdatasync(fd)


@_changing
def syncfs(fd: int) -> None:
    """Make the whole file system behind a descriptor durable.  O_PATH descriptors give EBADF."""
    if _syncfs(fd) < 0:
        raise _failed()


# --- identity ----------------------------------------------------------------------------------------------

_HANDLE = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type, then the handle
_MAX_HANDLE = 128
_NO_HANDLE = (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM)


@_restarted
def file_handle(dirfd: int, name: bytes) -> tuple[int, bytes] | None:
    """Return (type, bytes) of the handle by which the file system names the object for ever, or None."""
    buffer = ctypes.create_string_buffer(_HANDLE.pack(_MAX_HANDLE, 0), _HANDLE.size + _MAX_HANDLE)
    mount_id = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    if _name_to_handle_at(dirfd, _component(name), buffer, ctypes.byref(mount_id), flags) < 0:
        if ctypes.get_errno() in _NO_HANDLE:
            return None
        raise _failed(name)
    size, kind = _HANDLE.unpack_from(buffer)
    return kind, buffer.raw[_HANDLE.size : _HANDLE.size + size]


# Request number, bytes prepared for it, where the 16 bytes of the uuid lie in the answer.
_UUID_QUERIES = (
    (0x80111500, bytes(17), 1),  # FS_IOC_GETFSUUID, Linux 6.9, every file system that has one
    (0x8008662C, struct.pack("=II", 16, 0) + bytes(16), 8),  # EXT4_IOC_GETFSUUID
    (0x80705864, bytes(112), 64),  # XFS_IOC_FSGEOMETRY_V1
    (0x8400941F, bytes(1024), 16),  # BTRFS_IOC_FS_INFO
)


def fs_uuid(fd: int) -> bytes | None:
    """Return the 16 bytes by which the kernel knows the file system, or None when they cannot be asked for.

    They may be zeros although the disk has a uuid: the kernel then writes zeros into file handles too.
    """
    try:
        own = os.open(_through_proc(fd, b""), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # ioctl refuses O_PATH
    except OSError:
        return None
    try:
        answers = (_uuid_by(own, *query) for query in _UUID_QUERIES)
        return next((uuid for uuid in answers if uuid is not None), None)
    finally:
        close(own)


def _uuid_by(fd: int, request: int, prepared: bytes, at: int) -> bytes | None:
    try:
        answer = fcntl.ioctl(fd, request, prepared)
    except OSError:
        return None
    return answer[at : at + 16]


_STATFS_SIZE = 256  # larger than any architecture's struct statfs
_FSID_AT = 56  # after f_type, f_bsize and five counters of 64 bits


@_restarted
def _statfs(fd: int) -> bytes:
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _fstatfs(fd, buffer) < 0:
        raise _failed()
    return buffer.raw


def fs_type(fd: int) -> int:
    """Return the magic number of the file system's type, ``f_type`` of statfs(2)."""
    return int.from_bytes(_statfs(fd)[:8], "little")


def fs_id(fd: int) -> int:
    """Return ``f_fsid`` of statfs(2), 64 bits: equal for two descriptors of one file system (btrfs: subvolume)."""
    return int.from_bytes(_statfs(fd)[_FSID_AT : _FSID_AT + 8], "little")


def access_mode(fd: int) -> int:
    """Return how a file was opened: O_RDONLY, O_WRONLY or O_RDWR."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def keep_atime(fd: int) -> None:
    """Let reads through an open file move no access time any more, where we may ask for it (O_NOATIME in open(2))."""
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
    """Take the flock(2) of an open file, waiting for it as long as it takes."""
    fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


_NR_OPEN_TREE = 428
_NR_MOUNT_SETATTR = 442
_OPEN_TREE_CLONE = 1
_MADE_PRIVATE = struct.pack("=QQQQ", 0, 0, 1 << 18, 0)  # struct mount_attr: set, clear, propagation MS_PRIVATE, userns
_mount_setattr = _function(
    "syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t
)
_open_tree = _function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def clone_mount(fd: int) -> int | None:
    """Return a descriptor of the same directory in a private copy of its mount, without what is mounted inside.

    open_tree(2), mount_setattr(2); needs CAP_SYS_ADMIN: None where it is not to be had. Links and renames between
    two copies are EXDEV.
    """
    clone = _open_tree(_NR_OPEN_TREE, fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
    if clone < 0:
        return None
    # A copy of a shared mount would receive what is mounted in the original later on (mount_namespaces(7)).
    if _mount_setattr(_NR_MOUNT_SETATTR, clone, b"", _AT_EMPTY_PATH, _MADE_PRIVATE, len(_MADE_PRIVATE)) < 0:
        close(clone)
        return None
    return clone


_open_by_handle_at = _function("open_by_handle_at", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


@_restarted
def open_by_handle(fd: int, kind: int, handle: bytes) -> int | None:
    """Return an O_PATH descriptor of the object that a handle names on the file system of `fd`.

    None when it is gone, or without CAP_DAC_READ_SEARCH (open_by_handle_at(2)).
    """
    buffer = ctypes.create_string_buffer(_HANDLE.pack(len(handle), kind) + handle, _HANDLE.size + len(handle))
    own = os.open(_through_proc(fd, b""), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_PATH gives EBADF
    try:
        found = _open_by_handle_at(own, buffer, os.O_PATH | os.O_CLOEXEC)
    finally:
        close(own)
    return found if found >= 0 else None


# --- space and flags of open files ---------------------------------------------------------------------------

_fallocate = _function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@_changing
def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch, zero, collapse or insert a range of an open file; `mode` as in fallocate(2)."""
    if _fallocate(fd, mode, offset, length) < 0:
        raise _failed()


@_restarted
def seek_data(fd: int, offset: int, whence: int) -> int:
    """Return where data (SEEK_DATA) or a hole (SEEK_HOLE) begins at or after `offset`; ENXIO beyond the end."""
    return os.lseek(fd, offset, whence)


@_changing
def copy_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> int:
    """Copy up to `length` bytes between open files, shared where the file system can; return how many were.

    Where copy_file_range(2) cannot serve the pair the first block goes by read and write.
    """
    try:
        return os.copy_file_range(src_fd, dst_fd, length, src_offset, dst_offset)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_RANGE:
            raise
    data = os.pread(src_fd, min(length, _BLOCK), src_offset)
    return _write_all(dst_fd, dst_offset, data)


_STATX_BTIME = 0x800
_STATX_SIZE = 256
_statx = _function("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


@_restarted
def birth_time(dirfd: int, name: bytes) -> int | None:
    """Return when an object was made, in nanoseconds since 1970; None where the file system does not know."""
    found = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(dirfd, _component(name), _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH, _STATX_BTIME, found) < 0:
        raise _failed(name)
    (mask,) = struct.unpack_from("=I", found, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", found, 80)
    return seconds * 1_000_000_000 + nanoseconds if mask & _STATX_BTIME else None


@_restarted
def get_file_attributes(fd: int, request: int, size: int) -> bytes:
    """Return what an ioctl(2) that only reads says of an open file: `size` bytes."""
    return bytes(fcntl.ioctl(fd, request, bytes(size)))


@_changing
def set_file_attributes(fd: int, request: int, value: bytes) -> None:
    """Change an open file by an ioctl(2) that takes a structure, as FS_IOC_SETFLAGS does."""
    fcntl.ioctl(fd, request, value)


# --- the process -------------------------------------------------------------------------------------------

CAP_FSETID = 4
_CAPABILITY_VERSION_3 = 0x20080522
_capget = _function("capget", ctypes.c_char_p, ctypes.c_void_p)
_capset = _function("capset", ctypes.c_char_p, ctypes.c_char_p)
_OF_THIS_THREAD = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
_CAPABILITIES = struct.Struct("=6I")  # effective, permitted, inheritable; twice, the low 32 first (capget(2))


class WithoutCapability:
    """A context, to be entered again and again, that leaves a capability out of the thread's effective set.

    The set is read once, when the context is made: it must be made and entered in threads with equal sets.
    """

    def __init__(self, number: int) -> None:
        found = ctypes.create_string_buffer(_CAPABILITIES.size)
        if _capget(_OF_THIS_THREAD, found) < 0:
            raise _failed()
        self._before = found.raw[: _CAPABILITIES.size]
        effective, *rest = _CAPABILITIES.unpack(self._before)
        self._reduced = _CAPABILITIES.pack(effective & ~(1 << number), *rest)

    def __enter__(self) -> None:
        if _capset(_OF_THIS_THREAD, self._reduced) < 0:
            raise _failed()

    def __exit__(self, *_: object) -> None:
        _capset(_OF_THIS_THREAD, self._before)
