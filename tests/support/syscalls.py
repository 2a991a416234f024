"""System calls that Python lacks, implemented independently of the program so as not to repeat its mistakes."""

import ctypes
import os
import struct

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
_SUBREAPER = 36
_NEW_MOUNTS = 0x0002_0000
_RECURSIVE, _PRIVATE = 0x4000, 1 << 18
_DUMPABLE = 4
_AT_FDCWD = -100
_AT_SYMLINK_FOLLOW = 0x400
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, *paths: bytes) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *(os.fsdecode(path) for path in paths[:1]))


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """Rename with flags; the paths are relative to descriptors of directories."""
    _check(_libc.renameat2(old_dir, old, new_dir, new, flags), old)


def mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
    """mount(2), without an intermediate program."""
    _check(_libc.mount(source, target, kind, flags, data), target)


def umount(target: bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target, flags), target)


def unshare(flags: int) -> None:
    """unshare(2), which Python has since 3.12; a process that changed its ids can write its id maps then (prctl(2))."""
    _check(_libc.prctl(_DUMPABLE, 1, 0, 0, 0))
    _check(_libc.unshare(flags))


def own_mounts() -> None:
    """Enter a private mount namespace: mounts made in it are not visible outside, and the reverse."""
    unshare(_NEW_MOUNTS)
    mount(b"none", b"/", b"none", _RECURSIVE | _PRIVATE, b"")


def link_descriptor(fd: int, path: bytes) -> None:
    """Give an open file a name, by linkat(2); os.link does not follow the symbolic link in /proc."""
    _check(_libc.linkat(_AT_FDCWD, b"/proc/self/fd/%d" % fd, _AT_FDCWD, path, _AT_SYMLINK_FOLLOW), path)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode, which posix_fallocate(3) lacks and would imitate."""
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    _check(_libc.syncfs(fd))


def birth_time(fd: int) -> int | None:
    """Return when an open file was made, in nanoseconds, by statx(2); None if unknown."""
    found = ctypes.create_string_buffer(256)
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, found))
    mask, seconds, part = (struct.unpack_from(code, found, at)[0] for code, at in (("I", 0), ("q", 80), ("I", 88)))
    return seconds * 10**9 + part if mask & _STATX_BTIME else None


def become_subreaper() -> None:
    """Make orphans below this process its children, so that it can wait for daemons by their pid."""
    _check(_libc.prctl(_SUBREAPER, 1, 0, 0, 0))
