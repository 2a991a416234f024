"""System calls on mounts that the standard library lacks. Those on layers are in overlayfs.sysio."""

import ctypes
import os
import struct

from overlayfs.errors import oserror

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_NR_CLOSE_RANGE = 436
_CLOSE_RANGE_UNSHARE = 2
_FIRST_OF_OURS = 3
_LAST = 0xFFFF_FFFF

_HANDLE = struct.Struct("=IiIII")  # struct file_handle with the handle that fuse_encode_fh of fs/fuse/inode.c writes
_HANDLE_SIZE = 12
_FILEID_INO64_GEN = 0x81
_GENERATION = 0  # of every node in our replies

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def mount(source: bytes, point: bytes, kind: bytes, flags: int = 0, data: bytes | None = None) -> None:
    """Mount a file system of type `kind`; `flags` are the MS_* numbers of mount(2). OSError as mount(2)."""
    if _libc.mount(source, point, kind, flags, data) < 0:
        raise oserror(ctypes.get_errno(), point)


def umount(point: bytes, flags: int = 0) -> None:
    """Unmount what is uppermost on `point`; `flags` are those of umount2(2). OSError as umount2(2)."""
    if _libc.umount2(point, flags) < 0:
        raise oserror(ctypes.get_errno(), point)


def unshare_descriptors() -> None:
    """Give this thread a descriptor table of its own, with the standard streams only.

    OSError as close_range(2) with CLOSE_RANGE_UNSHARE; ENOSYS before Linux 5.9.
    """
    numbers = map(ctypes.c_uint, (_FIRST_OF_OURS, _LAST, _CLOSE_RANGE_UNSHARE))
    if _libc.syscall(ctypes.c_long(_NR_CLOSE_RANGE), *numbers) < 0:
        raise oserror(ctypes.get_errno())


def open_inode(directory: int, number: int) -> int:
    """Open the file with a node id on the FUSE mount of `directory` for reading; return the descriptor.

    OSError as open_by_handle_at(2): ESTALE if the kernel does not know the node, EPERM without CAP_DAC_READ_SEARCH.
    """
    handle = _HANDLE.pack(_HANDLE_SIZE, _FILEID_INO64_GEN, number >> 32, number & _LAST, _GENERATION)
    found: int = _libc.open_by_handle_at(directory, handle, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if found < 0:
        raise oserror(ctypes.get_errno())
    return found
