"""What a manifest says of one entry of a layer, and which of its attributes belong to the layer at all."""

from collections.abc import Iterable
from enum import Enum

import msgspec

from overlayfs.format import xattrs
from overlayfs.format.xattrs import Mode

_LOCAL_SUFFIXES = (xattrs.ORIGIN, xattrs.IMPURE, xattrs.NLINK, xattrs.UUID, b"upper")
_LOCAL = frozenset(
    {xattrs.prefix(mode) + suffix for mode in Mode for suffix in _LOCAL_SUFFIXES}
    | {b"security.selinux", b"security.evm", b"user.fuseoverlayfs.origin"}
)
_LOCAL_PREFIXES = (*xattrs.RESERVED_PREFIXES, b"trusted.SGI_ACL_")  # xfs lists ACLs a second time
FLAGS = {
    xattrs.prefix(mode) + suffix: suffix.decode() for mode in Mode for suffix in (xattrs.REDIRECT, xattrs.METACOPY)
}


class Type(Enum):
    """What an entry is, in the letters of find(1); a whiteout is the device 0:0."""

    FILE = "f"
    DIR = "d"
    SYMLINK = "l"
    FIFO = "p"
    SOCKET = "s"
    CHAR = "c"
    BLOCK = "b"
    WHITEOUT = "w"


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One entry. `path` counts from the layer's root, which is ``b""``; `mode` is permission bits.

    `size` in bytes, of regular files only; `link` is the first path of the same inode, for every other name of it;
    `xxh3` is the xxh3-128 of the content in hex, for the first name of a regular file that holds its own data.
    """

    path: bytes
    type: Type
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    target: bytes | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    link: bytes | None = None
    xxh3: str | None = None


def is_portable(attribute: bytes) -> bool:
    """Return whether an extended attribute is part of a layer wherever it lies."""
    return attribute not in _LOCAL and not attribute.startswith(_LOCAL_PREFIXES)


def is_metadata_only(attributes: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether attributes say that a file's data lies in a layer below."""
    return any(FLAGS.get(name) == "metacopy" for name, _ in attributes)


def order(path: bytes) -> bytes:
    """Return the key by which paths sort as in a manifest: a directory, then what is in it, then its neighbours."""
    return path.replace(b"/", b"\0")
