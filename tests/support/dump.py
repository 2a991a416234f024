"""A complete, comparable picture of a tree, taken through any driver."""

import hashlib
import os
import stat as modes
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.drivers.base import Raw, Stat, Tree

BLOCK = 4096
# xfs lists ACLs a second time under names of its own
OTHER_FORMS = ("security.selinux", "trusted.SGI_ACL_")


class Entry(NamedTuple):
    """The comparable attributes of one path; `links` are all paths of the same inode if there are several."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    nlink: int
    mtime_ns: int
    rdev: int
    content: str
    sparse: bool
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[bytes, ...]


KINDS = {
    modes.S_IFREG: "file", modes.S_IFDIR: "dir", modes.S_IFLNK: "symlink", modes.S_IFIFO: "fifo",
    modes.S_IFSOCK: "socket", modes.S_IFCHR: "char", modes.S_IFBLK: "block",
}  # fmt: skip
Dump = dict[bytes, Entry]


def dump(tree: Tree | Raw, top: bytes = b"", *, times_before: int | None = None) -> Dump:
    """Return every path below `top`.

    With `times_before` (ns) all later mtimes compare equal, since they differ between two runs.
    """
    raw = tree.raw if isinstance(tree, Tree) else tree
    stats = dict(_walk(raw, top))
    groups: dict[int, list[bytes]] = defaultdict(list)
    for path, found in stats.items():
        if not modes.S_ISDIR(found.mode):
            groups[found.ino].append(path)
    return {path: _entry(raw, path, found, groups[found.ino], times_before) for path, found in stats.items()}


def _walk(raw: Raw, path: bytes) -> Iterator[tuple[bytes, Stat]]:
    found = raw.stat(path)
    yield path, found
    if modes.S_ISDIR(found.mode):
        for item in sorted(raw.scan(path)):
            yield from _walk(raw, path + b"/" + item.name if path else item.name)


def _entry(raw: Raw, path: bytes, found: Stat, links: list[bytes], times_before: int | None) -> Entry:
    directory = modes.S_ISDIR(found.mode)
    late = times_before is not None and found.mtime_ns >= times_before
    return Entry(
        KINDS[modes.S_IFMT(found.mode)],
        modes.S_IMODE(found.mode),
        found.uid,
        found.gid,
        0 if directory else found.size,
        0 if directory else found.nlink,
        -1 if late else found.mtime_ns,
        found.rdev if modes.S_ISCHR(found.mode) or modes.S_ISBLK(found.mode) else 0,
        _content(raw, path, found),
        modes.S_ISREG(found.mode) and found.blocks * 512 < found.size - BLOCK,
        tuple(_xattrs(raw, path)),
        tuple(sorted(links)) if len(links) > 1 else (),
    )


def _content(raw: Raw, path: bytes, found: Stat) -> str:
    if modes.S_ISLNK(found.mode):
        return os.fsdecode(raw.readlink(path))
    if not modes.S_ISREG(found.mode):
        return ""
    digest = hashlib.sha256()
    handle = raw.open(path, os.O_RDONLY, 0)
    try:
        offset = 0
        while piece := handle.read(offset):
            digest.update(piece)
            offset += len(piece)
    finally:
        handle.close()
    return digest.hexdigest()


def _xattrs(raw: Raw, path: bytes) -> Iterator[tuple[str, bytes]]:
    for name in sorted(raw.listxattr(path)):
        if not name.startswith(OTHER_FORMS):
            yield name, raw.getxattr(path, name)


def differences(left: Dump, right: Dump) -> list[str]:
    """Return a line per field that differs; empty when the trees are equal."""
    lines = [f"only left: {path!r}" for path in sorted(left.keys() - right.keys())]
    lines += [f"only right: {path!r}" for path in sorted(right.keys() - left.keys())]
    for path in sorted(left.keys() & right.keys()):
        for field, one, other in zip(Entry._fields, left[path], right[path], strict=True):
            if one != other:
                lines.append(f"{path!r}: {field}: {one!r} != {other!r}")
    return lines


def same(left: Dump, right: Dump) -> None:
    """Fail with every difference between two trees."""
    lines = differences(left, right)
    assert not lines, "\n" + "\n".join(lines)
