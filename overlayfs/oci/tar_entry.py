"""One entry of a tar archive, and the rules for its name: it stays inside the root, and a file system can hold it."""

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from overlayfs.errors import UserError, one_line
from overlayfs.format import whiteout

MAX_NAME = 255
_MAX_WHITEOUT_NAME = len(whiteout.PREFIX) + MAX_NAME
MAX_PATH = 4095  # PATH_MAX without its NUL: no program can open a longer path
_MAX_SHOWN = 160


class ArchiveError(UserError):
    """An archive is refused as a whole; `str()` names the entry and what is wrong with it."""


class Kind(Enum):
    """The type of object that an entry makes."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    FIFO = "FIFO"
    CHARACTER = "character device"
    BLOCK = "block device"


Extents = tuple[tuple[int, int], ...]  # (offset, length) of each range with data, ascending


class TarEntry(NamedTuple):
    """One object. `path` is relative to the root; ``b""`` is the root itself.

    target: of a symbolic link, unchanged; of a hard link, a path like `path`. device: (major, minor). extents: the
    ranges of a sparse file that have data; None for a file without holes. mtime_ns: nanoseconds since 1970.
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
    """Return a name from an archive for messages: one line of limited length, without control characters."""
    text = one_line(path.decode("utf-8", "backslashreplace"))
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def safe_path(name: bytes) -> bytes:
    """Return the path below the root that a name in an archive means.

    ``./``, repeated and trailing slashes are dropped, an absolute name counts from the root, and ``a/../b`` is ``b``
    (docs/images.md, "A layer that comes in"). Raises `ArchiveError` for a name that leads out of the root, or that no
    file system can hold.
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
    if len(path) > MAX_PATH or any(len(part) > _max_length(part) for part in parts):
        raise ArchiveError(f"the entry {shown(name)} has a name that is too long for a file system")
    return path


def _max_length(part: bytes) -> int:
    return _MAX_WHITEOUT_NAME if whiteout.is_reserved(part) else MAX_NAME
