"""Layers as values: the specification in a test, which the builder makes, and the basic rules of merging layers.

A tree is a mapping of names to entries. For short, bytes or str stand for a file of that content, a dict for a
directory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

MTIME = 1_600_000_000_111_111_111
ATIME = 1_600_000_001_222_222_222

WhiteoutForm = Literal["device", "file", "xattr"]
OpaqueForm = Literal["trusted", "user", "fuse", "file"]


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Metadata of an entry; times are in nanoseconds, mode None is the default of the type."""

    mode: int | None = None
    uid: int = 0
    gid: int = 0
    mtime_ns: int = MTIME
    atime_ns: int = ATIME
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class File(Meta):
    """A regular file: pieces of data at offsets, holes between them, `size` if longer than the data."""

    data: bytes = b""
    pieces: tuple[tuple[int, bytes], ...] = ()
    size: int | None = None


@dataclass(frozen=True)
class Dir(Meta):
    """A directory; `opaque` is the form of the mark that hides the layers below."""

    children: Mapping[str, "Short"] = field(default_factory=dict)
    opaque: OpaqueForm | None = None


@dataclass(frozen=True)
class Symlink(Meta):
    """A symbolic link."""

    target: str = ""


@dataclass(frozen=True)
class Special(Meta):
    """A FIFO ("p"), socket ("s"), character ("c") or block ("b") device."""

    kind: Literal["p", "s", "c", "b"] = "p"
    major: int = 0
    minor: int = 0


@dataclass(frozen=True)
class Link:
    """A further name of the file at `to`, a path from the root of the same layer that sorts or stands before."""

    to: str


@dataclass(frozen=True)
class Whiteout:
    """The absence of a name: a 0:0 device, a file `.wh.NAME`, or an empty file with the whiteout attribute."""

    form: WhiteoutForm = "device"


Entry = File | Dir | Symlink | Special | Link | Whiteout
Short = Entry | bytes | str | Mapping[str, "Short"]
Tree = Mapping[str, Short]


def entry(short: Short) -> Entry:
    """Return the entry for a short form."""
    if isinstance(short, str):
        return File(short.encode())
    if isinstance(short, bytes):
        return File(short)
    if isinstance(short, Mapping):
        return Dir(short)
    return short


def flatten(layers: list[Tree]) -> dict[str, Short]:
    """Return the merged tree of layers, top first, by the basic rules: for a plain directory to compare with."""
    result: dict[str, Short] = {}
    for layer in reversed(layers):
        result = _over(layer, result)
    return result


def _over(top: Tree, below: Tree) -> dict[str, Short]:
    result = dict(below)
    for name, short in top.items():
        found = entry(short)
        if isinstance(found, Whiteout):
            result.pop(name, None)
        elif isinstance(found, Dir):
            under = entry(below.get(name, b""))
            base = under.children if isinstance(under, Dir) and found.opaque is None else {}
            result[name] = replace(found, children=_over(found.children, base), opaque=None)
        else:
            result[name] = found
    return result
