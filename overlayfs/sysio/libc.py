"""The C library through ctypes, and what all parts of `sysio` need to call it.

System calls without a wrapper in every supported C library are made by ``syscall``.  Their numbers from 424 on are the
same on every architecture.
"""

import ctypes
import errno
import functools
from collections.abc import Callable
from typing import Any

from overlayfs.errors import oserror

AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


def function(symbol: str, *arguments: Any) -> Callable[..., int]:
    """Return a function of the C library that returns -1 on failure; `arguments` are its ctypes argument types."""
    # Indexing makes a new object each time, so that one symbol (syscall) can have several signatures.
    made = _libc[symbol]
    made.argtypes = arguments
    made.restype = ctypes.c_long if symbol == "syscall" else ctypes.c_int
    return made


def failed(name: bytes | None = None) -> OSError:
    """Return the error of the last call in this thread that failed."""
    return oserror(ctypes.get_errno(), name)


@functools.lru_cache(maxsize=4096)  # one operation checks the same names several times
def component(name: bytes) -> bytes:
    """Return `name` if it is one component of a path, or empty; EINVAL otherwise.

    ctypes would cut a name at a NUL, and a slash or ".." would leave the directory: both are bugs or attacks.
    """
    if b"/" in name or b"\0" in name or name == b"..":
        raise oserror(errno.EINVAL, name)
    return name


@functools.lru_cache(maxsize=1024)
def through_proc(dirfd: int, name: bytes) -> bytes:
    """Return a path of the object for calls that take neither an O_PATH descriptor nor a directory descriptor.

    A magic link leads to the object itself, also for O_PATH, and its last step does not follow a symlink.
    """
    return b"/proc/self/fd/%d/%b" % (dirfd, component(name)) if name else b"/proc/self/fd/%d" % dirfd
