"""Nodes: what the kernel knows by a number, each one object of the merged tree, and the table that owns them.

A node lives while the kernel counts look-ups of it, while a handle is open, while it has children that live, and a
little longer (`_IDLE`). All state here changes on one loop only; threads never see a node (design, D9).
"""

import itertools
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.tree.layer import Layer
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
    """A place in a lower layer that holds anything but a directory."""

    layer: Layer
    path: bytes
    name: bytes


class InheritedAttributes(NamedTuple):
    """What a new object gets from its directory: the group if `set_group`, and the default ACL if there is one."""

    set_group: bool
    group: int
    acl: bytes | None


class Node:
    """What directories and other nodes have in common. `kind` is the S_IFMT part of the mode.

    appeared: when the upper last got a name of it, 0 for not in our time; its names are durable where the directory has
    been synced since.
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
    """A directory: parts in the upper (`in_upper`) and in lower layers, top first.

    below: the merged names of the lower parts, index of the parts that make up each; they never change, so this is
    built at most once. upper_names: the kinds the upper holds, kept in step with our own changes. Both are None until
    somebody needs them. sealed: what former uppers hold, the newest first, that `below` does not count yet.
    changed, synced: when names in the upper last changed, and up to when that is durable. owed: directories that must
    be durable before this one is, because what lies here now has left something there, and since when. heirloom: what
    objects made in it get from it, None until somebody makes one and whenever its attributes have changed.
    """

    __slots__ = (
        "below",
        "changed",
        "children",
        "impure",
        "inherited",
        "lower",
        "name",
        "opaque",
        "owed",
        "parent",
        "path_cache",
        "redirect_denied",
        "removed",
        "sealed",
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
        self.below: dict[bytes, tuple[int, ...]] | None = None
        self.upper_names: dict[bytes, Kind] | None = None
        self.sealed: tuple[dict[bytes, Kind], ...] = ()
        self.changed = 0
        self.synced = 0
        self.owed: dict[Dir, int] | None = None
        self.path_cache: tuple[int, bytes] = (-1, b"")

    def gain(self, name: bytes, kind: Kind, node: Node) -> None:
        """Record that the upper now holds a node under a name."""
        self.note(name, kind)
        node.appeared = self.changed

    def note(self, name: bytes, kind: Kind) -> None:
        """Record what the upper now holds under a name; ABSENT for nothing."""
        self.changed = next(_moments)
        if self.upper_names is None:
            return
        if kind is Kind.ABSENT:
            self.upper_names.pop(name, None)
        else:
            self.upper_names[name] = kind

    def owe(self, *left: "Dir") -> None:
        """Note that what has a name here now has left these directories.

        Were the name here durable and what took its place there not (nothing, a whiteout, what it was exchanged with),
        an object would show twice, or not at all: btrfs makes durable what is asked for, and no more.
        """
        debts = [*self.debts(), *left, *(each for old in left for each in old.debts())]
        if debts:
            self.owed = dict.fromkeys(debts, self.changed)

    def debts(self) -> "list[Dir]":
        """Return the directories of the upper to be synced before this one: where one was removed, what held it."""
        return [_standing(left) for left, since in (self.owed or {}).items() if self.synced < since]

    def seal(self) -> None:
        """Note that the upper is about to become the first of the lower parts; its listing is merged when needed."""
        if not self.lower:
            self.below, self.sealed = {}, ()
        if self.below is None or self.upper_names is None:
            self.below, self.sealed = None, ()
        else:
            self.sealed = (self.upper_names, *self.sealed)

    def is_below(self, other: "Dir") -> bool:
        """Return whether this directory is `other` or lies in it."""
        walk: Dir | None = self
        while walk is not None and walk is not other:
            walk = walk.parent
        return walk is other


def _standing(directory: Dir) -> Dir:
    while directory.removed and directory.parent is not None:
        directory = directory.parent
    return directory


class File(Node):
    """Anything but a directory.

    names: every name known of it, with whether that name exists in the upper. lower: where it lies (or came from)
    below. sole: what lies there is known to have no other name. data: where its data lies while the upper holds
    metadata only. index: its entry in the index, if it has one. nlink_delta: what the union's link count is beyond that
    of the real object that holds it.
    reader, writer: the descriptors through which all its handles read and write, used on the loop alone: a thread gets
    a duplicate, so one that is replaced can be closed. sync_error: the errno of a failed fsync, 0 for none.
    unmarked: when the mark went that its data lies below, 0 where that is durable.
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
        """Note that all data lies in the upper now, and that the mark has gone which said otherwise."""
        self.data = None
        self.unmarked = next(_moments)


class NodeTable:
    """All nodes by number, and the files by the real objects that they are."""

    def __init__(self, ino32: bool) -> None:
        self._by_number: dict[int, Node] = {}
        self.find = self._by_number.get  # the node with a number, None for none; each request asks
        self._by_key: dict[Key, File] = {}
        self._idle: OrderedDict[int, Node] = OrderedDict()
        self._kept = False
        self._mask = _MASK_32 if ino32 else -1
        self._spare = _FIRST_SPARE_32 if ino32 else _FIRST_SPARE
        self.unnamed: set[File] = set()  # files that have lost every name that is known of them
        self.on_drop: list[Callable[[Dir], None]] = []  # are told of each directory that leaves the table
        self.epoch = 0  # grows when a directory moves: cached paths of an older epoch are void

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_number.values())

    def by_key(self, key: Key) -> File | None:
        """Return the live file that is the real object `key`."""
        return self._by_key.get(key)

    def free_number(self, *preferred: int) -> int:
        """Return the first of these numbers that no live node has, else one that nothing else uses."""
        for number in preferred:
            number &= self._mask
            if number > ROOT_NUMBER and number not in self._by_number:
                return number
        while self._spare in self._by_number:
            self._spare += 1
        return self._spare

    def add(self, node: Node) -> None:
        """Take a new node, which has its name, into the table; nobody counts on it yet."""
        self._by_number[node.number] = node
        if not _is_used(node):
            self._idle[node.number] = node
            self._drop_oldest()

    def add_unnamed(self, node: Node) -> None:
        """Take in a node without a name; the caller gives it a handle before anything else happens."""
        self._by_number[node.number] = node

    def add_key(self, node: File, key: Key) -> None:
        """Let a file be found by one more real object that it is."""
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
        """Take a name away from a node."""
        parent.children.pop(name, None)
        if isinstance(node, File):
            node.names.pop((parent, name), None)
            if not node.names:
                self.unnamed.add(node)
        self._rest(parent)

    def remember(self, node: Node, count: int = 1) -> None:
        """Count look-ups that the kernel was told of."""
        node.lookups += count
        self._idle.pop(node.number, None)

    def forget(self, number: int, count: int) -> None:
        """Count look-ups that the kernel has given back."""
        node = self._by_number.get(number)
        if node is not None and number != ROOT_NUMBER:
            node.lookups -= count
            self._rest(node)

    def is_held(self, number: int) -> bool:
        """Return whether the kernel counts look-ups of a number."""
        node = self._by_number.get(number)
        return node is not None and node.lookups > 0

    def released(self, node: Node) -> None:
        """A handle of the node has been closed: it may rest now."""
        self._rest(node)

    def close(self) -> None:
        """Close every descriptor that a node holds."""
        for node in self._by_number.values():
            _close_descriptors(node)
        self._by_number.clear()
        self._by_key.clear()
        self._idle.clear()
        self.unnamed.clear()

    def _rest(self, node: Node) -> None:
        if _is_used(node) or self._by_number.get(node.number) is not node:
            return
        if (isinstance(node, Dir) and node.removed) or (isinstance(node, File) and not node.names):
            self._drop(node)
            return
        self._idle[node.number] = node
        self._idle.move_to_end(node.number)
        self._drop_oldest()

    def keep(self, kept: bool) -> None:
        """Let no node go that only rests, or do so again: somebody may be at work on it."""
        self._kept = kept
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        # Who goes may leave a parent that rests from now on: that one waits for its turn in this very loop.
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
            for told in self.on_drop:
                told(node)
            if node.parent is not None:
                self._leave(node, node.parent, node.name)

    def _leave(self, node: Node, parent: Dir, name: bytes) -> None:
        if parent.children.get(name) is node:
            del parent.children[name]
        self._rest(parent)


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
