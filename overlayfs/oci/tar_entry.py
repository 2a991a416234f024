"""What an archive says of one object, and what it may say: names stay inside, and a file system can hold them."""

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from overlayfs.errors import UserError, one_line
from overlayfs.format import whiteout

LONGEST_NAME = 255
_LONGEST_DELETED = len(whiteout.PREFIX) + LONGEST_NAME
LONGEST_PATH = 4095  # PATH_MAX without its NUL: beyond it no program could reach what was unpacked
_LONGEST_SHOWN = 160


class ArchiveError(UserError):
    """An archive is refused whole; `str()` names the entry and what is wrong with it."""


class Kind(Enum):
    """What an entry makes."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    FIFO = "FIFO"
    CHARACTER = "character device"
    BLOCK = "block device"


Extents = tuple[tuple[int, int], ...]  # (offset, length) of each piece of data, ascending


class TarEntry(NamedTuple):
    """One object. `path` is relative to the root, ``b""`` being the root itself.

    target: of a symbolic link as it stands; of a hard link a path like `path`. device: (major, minor).
    extents: where the data of a sparse file lies; None when all of it is there. Times are nanoseconds since 1970.
    """

    path: bytes
    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = {}
    extents: Extents | None = None


def shown(path: bytes) -> str:
    """Return a name of an archive as a person may read it: no control characters, no more than a line."""
    text = one_line(path.decode("utf-8", "backslashreplace"))
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def inside(name: bytes) -> bytes:
    """Return the path below the root that a name means; ArchiveError for one that leaves the root or cannot be made.

    ``./``, repeated and trailing slashes go, an absolute name counts from the root, ``a/../b`` is ``b``
    (formats, section 10).
    """
    if b"\0" in name:
        raise ArchiveError(f"the entry {shown(name)} has a NUL in its name")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise ArchiveError(f"the entry {shown(name)} leads out of the archive's root")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    path = b"/".join(parts)
    if len(path) > LONGEST_PATH or any(len(part) > _longest(part) for part in parts):
        raise ArchiveError(f"the entry {shown(name)} has a name that is too long for a file system")
    return path


def _longest(part: bytes) -> int:
    return _LONGEST_DELETED if whiteout.is_reserved(part) else LONGEST_NAME
