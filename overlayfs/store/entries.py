"""One entry of a manifest, and which extended attributes are part of a layer."""

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
_LOCAL_PREFIXES = (*xattrs.RESERVED_PREFIXES, b"trusted.SGI_ACL_")  # XFS lists ACLs a second time
FLAGS = {
    xattrs.prefix(mode) + suffix: suffix.decode() for mode in Mode for suffix in (xattrs.REDIRECT, xattrs.METACOPY)
}


class Type(Enum):
    """The type of an entry, as a letter of find(1); a whiteout is the character device 0:0."""

    FILE = "f"
    DIR = "d"
    SYMLINK = "l"
    FIFO = "p"
    SOCKET = "s"
    CHAR = "c"
    BLOCK = "b"
    WHITEOUT = "w"


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One entry of a layer.

    path: relative to the layer's root, which is ``b""``. mode: permission bits. size: bytes of a regular file, else 0.
    link: the first path of the same inode, for each of its other names. xxh3: the xxh3-128 of the content in hex, for
    the first name of a regular file that has its own data.
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
    """Return whether an extended attribute is part of a layer, rather than of the place where it is stored."""
    return attribute not in _LOCAL and not attribute.startswith(_LOCAL_PREFIXES)


def is_metadata_only(attributes: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a file with these attributes has its data in a layer below (metacopy)."""
    return any(FLAGS.get(name) == "metacopy" for name, _ in attributes)


def order(path: bytes) -> bytes:
    """Return the sort key of a path in a manifest: a directory comes first, then its entries, then its siblings."""
    return path.replace(b"/", b"\0")
