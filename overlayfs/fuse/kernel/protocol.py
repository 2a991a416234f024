"""The FUSE protocol: constants and structures of linux/fuse.h, up to version 7.45. Pure.

A structure is one row of a table: its fields as `name:code` with the codes of the struct module, little-endian and
naturally aligned; fields named `_` are padding. Times are signed, though the header says unsigned: so the kernel uses
them. Requests carry a header (`IN_HEADER`), then the structure of their kind, then names or data; replies carry
`OUT_HEADER` and the structure of their kind, names or data.
"""

import stat
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from struct import Struct

MAJOR = 7
MINOR = 45
OLDEST_MINOR = 31  # Linux 5.4; older kernels need the pyfuse3 engine


class Op(IntEnum):
    """Kinds of requests (enum fuse_opcode)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


UNANSWERED = (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT)
"""Requests that have no reply, not even for an error."""


class Init(IntFlag):
    """Features of the handshake (FUSE_INIT flags; those from bit 32 on are sent in `flags2`)."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37


class Open(IntFlag):
    """Flags of the reply to OPEN and CREATE (FOPEN_*)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    PASSTHROUGH = 1 << 7


class Attr(IntFlag):
    """Which fields of a SETATTR are set (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


OPEN_KILL_SUIDGID = 1
WRITE_KILL_SUIDGID = 1 << 2
SETXATTR_ACL_KILL_SGID = 1
FSYNC_FDATASYNC = 1


class Notify(IntEnum):
    """Notifications (enum fuse_notify_code); the code is in the field that a reply has for its error."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4


DEV_IOC_BACKING_OPEN = 0x4010_E501
DEV_IOC_BACKING_CLOSE = 0x4004_E502


class Layout(Struct):
    """One structure, packed and unpacked by position, or by name where that is clearer."""

    def __init__(self, fields: str) -> None:
        pairs = [field.split(":") for field in fields.split()]
        super().__init__("<" + "".join(code for _, code in pairs))
        self.fields = tuple(name for name, _ in pairs)

    def encode(self, **values: int) -> bytes:
        """Return the bytes of a structure; fields that are not named are zero."""
        unknown = values.keys() - set(self.fields)
        if unknown:
            raise TypeError(f"no such fields: {sorted(unknown)}")
        return self.pack(*(values.get(name, 0) for name in self.fields))

    def decode(self, data: bytes | bytearray | memoryview, offset: int = 0) -> Mapping[str, int]:
        """Return the fields of a structure by name, without padding; struct.error when it is cut short."""
        found = zip(self.fields, self.unpack_from(data, offset), strict=True)
        return {name: value for name, value in found if name != "_"}


_ATTR = (
    "ino:Q size:Q blocks:Q atime:q mtime:q ctime:q atimensec:I mtimensec:I ctimensec:I"
    " mode:I nlink:I uid:I gid:I rdev:I blksize:I flags:I"
)
_ENTRY = "nodeid:Q generation:Q entry_valid:Q attr_valid:Q entry_valid_nsec:I attr_valid_nsec:I " + _ATTR
_OPEN = "fh:Q open_flags:I backing_id:i"
_DIRENT = "entry_ino:Q off:Q namelen:I type:I"
_OUT = "len:I error:i unique:Q"
_IO = "fh:Q offset:Q size:I rw_flags:I lock_owner:Q flags:I _:I"
_SX_TIME = "{0}_sec:q {0}_nsec:I _:i"

LAYOUTS: dict[str, Layout] = {
    name: Layout(fields)
    for name, fields in {
        "in_header": "len:I opcode:I unique:Q nodeid:Q uid:I gid:I pid:I total_extlen:H _:H",
        "out_header": _OUT,
        "attr": _ATTR,
        "entry_out": _ENTRY,
        "attr_out": "attr_valid:Q attr_valid_nsec:I _:I " + _ATTR,
        "open_out": _OPEN,
        "create_out": f"{_ENTRY} {_OPEN}",
        "init_in": "major:I minor:I max_readahead:I flags:I flags2:I",
        "init_out": "major:I minor:I max_readahead:I flags:I max_background:H congestion_threshold:H max_write:I"
        " time_gran:I max_pages:H map_alignment:H flags2:I max_stack_depth:I request_timeout:H _:H _:I _:Q _:Q",
        "forget_in": "nlookup:Q",
        "batch_forget_in": "count:I _:I",
        "forget_one": "nodeid:Q nlookup:Q",
        "getattr_in": "getattr_flags:I _:I fh:Q",
        "setattr_in": "valid:I _:I fh:Q size:Q lock_owner:Q atime:q mtime:q ctime:q"
        " atimensec:I mtimensec:I ctimensec:I mode:I _:I uid:I gid:I _:I",
        "mknod_in": "mode:I rdev:I umask:I _:I",
        "mkdir_in": "mode:I umask:I",
        "rename_in": "newdir:Q",
        "rename2_in": "newdir:Q flags:I _:I",
        "link_in": "oldnodeid:Q",
        "open_in": "flags:I open_flags:I",
        "create_in": "flags:I mode:I umask:I open_flags:I",
        "release_in": "fh:Q flags:I release_flags:I lock_owner:Q",
        "read_in": _IO,
        "write_in": _IO,
        "write_out": "size:I _:I",
        "statfs_out": "blocks:Q bfree:Q bavail:Q files:Q ffree:Q bsize:I namelen:I frsize:I _:I _:Q _:Q _:Q",
        "fsync_in": "fh:Q fsync_flags:I _:I",
        "setxattr_in": "size:I flags:I setxattr_flags:I _:I",
        "getxattr_in": "size:I _:I",
        "getxattr_out": "size:I _:I",
        "interrupt_in": "unique:Q",
        "ioctl_in": "fh:Q flags:I cmd:I arg:Q in_size:I out_size:I",
        "ioctl_out": "result:i flags:I in_iovs:I out_iovs:I",
        "fallocate_in": "fh:Q offset:Q length:Q mode:I _:I",
        "lseek_in": "fh:Q offset:Q whence:I _:I",
        "lseek_out": "offset:Q",
        "copy_file_range_in": "fh_in:Q off_in:Q nodeid_out:Q fh_out:Q off_out:Q len:Q flags:Q",
        "copy_file_range_out": "bytes_copied:Q",
        "dirent": _DIRENT,
        "direntplus": f"{_ENTRY} {_DIRENT}",
        "statx_in": "getattr_flags:I _:I fh:Q sx_flags:I sx_mask:I",
        "statx_out": "attr_valid:Q attr_valid_nsec:I flags:I _:Q _:Q mask:I blksize:I attributes:Q nlink:I uid:I gid:I"
        " mode:H _:H ino:Q size:Q blocks:Q attributes_mask:Q "
        + " ".join(_SX_TIME.format(which) for which in ("atime", "btime", "ctime", "mtime"))
        + " rdev_major:I rdev_minor:I dev_major:I dev_minor:I"
        + " _:Q" * 14,
        "inval_inode": "nodeid:Q off:q len:q",
        "inval_entry": "parent:Q namelen:I flags:I",
        "store": "nodeid:Q offset:Q size:I _:I",
        "backing_map": "fd:i flags:I _:Q",
        # Replies that are sent often, with their header in front: one call packs all of it.
        "entry_reply": f"{_OUT} {_ENTRY}",
        "attr_reply": f"{_OUT} attr_valid:Q attr_valid_nsec:I _:I {_ATTR}",
        "open_reply": f"{_OUT} {_OPEN}",
        "create_reply": f"{_OUT} {_ENTRY} {_OPEN}",
        "write_reply": f"{_OUT} size:I _:I",
    }.items()
}

IN_HEADER = LAYOUTS["in_header"]
OUT_HEADER = LAYOUTS["out_header"]


def split_flags(flags: int) -> tuple[int, int]:
    """Return handshake features as `flags` and `flags2` carry them."""
    return flags & 0xFFFF_FFFF, flags >> 32


def padded(name: bytes) -> bytes:
    """Return the name of a directory entry, padded to a multiple of eight bytes."""
    return name + bytes(-len(name) % 8)


def encode_device(device: int) -> int:
    """Return a device number as the kernel encodes it in 32 bits (new_encode_dev in linux/kdev_t.h)."""
    if not device:
        return 0
    major, minor = device >> 8 & 0xFFF | device >> 32 & ~0xFFF, device & 0xFF | device >> 12 & ~0xFF
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_device(device: int) -> int:
    """Return the device number of makedev(3) for one that the kernel has encoded in 32 bits."""
    major, minor = device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00
    return minor & 0xFF | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12 | (major & ~0xFFF) << 32


def file_type(mode: int) -> int:
    """Return the type of an object as directory entries have it (DT_* of readdir(3))."""
    return stat.S_IFMT(mode) >> 12
