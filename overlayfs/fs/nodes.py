"""Nodes: what the kernel knows by a node id, each one object of the merged tree, and the table that owns them.

A node lives while the kernel holds lookups of it, while a handle is open, while it has live children, and a little
longer (`_IDLE`). All state here changes on the loop only; threads get descriptors and values, never a node.
"""

import errno
import itertools
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.tree.layer import Layer, join
from overlayfs.union.resolve import Kind

ROOT_NUMBER = 1
_IDLE = 1024
_FIRST_SPARE = 1 << 62
_FIRST_SPARE_32 = 0xF000_0000
_MASK_32 = 0xFFFF_FFFF

_moments = itertools.count(1)  # the order of changes, over all directories

Key = tuple[int, int]  # (st_dev, st_ino) of a real object


class LowerDir(NamedTuple):
    """A directory of one lower layer that is part of a merged one."""

    layer: Layer
    path: bytes


class LowerFile(NamedTuple):
    """Anything but a directory in a lower layer: `name` in the directory `path`."""

    layer: Layer
    path: bytes
    name: bytes


class InheritedAttributes(NamedTuple):
    """What a new object inherits from its directory: the group if `set_group`, and the default ACL if there is one."""

    set_group: bool
    group: int
    acl: bytes | None


class Node:
    """What directories and other nodes have in common. `kind` is the S_IFMT part of the mode.

    appeared: the moment at which the upper last got a name of it, 0 for before this mount; its names are durable where
    the directory has been synced since.
    """

    __slots__ = ("appeared", "copying_up", "handles", "in_upper", "kind", "lookups", "number", "orphan")

    def __init__(self, number: int, kind: int, in_upper: bool) -> None:
        self.number = number
        self.kind = kind
        self.in_upper = in_upper
        self.lookups = 0
        self.appeared = 0
        self.handles = 0
        self.copying_up = False  # a copy of it is being staged
        self.orphan: int | None = None  # pins an upper object that has no name left


class Dir(Node):
    """A directory: one in the upper (`in_upper`) merged with directories of lower layers, top first.

    lower_names: the merged names of the lower directories, with the indexes of those that make up each; they never
    change, so this is built at most once. upper_names: the kinds in the upper, updated by our own changes. Both are
    None until they are needed. pending_uppers: the names of former uppers, the newest first, that are not merged into
    `lower_names` yet. changed, synced: when names in the upper last changed, and up to which moment that is durable.
    sync_before: directories that must be durable before this one, because an object here has moved away from there,
    and since when. inherited: what new objects in it inherit, None until the first one is made and whenever the
    attributes of the directory have changed.
    """

    __slots__ = (
        "changed",
        "children",
        "impure",
        "inherited",
        "lower",
        "lower_names",
        "name",
        "opaque",
        "parent",
        "path_cache",
        "pending_uppers",
        "redirect_denied",
        "removed",
        "sync_before",
        "synced",
        "upper_names",
    )  # fmt: skip

    def __init__(
        self, number: int, parent: "Dir | None", name: bytes, in_upper: bool, lower: tuple[LowerDir, ...], opaque: bool
    ) -> None:
        super().__init__(number, stat.S_IFDIR, in_upper)
        self.parent = parent
        self.name = name
        self.lower = lower
        self.opaque = opaque
        self.redirect_denied = False
        self.inherited: InheritedAttributes | None = None
        self.impure = False
        self.removed = False
        self.children: dict[bytes, Node] = {}
        self.lower_names: dict[bytes, tuple[int, ...]] | None = None
        self.upper_names: dict[bytes, Kind] | None = None
        self.pending_uppers: tuple[dict[bytes, Kind], ...] = ()
        self.changed = 0
        self.synced = 0
        self.sync_before: dict[Dir, int] | None = None
        self.path_cache: tuple[int, bytes] = (-1, b"")

    def record_node(self, name: bytes, kind: Kind, node: Node) -> None:
        """Record that the upper now holds a node under a name."""
        self.changed = node.appeared = next(_moments)
        if self.upper_names is not None:
            self.upper_names[name] = kind

    def record(self, name: bytes, kind: Kind) -> None:
        """Record what the upper now holds under a name; ABSENT for nothing."""
        self.changed = next(_moments)
        if self.upper_names is None:
            return
        if kind is Kind.ABSENT:
            self.upper_names.pop(name, None)
        else:
            self.upper_names[name] = kind

    def sync_after(self, *left: "Dir") -> None:
        """Note that an object has moved here from these directories, so that they must be synced first.

        Were its name here durable and the change there not (nothing, a whiteout, what it was exchanged with), a crash
        would show it twice, or not at all: btrfs makes durable what is asked for, and no more.
        """
        first = [*self.unsynced_before(), *left, *(each for old in left for each in old.unsynced_before())]
        if first:
            self.sync_before = dict.fromkeys(first, self.changed)

    def unsynced_before(self) -> "list[Dir]":
        """Return the upper directories to sync before this one; for a removed one, the directory it was in."""
        return [_existing(left) for left, since in (self.sync_before or {}).items() if self.synced < since]

    def add_pending_upper(self) -> None:
        """Note that the upper is about to become the first lower directory; its names are merged when needed."""
        if not self.lower:
            self.lower_names, self.pending_uppers = {}, ()
        if self.lower_names is None or self.upper_names is None:
            self.lower_names, self.pending_uppers = None, ()
        else:
            self.pending_uppers = (self.upper_names, *self.pending_uppers)

    def is_within(self, other: "Dir") -> bool:
        """Return whether this directory is `other` or anywhere inside it."""
        walk: Dir | None = self
        while walk is not None and walk is not other:
            walk = walk.parent
        return walk is other


def _existing(directory: Dir) -> Dir:
    while directory.removed and directory.parent is not None:
        directory = directory.parent
    return directory


def as_dir(node: Node) -> Dir:
    """Return a node as the directory that it is; ENOTDIR for anything else."""
    if not isinstance(node, Dir):
        raise oserror(errno.ENOTDIR)
    return node


class File(Node):
    """Anything but a directory.

    names: every known name, with whether it exists in the upper. lower: the lower file that it is, or that it was
    copied up from. single_link: that file is known to have no other name. data: the lower file with its data while the
    upper holds metadata only. index: its entry in the index, if it has one. nlink_delta: the union's link count minus
    that of the real object.
    reader, writer: the descriptors that all its handles read and write through, used on the loop only: a thread gets a
    duplicate, so that a replaced one can be closed. sync_error: the errno of a failed fsync, 0 for none. unmarked: when
    its metacopy mark was removed, 0 where that is durable.
    """

    __slots__ = (
        "data", "index", "keys", "lower", "names", "nlink_delta", "reader", "single_link", "sync_error", "unmarked",
        "writer",
    )  # fmt: skip

    def __init__(self, number: int, kind: int, in_upper: bool, lower: LowerFile | None) -> None:
        super().__init__(number, kind, in_upper)
        self.lower = lower
        self.single_link = False
        self.data: LowerFile | None = None
        self.names: dict[tuple[Dir, bytes], bool] = {}
        self.index: bytes | None = None
        self.nlink_delta = 0
        self.keys: tuple[Key, ...] = ()
        self.reader: int | None = None
        self.writer: int | None = None
        self.sync_error = 0
        self.unmarked = 0

    def unmark(self) -> None:
        """Note that the upper has all the data now, and that the metacopy mark has been removed."""
        self.data = None
        self.unmarked = next(_moments)


class NodeTable:
    """All nodes by number, and the files by the real objects that they are."""

    def __init__(self, ino32: bool) -> None:
        self._by_number: dict[int, Node] = {}
        self.find = self._by_number.get  # the node with a number, None for none; each request asks
        self._by_key: dict[Key, File] = {}
        self.by_key = self._by_key.get  # the live file with a real object, None for none
        self._idle: OrderedDict[int, Node] = OrderedDict()
        self._kept = False
        self._mask = _MASK_32 if ino32 else -1
        self._spare = _FIRST_SPARE_32 if ino32 else _FIRST_SPARE
        self.unnamed: set[File] = set()  # files that have lost every known name
        self.on_drop: list[Callable[[Dir], None]] = []  # called with each directory that leaves the table
        self.epoch = 0  # grows when a directory moves: cached paths of an older epoch are void

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_number.values())

    def path(self, node: Dir) -> bytes:
        """Return the path of a directory in the overlay, which is also its path in the upper."""
        epoch, path = node.path_cache
        return path if epoch == self.epoch else self._find_path(node)

    def _find_path(self, node: Dir) -> bytes:
        # Not recursive: a tree may be deeper than the interpreter's stack.
        unknown = []
        walk: Dir | None = node
        while walk is not None and walk.path_cache[0] != self.epoch:
            unknown.append(walk)
            walk = walk.parent
        path = walk.path_cache[1] if walk is not None else b""
        for each in reversed(unknown):
            path = join(path, each.name)
            each.path_cache = (self.epoch, path)
        return path

    def free_number(self, *preferred: int) -> int:
        """Return the first of these numbers that no live node has, else a spare one."""
        for number in preferred:
            number &= self._mask
            if number > ROOT_NUMBER and number not in self._by_number:
                return number
        while self._spare in self._by_number:
            self._spare += 1
        return self._spare

    def add(self, node: Node, parent: Dir, name: bytes, in_upper: bool) -> None:
        """Give a node a name and take it into the table; it is idle until the kernel or a handle uses it."""
        if isinstance(node, File):  # what `attach` does, for the kind that most lookups find
            parent.children[name] = node
            self._idle.pop(parent.number, None)
            node.names[parent, name] = in_upper
            self.unnamed.discard(node)
        else:
            self.attach(node, parent, name, in_upper)
        self._by_number[node.number] = node
        if not (node.lookups or node.handles or node.copying_up or (isinstance(node, Dir) and node.children)):
            self._idle[node.number] = node
            if len(self._idle) > _IDLE:
                self._drop_oldest()

    def add_root(self, root: Dir) -> None:
        """Take in the root, which is never idle."""
        self._by_number[root.number] = root

    def add_unnamed(self, node: Node) -> None:
        """Take in a node without a name; the caller opens a handle of it before anything else happens."""
        self._by_number[node.number] = node

    def add_key(self, node: File, key: Key) -> None:
        """Find a file by this real object, too."""
        node.keys += (key,)
        self._by_key[key] = node

    def attach(self, node: Node, parent: Dir, name: bytes, in_upper: bool) -> None:
        """Give a node a name; a directory has only one."""
        parent.children[name] = node
        self._idle.pop(parent.number, None)
        if isinstance(node, File):
            node.names[parent, name] = in_upper
            self.unnamed.discard(node)
        elif isinstance(node, Dir) and (node.parent is not parent or node.name != name):
            node.parent, node.name = parent, name
            self.epoch += 1

    def detach(self, node: Node, parent: Dir, name: bytes) -> None:
        """Remove a name from a node."""
        parent.children.pop(name, None)
        if isinstance(node, File):
            node.names.pop((parent, name), None)
            if not node.names:
                self.unnamed.add(node)
        self._make_idle(parent)

    def remember(self, node: Node, count: int = 1) -> None:
        """Count lookups in replies to the kernel."""
        node.lookups += count
        self._idle.pop(node.number, None)

    def forget(self, number: int, count: int) -> None:
        """Take back lookups that the kernel has forgotten (FORGET)."""
        node = self._by_number.get(number)
        if node is not None and number != ROOT_NUMBER:
            node.lookups -= count
            self._make_idle(node)

    def is_held(self, number: int) -> bool:
        """Return whether the kernel holds lookups of a number."""
        node = self._by_number.get(number)
        return node is not None and node.lookups > 0

    def released(self, node: Node) -> None:
        """A handle of the node has been closed: the node may be idle now."""
        self._make_idle(node)

    def close(self) -> None:
        """Close every descriptor that a node holds."""
        for node in self._by_number.values():
            _close_descriptors(node)
        self._by_number.clear()
        self._by_key.clear()
        self._idle.clear()
        self.unnamed.clear()

    def _make_idle(self, node: Node) -> None:
        if _is_used(node) or self._by_number.get(node.number) is not node:
            return
        if (isinstance(node, Dir) and node.removed) or (isinstance(node, File) and not node.names):
            self._drop(node)
            return
        self._idle[node.number] = node
        self._idle.move_to_end(node.number)
        self._drop_oldest()

    def keep(self, kept: bool) -> None:
        """Drop no idle node while `kept`: another thread may be working with it."""
        self._kept = kept
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        # A dropped node may leave an idle parent, which waits for its turn in this very loop.
        if self._kept:
            return
        self._kept = True
        try:
            while len(self._idle) > _IDLE:
                _, oldest = self._idle.popitem(last=False)
                if not _is_used(oldest):
                    self._drop(oldest)
        finally:
            self._kept = False

    def _drop(self, node: Node) -> None:
        del self._by_number[node.number]
        self._idle.pop(node.number, None)
        _close_descriptors(node)
        if isinstance(node, File):
            self.unnamed.discard(node)
            for key in node.keys:
                if self._by_key.get(key) is node:
                    del self._by_key[key]
            for parent, name in list(node.names):
                self._leave(node, parent, name)
        elif isinstance(node, Dir):
            for notify in self.on_drop:
                notify(node)
            if node.parent is not None:
                self._leave(node, node.parent, node.name)

    def _leave(self, node: Node, parent: Dir, name: bytes) -> None:
        if parent.children.get(name) is node:
            del parent.children[name]
        self._make_idle(parent)


def _is_used(node: Node) -> bool:
    if node.lookups > 0 or node.handles > 0 or node.copying_up or node.number == ROOT_NUMBER:
        return True
    return isinstance(node, Dir) and bool(node.children)


def _close_descriptors(node: Node) -> None:
    if node.orphan is not None:
        sysio.close(node.orphan)
        node.orphan = None
    if isinstance(node, File):
        close_backing(node)


def close_backing(node: File) -> None:
    """Close all descriptors through which handles of a file read and write."""
    for fd in (node.reader, node.writer):
        if fd is not None:
            sysio.close(fd)
    node.reader = node.writer = None


def close_unused_backing(node: Node) -> None:
    """Close the descriptors of a file without open handles: copy-up for a truncation leaves one open."""
    if isinstance(node, File) and not node.handles:
        close_backing(node)
