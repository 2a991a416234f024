"""The index of hard links as a whole: what a commit asks of it."""

import errno
import os
from collections.abc import Mapping

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import nlink, origin
from overlayfs.fs.nodes import File, Node
from overlayfs.tree.upper import Upper


def has_unlinked_twins(upper: Upper, names: Mapping[tuple[int, int], int]) -> bool:
    """Return whether an entry has more names in the union than `names`, by (st_dev, st_ino), counts in the upper."""
    if upper.work.index is None:
        return False
    return any(_union_nlink(upper, upper.work.index, name) > _count(upper.work.index, name, names)
               for name, _ in sysio.list_dir(upper.work.index))  # fmt: skip


def _count(index: int, name: bytes, names: Mapping[tuple[int, int], int]) -> int:
    found = sysio.stat_at(index, name)
    return names.get((found.st_dev, found.st_ino), 0)


def _union_nlink(upper: Upper, index: int, name: bytes) -> int:
    value = upper.index_marks(name).nlink
    decoded = nlink.decode(value) if value is not None else None
    base, delta = decoded if decoded is not None else ("L", 0)
    # Relative to the lower count, which is at least 2 for an indexed file: enough to look for the names.
    return sysio.stat_at(index, name).st_nlink + delta if base == "U" else 1 << 30


def name_of(upper: Upper, node: File) -> bytes | None:
    """Return the name of the entry that stands for a lower file, or None."""
    if upper.work.index is None or node.lower is None:
        return None
    layer, path, child = node.lower.layer, node.lower.path, node.lower.name
    if layer.stat(path, child).st_nlink < 2:
        return None
    came_from = layer.filesystem.origin(sysio.file_handle(layer.dirfd(path), child))
    if came_from is None:
        return None
    name = origin.index_name(came_from)
    try:
        sysio.stat_at(upper.work.index, name)
    except FileNotFoundError:
        return None
    return name


def pin(upper: Upper, node: Node) -> int:
    """Return an O_PATH descriptor of the upper file that stands for a lower one; ENOENT for none."""
    name = name_of(upper, node) if isinstance(node, File) else None
    if name is None or upper.work.index is None:
        raise oserror(errno.ENOENT)
    return sysio.open_child(upper.work.index, name, os.O_PATH)
