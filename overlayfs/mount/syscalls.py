"""mount(2) and umount2(2), which the standard library does not have. What they change is no layer (see sysio)."""

import ctypes

from overlayfs.errors import oserror

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def mount(source: bytes, point: bytes, kind: bytes, flags: int = 0, data: bytes | None = None) -> None:
    """Mount a file system of a kind at a point; `flags` are the MS_* numbers of mount(2). OSError as mount(2)."""
    if _libc.mount(source, point, kind, flags, data) < 0:
        raise oserror(ctypes.get_errno(), point)


def umount(point: bytes, flags: int = 0) -> None:
    """Take away what is uppermost at a point; OSError as umount2(2)."""
    if _libc.umount2(point, flags) < 0:
        raise oserror(ctypes.get_errno(), point)
