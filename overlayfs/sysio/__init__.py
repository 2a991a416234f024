"""The only way to raw system calls.

Every function takes descriptors and bytes, and returns a value or raises `OSError`.

A *place* is the pair ``(dirfd, name)``.  `name` is ONE component, without a slash; a symbolic link is never followed.
``b""`` means the object behind the descriptor itself, which may be opened with O_PATH.  Paths of several components
are opened only by `open_beneath`, which never leaves the directory it starts from: openat2(2) refuses symbolic links,
magic links, mount points and ``..`` above the start.  Descriptors made here are close-on-exec.  Modes are subject to
the process's umask, which a daemon sets to 0.

Calls that change something call `fault_hook` first, which tests replace to make the n-th one fail.  A call that a
signal has interrupted is repeated; where the interpreter does so by itself (PEP 475 has the list) it is left to it.
Most arguments are positional only, because wrappers that pass keywords on take twice the time.

The modules of this package are its parts; everything else imports `sysio` itself, so that there is one name to
replace in a test.
"""

from collections.abc import Callable

from overlayfs.sysio.attributes import (
    NOW,
    birth_time,
    chmod_at,
    chown_at,
    exists_at,
    get_file_attributes,
    set_file_attributes,
    stat_at,
    utimens_at,
)
from overlayfs.sysio.calls import StallWatch
from overlayfs.sysio.capabilities import CAP_FSETID, WithoutCapability
from overlayfs.sysio.data import (
    clone_file,
    copy_data,
    copy_range,
    fallocate,
    fdatasync,
    fill_at,
    fsync,
    next_data,
    read_at,
    read_into,
    seek_data,
    syncfs,
    truncate_fd,
    write_at,
)
from overlayfs.sysio.descriptors import (
    access_mode,
    close,
    flush,
    keep_atime,
    open_beneath,
    open_child,
    try_lock,
    try_share,
    wait_lock,
)
from overlayfs.sysio.filesystems import (
    clone_mount,
    file_handle,
    fs_id,
    fs_type,
    fs_uuid,
    open_by_handle,
    statvfs_fd,
)
from overlayfs.sysio.names import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    link_at,
    list_dir,
    mkdir_at,
    mknod_at,
    readlink_at,
    rename_at,
    rmdir_at,
    symlink_at,
    unlink_at,
)
from overlayfs.sysio.xattrs import find_xattr, getxattr_at, listxattr_at, removexattr_at, setxattr_at

fault_hook: Callable[[str], None] | None = None
"""Called with the name of each changing call before it acts; what it raises is what the call raises."""

stall_watch: StallWatch | None = None
"""Notified when changing calls begin and end, to detect one that takes long: a slow disk, a frozen file system."""

__all__ = [
    "CAP_FSETID",
    "NOW",
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "RENAME_WHITEOUT",
    "StallWatch",
    "WithoutCapability",
    "access_mode",
    "birth_time",
    "chmod_at",
    "chown_at",
    "clone_file",
    "clone_mount",
    "close",
    "copy_data",
    "copy_range",
    "exists_at",
    "fallocate",
    "fault_hook",
    "fdatasync",
    "file_handle",
    "fill_at",
    "find_xattr",
    "flush",
    "fs_id",
    "fs_type",
    "fs_uuid",
    "fsync",
    "get_file_attributes",
    "getxattr_at",
    "keep_atime",
    "link_at",
    "list_dir",
    "listxattr_at",
    "mkdir_at",
    "mknod_at",
    "next_data",
    "open_beneath",
    "open_by_handle",
    "open_child",
    "read_at",
    "read_into",
    "readlink_at",
    "removexattr_at",
    "rename_at",
    "rmdir_at",
    "seek_data",
    "set_file_attributes",
    "setxattr_at",
    "stall_watch",
    "stat_at",
    "statvfs_fd",
    "symlink_at",
    "syncfs",
    "truncate_fd",
    "try_lock",
    "try_share",
    "unlink_at",
    "utimens_at",
    "wait_lock",
    "write_at",
]
