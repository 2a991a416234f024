"""File systems: capacity, type, identity, file handles, copies of a mount.

Sources: statfs(2), name_to_handle_at(2), open_tree(2); for ioctl numbers ``include/uapi/linux/fs.h``,
``fs/ext4/ext4.h``, ``fs/xfs/libxfs/xfs_fs.h``, ``include/uapi/linux/btrfs.h``.
"""

import ctypes
import errno
import fcntl
import os
import struct

from overlayfs.sysio.calls import restarted
from overlayfs.sysio.descriptors import close
from overlayfs.sysio.libc import AT_EMPTY_PATH, component, failed, function, through_proc

_fstatfs = function("fstatfs", ctypes.c_int, ctypes.c_void_p)
_STATFS_SIZE = 256  # larger than any architecture's struct statfs
_FSID_AT = 56  # after f_type, f_bsize and five counters of 64 bits


def statvfs_fd(fd: int) -> os.statvfs_result:
    """Return capacity and limits of the file system behind any descriptor."""
    return os.fstatvfs(fd)


@restarted
def _statfs(fd: int, /) -> bytes:
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _fstatfs(fd, buffer) < 0:
        raise failed()
    return buffer.raw


def fs_type(fd: int) -> int:
    """Return the magic number of the file system's type, ``f_type`` of statfs(2)."""
    return int.from_bytes(_statfs(fd)[:8], "little")


def fs_id(fd: int) -> int:
    """Return ``f_fsid`` of statfs(2), 64 bits: equal for two descriptors of one file system (btrfs: subvolume)."""
    return int.from_bytes(_statfs(fd)[_FSID_AT : _FSID_AT + 8], "little")


# Request number, bytes prepared for it, offset of the 16 bytes of the uuid in the answer.
_UUID_QUERIES = (
    (0x80111500, bytes(17), 1),  # FS_IOC_GETFSUUID, Linux 6.9, every file system that has one
    (0x8008662C, struct.pack("=II", 16, 0) + bytes(16), 8),  # EXT4_IOC_GETFSUUID
    (0x80705864, bytes(112), 64),  # XFS_IOC_FSGEOMETRY_V1
    (0x8400941F, bytes(1024), 16),  # BTRFS_IOC_FS_INFO
)


def fs_uuid(fd: int) -> bytes | None:
    """Return the 16 bytes by which the kernel identifies the file system, or None where it does not report them.

    They may be zeros although the disk has a uuid: the kernel then writes zeros into file handles too.
    """
    try:
        own = os.open(through_proc(fd, b""), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # ioctl refuses O_PATH
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


# --- file handles ------------------------------------------------------------------------------------------

_name_to_handle_at = function(
    "name_to_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int
)
_open_by_handle_at = function("open_by_handle_at", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_HANDLE = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type, then the handle
_MAX_HANDLE = 128
_NO_HANDLE = (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM)


def file_handle(dirfd: int, name: bytes) -> tuple[int, bytes] | None:
    """Return (type, bytes) of the handle that identifies the object for its whole life; None if there is none."""
    buffer = ctypes.create_string_buffer(_HANDLE.pack(_MAX_HANDLE, 0), _HANDLE.size + _MAX_HANDLE)
    mount_id = ctypes.c_int()
    flags = 0 if name else AT_EMPTY_PATH
    while _name_to_handle_at(dirfd, name and component(name), buffer, ctypes.byref(mount_id), flags) < 0:
        if ctypes.get_errno() in _NO_HANDLE:
            return None
        if ctypes.get_errno() != errno.EINTR:
            raise failed(name)
    size, kind = _HANDLE.unpack_from(buffer)
    return kind, buffer.raw[_HANDLE.size : _HANDLE.size + size]


@restarted
def open_by_handle(fd: int, kind: int, handle: bytes, /) -> int | None:
    """Return an O_PATH descriptor of the object that a handle names on the file system of `fd`.

    None when it is gone, or without CAP_DAC_READ_SEARCH (open_by_handle_at(2)).
    """
    buffer = ctypes.create_string_buffer(_HANDLE.pack(len(handle), kind) + handle, _HANDLE.size + len(handle))
    own = os.open(through_proc(fd, b""), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_PATH gives EBADF
    try:
        found = _open_by_handle_at(own, buffer, os.O_PATH | os.O_CLOEXEC)
    finally:
        close(own)
    return found if found >= 0 else None


# --- copies of a mount -------------------------------------------------------------------------------------

_NR_OPEN_TREE = 428
_NR_MOUNT_SETATTR = 442
_OPEN_TREE_CLONE = 1
_MADE_PRIVATE = struct.pack("=QQQQ", 0, 0, 1 << 18, 0)  # struct mount_attr: set, clear, propagation MS_PRIVATE, userns
_mount_setattr = function(
    "syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t
)
_open_tree = function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def clone_mount(fd: int) -> int | None:
    """Return a descriptor of the same directory in a private copy of its mount, without the mounts inside it.

    open_tree(2) and mount_setattr(2) need CAP_SYS_ADMIN: None without it. Links and renames between two copies are
    EXDEV.
    """
    clone = _open_tree(_NR_OPEN_TREE, fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH)
    if clone < 0:
        return None
    # A copy of a shared mount would receive what is mounted in the original later on (mount_namespaces(7)).
    if _mount_setattr(_NR_MOUNT_SETATTR, clone, b"", AT_EMPTY_PATH, _MADE_PRIVATE, len(_MADE_PRIVATE)) < 0:
        close(clone)
        return None
    return clone
