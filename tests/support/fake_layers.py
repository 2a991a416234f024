"""Layers that exist only as values, below the real lookup; and what they show according to overlayfs.rst."""

import os
import stat
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from overlayfs.fs.config import StackConfig
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, File, NodeTable
from overlayfs.tree.layer import NO_MARKS, Entry, Marks
from overlayfs.union.resolve import Kind

NAMES = (b"n", b"m")
HUGE = 1 << 30


class Object(NamedTuple):
    """What one layer holds under a name; metacopy and redirect are marks of it."""

    kind: Kind
    metacopy: bool = False
    redirect: bytes | None = None


ABSENT = Object(Kind.ABSENT)
OBJECTS = (
    ABSENT,
    Object(Kind.WHITEOUT),
    Object(Kind.FILE),
    Object(Kind.FILE, metacopy=True),
    Object(Kind.FILE, metacopy=True, redirect=b"/m"),
    Object(Kind.DIR),
    Object(Kind.DIR, redirect=b"m"),
    Object(Kind.DIR, redirect=b"/m"),
    Object(Kind.OPAQUE),
)
Stack = Sequence[dict[bytes, Object]]  # top first; all names are in the root


class Shown(NamedTuple):
    """What a name shows: the (layer, name) of each directory or of the file, and where the data of the file is."""

    parts: tuple[tuple[int, bytes], ...] = ()
    data: tuple[int, bytes] | None = None


def expected(stack: Stack, name: bytes) -> Shown:
    """Follow the documentation from layer to layer, without any code of the program."""
    parts: list[tuple[int, bytes]] = []
    is_file = False
    for position, layer in enumerate(stack):
        found = layer.get(name, ABSENT)
        if found.kind is Kind.ABSENT:
            continue
        if found.kind is Kind.WHITEOUT or (parts and is_file != (found.kind is Kind.FILE)):
            break  # what is below a whiteout is hidden, a file below a directory, and a directory below a file
        is_file = found.kind is Kind.FILE
        if not is_file or not parts:
            parts.append((position, name))
        if is_file and not found.metacopy:
            return Shown(tuple(parts), (position, name))
        if found.kind is Kind.OPAQUE:
            break
        if found.redirect is not None:
            name = found.redirect.lstrip(b"/")
    return Shown(tuple(parts))


class FakeLayer:
    """A layer: one directory, its root. `size` is that of the directory: a huge one is not listed for a lookup."""

    override = None

    def __init__(self, index: int, objects: dict[bytes, Object], size: int) -> None:
        self.index = index
        self.filesystem = SimpleNamespace(uuid=None)
        self.work = SimpleNamespace(index=None)
        self._objects = objects
        self._size = size

    def _stat(self, name: bytes) -> os.stat_result:
        kind = self._objects[name].kind if name else Kind.DIR
        mode = stat.S_IFREG if kind is Kind.FILE else stat.S_IFDIR
        number = 1000 * (self.index + 1) + (NAMES.index(name) + 1 if name else 0)
        return os.stat_result((mode | 0o755, number, 7, 1, 0, 0, self._size, 0, 0, 0))

    def stat(self, path: bytes, name: bytes) -> os.stat_result:
        return self._stat(name)

    def probe(self, path: bytes, name: bytes) -> Entry:
        found = self._objects.get(name, ABSENT) if not path else ABSENT
        if found.kind is Kind.ABSENT:
            return Entry(found.kind)
        if found.kind is Kind.WHITEOUT:
            return Entry(found.kind, self._stat(name))  # a device, as most of them
        return Entry(Kind.FILE if found.kind is Kind.FILE else Kind.DIR, self._stat(name))

    def marks(self, path: bytes, name: bytes, found: object) -> Marks:
        mine = self._objects.get(name, ABSENT)
        if not name or (mine == Object(mine.kind) and mine.kind is not Kind.OPAQUE):
            return NO_MARKS
        return Marks(metacopy=mine.metacopy, redirect=mine.redirect, opaque=mine.kind is Kind.OPAQUE)

    def plain_file(self, path: bytes, name: bytes) -> os.stat_result | None:
        return self._stat(name) if self._objects.get(name, ABSENT) == Object(Kind.FILE) else None

    def names(self, path: bytes) -> dict[bytes, Kind]:
        # Like the real one, it does not distinguish directories with an opaque mark.
        kinds = {name: found.kind for name, found in self._objects.items() if found.kind is not Kind.ABSENT}
        return {name: Kind.DIR if kind is Kind.OPAQUE else kind for name, kind in kinds.items()}


def shown(stack: Stack, name: bytes, has_upper: bool, listed: bool) -> Shown:
    """Use the real lookup; `listed`: the names of the directory are known before."""
    layers = [FakeLayer(index, objects, 0 if listed else HUGE) for index, objects in enumerate(stack)]
    upper = layers[0] if has_upper else None
    config = StackConfig(lower=(b"/",))
    fake: Any = SimpleNamespace(
        lower=tuple(layers[1:] if has_upper else layers),
        upper=upper,
        config=config,
        number=lambda filesystem, inode: inode,
        origin_number=lambda origin: None,
    )
    nodes = NodeTable(ino32=False)
    lookup = Lookup(fake, nodes)
    if listed:
        lookup.listing(lookup.root)
    node = lookup.lookup(lookup.root, name)
    above = ((0, name),) if node is not None and node.in_upper else ()
    if node is None:
        return Shown()
    if isinstance(node, Dir):
        return Shown((*above, *((part.layer.index, part.path) for part in node.lower)))
    assert isinstance(node, File)
    own = (node.lower.layer.index, node.lower.name) if node.lower is not None and not above else (0, name)
    if node.data is None:
        return Shown((own,), own)
    return Shown((own,), (node.data.layer.index, node.data.name) if node.data.name else None)
