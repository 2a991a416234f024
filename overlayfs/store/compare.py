"""Comparison: the changes from one tree to another, each of them a stack of layers.

Both are read as a mount would show them, so redirects, metadata-only copies, opaque directories and whiteouts count by
their effect. Directories that both trees have from the same layers are not read.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.format import origin, xattrs
from overlayfs.fs.config import StackConfig
from overlayfs.fs.nodes import Dir, File, Key, Node
from overlayfs.fs.overlay import Overlay
from overlayfs.store.entries import is_portable
from overlayfs.tree.layer import Layer, join

ADDED, CHANGED, DELETED = "A", "C", "D"
_BLOCK = 1 << 20
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


class Tree(NamedTuple):
    """One operand. layers: directories, top first; without any, the tree is empty.

    plain: the positions of layers that are known to have no redirects. link_index: if the top layer is an upper, its
    index, the directory that joins hard links copied up under only one of their names.
    """

    layers: tuple[bytes, ...]
    plain: frozenset[int] = frozenset()
    link_index: bytes | None = None


class Change(NamedTuple):
    """A path added ("A"), changed ("C") or deleted ("D"), relative to the root, which is ``b""``.

    before, after: bytes of regular files. A deletion is listed once, for the topmost name, and counts everything below.
    """

    kind: str
    path: bytes
    before: int = 0
    after: int = 0


Progress = Callable[[int], None]
"""progress(names): called periodically with the number of names compared so far."""


def compare(before: Tree, after: Tree, progress: Progress | None = None) -> Iterator[Change]:
    """Yield the changes from `before` to `after`: a directory before its entries, names sorted as bytes.

    Two objects are equal if type, owner, mode, size, modification time, device, target, extended attributes, content
    and the set of hard-link names are. A directory with a change in it is changed. Neither tree may change meanwhile.
    Raises UserError if something cannot be read.
    """
    with ExitStack() as closing:
        sides = _Side(before), _Side(after)
        for side in sides:
            closing.callback(side.close)
        try:
            yield from _Comparison(*sides, progress).run()
        except OSError as error:
            raise UserError(f"cannot compare: {error.strerror}{_error_path(error)}") from error


def measured(before: Tree, after: Tree, changes: Iterable[Change]) -> Iterator[Change]:
    """Yield the given changes with their bytes; what is gone meanwhile counts 0."""
    with ExitStack() as closing:
        sides = _Side(before), _Side(after)
        for side in sides:
            closing.callback(side.close)
        comparison = _Comparison(*sides, None)
        yield from map(comparison.measure, changes)


def _error_path(error: OSError) -> str:
    return f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, bytes) else ""


# --- one tree ----------------------------------------------------------------------------------------------


class _Object(NamedTuple):
    """What is compared of an object. about: mode, uid, gid, mtime_ns, rdev. size: bytes of a regular file, else 0.

    key: identifies the inode if it has several names. sources: the real objects with its metadata and data, None for
    a directory.
    """

    kind: int
    about: tuple[int, ...]
    size: int
    key: Key | None
    sources: tuple[Key, ...] | None


class _Side:
    """One open tree; its nodes are those of a read-only overlay of all layers."""

    def __init__(self, tree: Tree) -> None:
        self._overlay = Overlay(StackConfig(lower=tree.layers)) if tree.layers else None
        self._index = _open_index(tree.link_index)
        self._plain = tree.plain
        self._identities: dict[int, Key] = {}
        self.root = self._overlay.root if self._overlay is not None else None

    def close(self) -> None:
        """Close the overlay and the index."""
        if self._overlay is not None:
            self._overlay.close()
        if self._index is not None:
            sysio.close(self._index)

    def names(self, node: Node | None) -> set[bytes]:
        """Return the names in a directory; none in anything else."""
        return set(self.overlay.list_names(node)) if isinstance(node, Dir) else set()

    def child(self, node: Node | None, name: bytes) -> Node | None:
        """Return the node under a name of a directory, or None."""
        try:
            return self.overlay.lookup(node, name) if isinstance(node, Dir) else None
        except FileNotFoundError:
            return None

    def resolve(self, path: bytes) -> Node | None:
        """Return the node at a path, or None."""
        node: Node | None = self.root
        for name in filter(None, path.split(b"/")):
            node = self.child(node, name)
        return node

    def linked_names(self) -> dict[Key, list[bytes]]:
        """Return all names of each inode with several, in the order of a walk."""
        found: dict[Key, list[bytes]] = {}
        pending: list[tuple[bytes, Node | None]] = [(b"", self.root)]
        while pending:
            path, node = pending.pop()
            if isinstance(node, Dir):
                names = sorted(self.names(node), reverse=True)
                pending.extend((join(path, name), self.child(node, name)) for name in names)
            elif node is not None and (key := self.describe(node).key) is not None:
                found.setdefault(key, []).append(path)
        return found

    @property
    def overlay(self) -> Overlay:
        """The overlay of a tree that is not empty."""
        assert self._overlay is not None
        return self._overlay

    # --- identity --------------------------------------------------------------------------------------

    def real_directories(self, node: Dir) -> tuple[tuple[Key, bytes], ...]:
        """Return (layer, path) of the real directories that a node merges, top first."""
        return tuple((self._identity(part.layer), part.path) for part in node.lower)

    def is_self_contained(self, node: Dir) -> bool:
        """Return whether its real directories determine everything below: no redirect leads out, no index leads in."""
        return self._index is None and all(part.layer.index in self._plain for part in node.lower)

    def layers_from(self, node: Dir) -> tuple[Key, ...] | None:
        """Return the layers from that of a directory's topmost real one down, which determine everything below."""
        if self._index is not None or self._overlay is None:
            return None
        return tuple(self._identity(part.layer) for part in self._overlay.root.lower[node.lower[0].layer.index :])

    def _identity(self, layer: Layer) -> Key:
        found = self._identities.get(layer.index)
        if found is None:
            about = sysio.stat_at(layer.root, b"")
            found = self._identities[layer.index] = (about.st_dev, about.st_ino)
        return found

    # --- attributes and content ------------------------------------------------------------------------

    def describe(self, node: Node) -> _Object:
        """Return what is compared of a node, except extended attributes and content."""
        if isinstance(node, File):
            entry = self._index_entry(node)
            if entry is not None:
                return self._describe_indexed(node, entry)
        found = self.overlay.attributes(node)
        about = (stat.S_IMODE(found.mode), found.uid, found.gid, found.mtime_ns, _rdev(found.mode, found.rdev))
        kind = stat.S_IFMT(found.mode)
        size = found.size if kind == stat.S_IFREG else 0
        if not isinstance(node, File):
            return _Object(kind, about, size, None, None)
        return _Object(kind, about, size, node.keys[0] if found.nlink > 1 else None, self._sources(node, node.keys[0]))

    def _sources(self, node: File, own: Key) -> tuple[Key, ...]:
        if node.data is None or not node.data.name:
            return (own,)
        below = node.data.layer.stat(node.data.path, node.data.name)
        return own, (below.st_dev, below.st_ino)

    def _index_entry(self, node: File) -> bytes | None:
        """Return the name of the index entry that replaces a lower file, or None."""
        if self._index is None or node.lower is None or node.lower.layer.index == 0:
            return None
        layer, path, name = node.lower
        if layer.stat(path, name).st_nlink < 2:
            return None
        came_from = layer.filesystem.origin(sysio.file_handle(layer.dirfd(path), name))
        entry = None if came_from is None else origin.index_name(came_from)
        return entry if entry is not None and sysio.exists_at(self._index, entry) else None

    def _describe_indexed(self, node: File, entry: bytes) -> _Object:
        assert self._index is not None
        found = sysio.stat_at(self._index, entry)
        about = (
            stat.S_IMODE(found.st_mode),
            found.st_uid,
            found.st_gid,
            found.st_mtime_ns,
            _rdev(found.st_mode, found.st_rdev),
        )
        kind, own = stat.S_IFMT(found.st_mode), (found.st_dev, found.st_ino)
        if self._has_own_data(entry):
            return _Object(kind, about, found.st_size if kind == stat.S_IFREG else 0, own, (own,))
        return _Object(kind, about, self.overlay.attributes(node).size, own, self._sources(node, own))

    def _has_own_data(self, entry: bytes) -> bool:
        assert self._index is not None
        return all(
            sysio.find_xattr(self._index, entry, xattrs.prefix(mode) + xattrs.METACOPY) is None for mode in xattrs.Mode
        )

    def details(self, node: Node) -> tuple[bytes, dict[bytes, bytes]]:
        """Return the target of a symbolic link (else ``b""``) and the extended attributes."""
        entry = self._index_entry(node) if isinstance(node, File) else None
        if entry is not None:
            return self._indexed_details(node, entry)
        target = self.overlay.metadata.readlink(node) if node.kind == stat.S_IFLNK else b""
        names = filter(is_portable, self.overlay.metadata.listxattr(node))
        return target, {name: self.overlay.metadata.getxattr(node, name) for name in names}

    def _indexed_details(self, node: Node, entry: bytes) -> tuple[bytes, dict[bytes, bytes]]:
        assert self._index is not None
        target = sysio.readlink_at(self._index, entry) if node.kind == stat.S_IFLNK else b""
        stored = {name: xattrs.shown_name(name) for name in sysio.listxattr_at(self._index, entry)}
        shown = {name: known for name, known in stored.items() if known is not None and is_portable(known)}
        return target, {known: sysio.getxattr_at(self._index, entry, name) for name, known in shown.items()}

    def open(self, node: Node) -> int:
        """Open the content of a regular file for reading."""
        assert isinstance(node, File) and self._overlay is not None
        entry = self._index_entry(node)
        if entry is not None and self._index is not None and self._has_own_data(entry):
            return sysio.open_child(self._index, entry, _READ)
        place = node.data or node.lower
        assert place is not None
        return place.layer.open_file(place.path, place.name)


def _rdev(mode: int, rdev: int) -> int:
    return rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0


def _open_index(path: bytes | None) -> int | None:
    """Open the index of an upper; None if there is none, or if it is empty."""
    if path is None or not os.path.isdir(path):
        return None
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if sysio.list_dir(fd):
        return fd
    sysio.close(fd)
    return None


# --- both --------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """A directory being compared; either node may be missing. announced: one flag, whether it has been yielded."""

    path: bytes
    before: Node | None
    after: Node | None
    names: Iterator[bytes]
    announced: list[bool]


class _Comparison:
    """Walks both trees at once."""

    def __init__(self, before: _Side, after: _Side, progress: Progress | None) -> None:
        self._before = before
        self._after = after
        self._progress = progress
        self._count = 0
        # For each tree: the first name of an inode, among the names that both trees have, by inode.
        self._first: tuple[dict[Key, bytes], dict[Key, bytes]] = ({}, {})
        self._names_of: tuple[dict[Key, list[bytes]], dict[Key, list[bytes]]] | None = None
        self._counted: tuple[set[Key], set[Key]] = (set(), set())

    def run(self) -> Iterator[Change]:
        """Yield all changes."""
        # Not recursive: a tree may be deeper than the interpreter's stack.
        levels: list[_Level] = []
        yield from self._enter(levels, b"", self._before.root, self._after.root)
        while levels:
            level = levels[-1]
            name = next(level.names, None)
            if name is None:
                levels.pop()
                continue
            before, after = self._before.child(level.before, name), self._after.child(level.after, name)
            yield from self._enter(levels, join(level.path, name), before, after)

    def _enter(self, levels: list[_Level], path: bytes, before: Node | None, after: Node | None) -> Iterator[Change]:
        """Compare one name, and push a level for the directory under it."""
        self._count += 1
        if self._progress is not None and self._count % 64 == 0:
            self._progress(self._count)
        change = self._compare(path, before, after)
        if change is not None:
            yield from _announce(levels)
            yield change
        if isinstance(after, Dir) and not self._is_same_directory(before, after):
            names = iter(sorted(self._names(before, after)))
            levels.append(_Level(path, before, after, names, [change is not None or not path]))

    def _names(self, before: Node | None, after: Dir) -> set[bytes]:
        return self._after.names(after) | self._before.names(before)

    def _is_same_directory(self, before: Node | None, after: Dir) -> bool:
        """Return whether both trees have everything in a directory from the same layers.

        A redirect inside may lead to any lower layer, so either there is none, or the lower layers are the same too.
        """
        if not isinstance(before, Dir) or before.redirect_denied or after.redirect_denied:
            return False
        if self._before.real_directories(before) != self._after.real_directories(after):
            return False
        if self._before.is_self_contained(before) and self._after.is_self_contained(after):
            return True
        layers = self._before.layers_from(before)
        return layers is not None and layers == self._after.layers_from(after)

    def _compare(self, path: bytes, before: Node | None, after: Node | None) -> Change | None:
        if before is None and after is None:
            return None
        if after is None:
            return Change(DELETED, path, before=self._size_of(before))
        now = self._after.describe(after)
        if before is None:
            return None if not path else Change(ADDED, path, after=self._once(1, now))
        was = self._before.describe(before)
        linked_alike = self._is_linked_alike(path, was, now)
        if linked_alike and self._is_same(before, was, after, now):
            return None
        return Change(CHANGED, path, self._removed(before, after), self._once(1, now))

    def _is_linked_alike(self, path: bytes, was: _Object, now: _Object) -> bool:
        """Return whether a name is linked to the same other names in both trees, among the names that both have."""
        if was.key is None and now.key is None:
            return True
        firsts = [
            path if found.key is None else known.setdefault(found.key, path)
            for known, found in zip(self._first, (was, now), strict=True)
        ]
        if was.key != now.key:
            # One of the names may be in a directory that is not read.
            firsts = [self._first_of_all(side, path, found.key) for side, found in enumerate((was, now))]
        return firsts[0] == firsts[1]

    def _first_of_all(self, side: int, path: bytes, key: Key | None) -> bytes:
        """Return the first name of an inode in one tree that exists in the other tree too."""
        if key is None:
            return path
        if self._names_of is None:
            self._names_of = self._before.linked_names(), self._after.linked_names()
        other = self._after if side == 0 else self._before
        names = self._names_of[side].get(key, [])
        return next((name for name in names if isinstance(other.resolve(name), File)), path)

    def _is_same(self, before: Node, was: _Object, after: Node, now: _Object) -> bool:
        if was.sources is not None and was.sources == now.sources:
            return True
        if (was.kind, was.about, was.size) != (now.kind, now.about, now.size):
            return False
        if self._before.details(before) != self._after.details(after):
            return False
        return was.kind != stat.S_IFREG or self._is_same_content(before, after, was.size)

    def _is_same_content(self, before: Node, after: Node, size: int) -> bool:
        with ExitStack() as closing:
            fds = [self._before.open(before)]
            closing.callback(sysio.close, fds[0])
            fds.append(self._after.open(after))
            closing.callback(sysio.close, fds[1])
            return _is_equal(fds[0], fds[1], size)

    # --- sizes -----------------------------------------------------------------------------------------

    def measure(self, change: Change) -> Change:
        """Return a change with its bytes filled in."""
        was, now = self._before.resolve(change.path), self._after.resolve(change.path)
        removed = 0
        if change.kind != ADDED and was is not None:
            removed = self._removed(was, now)
        added = 0 if change.kind == DELETED or now is None else self._once(1, self._after.describe(now))
        return Change(change.kind, change.path, removed, added)

    def _removed(self, before: Node, after: Node | None) -> int:
        """Return the bytes removed at a path: everything below it, unless it stays a directory."""
        if isinstance(before, Dir) and not isinstance(after, Dir):
            return self._size_of(before)
        return self._once(0, self._before.describe(before))

    def _once(self, side: int, found: _Object) -> int:
        """Return the size of a file; 0 if it was counted under another name."""
        if found.key is None:
            return found.size
        if found.key in self._counted[side]:
            return 0
        self._counted[side].add(found.key)
        return found.size

    def _size_of(self, node: Node | None) -> int:
        """Return the bytes of all files at and below a node of the first tree."""
        size, pending = 0, [node]
        while pending:
            found = pending.pop()
            if found is None:
                continue
            size += self._once(0, self._before.describe(found))
            if isinstance(found, Dir):
                pending.extend(self._before.child(found, name) for name in self._before.names(found))
        return size


def _announce(levels: list[_Level]) -> Iterator[Change]:
    """Yield the directories above a change that have not been yielded: they are changed."""
    for level in levels:
        if not level.announced[0]:
            level.announced[0] = True
            yield Change(CHANGED, level.path)


def _is_equal(one: int, other: int, size: int) -> bool:
    """Return whether two open files have the same content; `size` is the expected size of both."""
    buffer = memoryview(bytearray(min(max(size, 1), _BLOCK)))
    offset = 0
    while count := sysio.read_into(one, buffer, offset):
        if buffer[:count] != sysio.read_at(other, offset, count):
            return False
        offset += count
    return not sysio.read_at(other, offset, 1)
