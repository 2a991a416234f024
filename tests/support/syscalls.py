"""System calls that Python has no name for, called apart from the product so as not to repeat its mistakes."""

import ctypes
import os

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
_SUBREAPER = 36

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


def become_subreaper() -> None:
    """Have orphans below this process become its children, so that it can wait for daemons by their pid."""
    _check(_libc.prctl(_SUBREAPER, 1, 0, 0, 0))
