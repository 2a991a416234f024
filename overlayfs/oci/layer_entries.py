"""Listing a layer, or the merged tree of a stack, as entries for a tar archive, in a canonical order and form.

A directory comes first, then its opaque mark, then its whiteouts, then its other entries; names are sorted as bytes.
The first name of a hard-linked file has the data. Whiteouts have neither owner nor time, so that equal layers give
equal archives, whichever user deleted something in them, and when.

Archives have no form for redirects and metacopies. A layer with these marks is resolved over the layers it was made on:
a directory that was moved is listed in full at its new path, and a file gets its data from a lower layer.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError, oserror
from overlayfs.format import opaque, override, whiteout, xattrs
from overlayfs.format.xattrs import Mode
from overlayfs.fs.config import StackConfig
from overlayfs.fs.nodes import Dir, File, LowerFile, Node
from overlayfs.fs.overlay import Overlay
from overlayfs.oci.tar_entry import Kind, TarEntry, shown
from overlayfs.tree.dirfds import DirFds, default_capacity
from overlayfs.tree.layer import Entry as LayerEntry
from overlayfs.tree.layer import Layer, join
from overlayfs.tree.stats import AnyStat, resized
from overlayfs.union.resolve import Kind as NameKind

_KINDS = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHARACTER, stat.S_IFBLK: Kind.BLOCK,
}  # fmt: skip
_MACHINE_XATTRS = frozenset((b"security.selinux", b"system.nfs4_acl"))  # belong to a machine, not to a layer
_LOWER_MARKS = frozenset(xattrs.prefix(mode) + suffix for mode in Mode for suffix in (xattrs.REDIRECT, xattrs.METACOPY))

OpenData = Callable[[], int]


class EntryWithData(NamedTuple):
    """An entry and, for a file, a function that opens its data for reading; the caller closes the descriptor."""

    entry: TarEntry
    open: OpenData | None = None


class Omissions:
    """What an archive cannot hold: numbers of sockets, and of attributes without a value or with ``=`` in the name."""

    def __init__(self) -> None:
        self.sockets = 0
        self.attributes = 0

    def sentences(self) -> list[str]:
        """Return a sentence for each kind of thing that was left out."""
        facts = (
            (self.sockets, "sockets were left out: archives have no form for them"),
            (self.attributes, "extended attributes were left out: they have no value, or = in their name"),
        )
        return [f"{count} {text}" for count, text in facts if count]


@contextmanager
def layer_entries(tree: bytes, below: Sequence[bytes], omissions: Omissions) -> Iterator[Iterator[EntryWithData]]:
    """Yield an iterator over the entries of the layer in the directory `tree`, whiteouts included.

    below: the layers that it was made on, top first, if it has redirects or metacopies. The iterator must be used
    inside the context. It raises `UserError`, with the path, for what cannot be read.
    """
    with ExitStack() as undo:
        if not below:
            yield _flatten(_PlainLayer(tree, omissions, undo).walk())
        else:
            yield _flatten(_ResolvedLayer(tree, below, omissions, undo).walk())


@contextmanager
def merged_entries(
    stack: Sequence[bytes], omissions: Omissions, hidden: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Iterator[EntryWithData]]:
    """Yield an iterator over the entries of the merged tree of a stack, top first; it has no whiteouts.

    hidden: directories to leave out, as (st_dev, st_ino). Use and errors are those of `layer_entries`.
    """
    overlay = Overlay(StackConfig(lower=tuple(stack), hidden=hidden))
    try:
        yield _flatten(_MergedTree(overlay, omissions).walk())
    finally:
        overlay.close()


_Walk = Iterator["EntryWithData | _Walk"]
"""Yields the entries of a directory, and after each subdirectory the walk of that."""


def _flatten(walk: _Walk) -> Iterator[EntryWithData]:
    """Yield the entries of a walk, depth first, and without recursion: trees may be deeper than the stack allows."""
    pending = [walk]
    while pending:
        found = next(pending[-1], None)
        if found is None:
            pending.pop()
        elif isinstance(found, EntryWithData):
            yield found
        else:
            pending.append(found)


class _Location(NamedTuple):
    """Where an object is stored, and the stored names of its extended attributes."""

    layer: Layer
    dirfd: int
    name: bytes
    attributes: list[bytes]


def _locate(layer: Layer, path: bytes, name: bytes) -> _Location:
    dirfd = layer.dirfd(path)
    return _Location(layer, dirfd, name, sysio.listxattr_at(dirfd, name))


class _EntryBuilder:
    """Makes entries of stored objects, and hard links of further names of a file."""

    def __init__(self, omissions: Omissions) -> None:
        self._omissions = omissions
        self._linked: dict[tuple[int, int], list[bytes | int]] = {}

    def build(self, path: bytes, location: _Location, found: AnyStat, data: OpenData | None) -> EntryWithData | None:
        """Return the entry of an object; None for one that archives cannot hold."""
        kind = _KINDS.get(stat.S_IFMT(found.st_mode))
        if kind is None:
            self._omissions.sockets += 1
            return None
        first = self._first_name(path, kind, found)
        entry = TarEntry(
            path,
            kind,
            stat.S_IMODE(found.st_mode),
            found.st_uid,
            found.st_gid,
            found.st_mtime_ns,
        )
        if first is not None:
            return EntryWithData(entry._replace(kind=Kind.HARDLINK, target=first))
        if location.attributes:
            entry = entry._replace(xattrs=self._xattrs(location))
        if kind is Kind.FILE:
            return EntryWithData(entry._replace(size=found.st_size), data)
        if kind is Kind.SYMLINK:
            return EntryWithData(entry._replace(target=sysio.readlink_at(location.dirfd, location.name)))
        if kind in (Kind.CHARACTER, Kind.BLOCK):
            return EntryWithData(entry._replace(device=(os.major(found.st_rdev), os.minor(found.st_rdev))))
        return EntryWithData(entry)

    def _first_name(self, path: bytes, kind: Kind, found: AnyStat) -> bytes | None:
        """Return the first name of a hard-linked file, None if this is it; forget it after the last name."""
        if kind is Kind.DIRECTORY or found.st_nlink < 2:
            return None
        key = (found.st_dev, found.st_ino)
        known = self._linked.setdefault(key, [path, found.st_nlink])
        first, left = known
        assert isinstance(first, bytes) and isinstance(left, int)
        known[1] = left - 1
        if left == 1:
            del self._linked[key]
        return None if left == found.st_nlink else first

    def _xattrs(self, location: _Location) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for stored in location.attributes:
            attribute = _exported_name(stored, location.layer.override is not None)
            if attribute is None or attribute in _MACHINE_XATTRS:
                continue
            value = sysio.getxattr_at(location.dirfd, location.name, stored)
            if value and b"=" not in attribute:
                found[attribute] = value
            else:
                self._omissions.attributes += 1
        return found


def _exported_name(stored: bytes, overridden: bool) -> bytes | None:
    covered = override.uncovered_name(stored) if overridden else None
    return covered or xattrs.shown_name(stored, overridden)


@contextmanager
def _naming_errors(path: bytes) -> Iterator[None]:
    """Raise an OSError as `UserError` with the path at which it occurred."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {shown(path) or '/'}: {error.strerror}") from error


def _list_entries(layer: Layer, path: bytes) -> dict[bytes, LayerEntry]:
    """Return the entries of a directory in one layer, sorted by name."""
    with _naming_errors(path):
        names = sorted(layer.names(path))
    found = {}
    for name in names:
        with _naming_errors(join(path, name)):
            found[name] = layer.probe(path, name)
    return found


def _whiteouts(path: bytes, entries: Mapping[bytes, LayerEntry]) -> Iterator[EntryWithData]:
    for name, entry in entries.items():
        if entry.kind is NameKind.WHITEOUT:
            yield EntryWithData(TarEntry(join(path, whiteout.name_for(name)), Kind.FILE, 0))


def _opaque_mark(path: bytes) -> EntryWithData:
    return EntryWithData(TarEntry(join(path, whiteout.OPAQUE_MARK), Kind.FILE, 0))


class _PlainLayer:
    """A layer without redirects and metacopies, which is listed as it is stored."""

    def __init__(self, tree: bytes, omissions: Omissions, undo: ExitStack) -> None:
        root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(sysio.close, root)
        dirfds = DirFds(default_capacity())
        undo.callback(dirfds.close)
        mode = Mode.TRUSTED if os.geteuid() == 0 else Mode.USER
        self._layer = Layer(0, root, dirfds, mode, lowest=False)
        self._builder = _EntryBuilder(omissions)

    def walk(self) -> _Walk:
        yield from self._entry(b"", b"", self._layer.stat(b"", b""))
        is_opaque = _is_root_opaque(self._layer)
        if is_opaque:
            yield _opaque_mark(b"")
        yield self._walk(b"", is_opaque)

    def _walk(self, path: bytes, is_opaque: bool) -> _Walk:
        """Walk a directory; whiteouts in an opaque one mean nothing and are left out."""
        entries = _list_entries(self._layer, path)
        if not is_opaque:
            yield from _whiteouts(path, entries)
        for name, entry in entries.items():
            if entry.stat is None or entry.kind in (NameKind.WHITEOUT, NameKind.ABSENT):
                continue
            yield from self._entry(path, name, entry.stat)
            if stat.S_ISDIR(entry.stat.st_mode):
                child_is_opaque = self._layer.marks(path, name, entry.stat).opaque
                if child_is_opaque:
                    yield _opaque_mark(join(path, name))
                yield self._walk(join(path, name), child_is_opaque)

    def _entry(self, parent: bytes, name: bytes, found: AnyStat) -> Iterator[EntryWithData]:
        path = join(parent, name)
        with _naming_errors(path):
            location = _locate(self._layer, parent, name)
            if not _LOWER_MARKS.isdisjoint(location.attributes):
                raise UserError(f"{shown(path)} depends on lower layers, and the layer has no record of them")
            entry = self._builder.build(path, location, found, lambda: self._layer.open_file(parent, name))
        if entry is not None:
            yield entry


class _MergedTree:
    """The tree that a read-only overlay shows."""

    def __init__(self, overlay: Overlay, omissions: Omissions) -> None:
        self.overlay = overlay
        self._builder = _EntryBuilder(omissions)

    def walk(self) -> _Walk:
        root = self.overlay.root
        yield from self.entry(b"", root)
        yield self.walk_directory(b"", root)

    def walk_directory(self, path: bytes, node: Node) -> _Walk:
        """Walk what is in a directory."""
        with _naming_errors(path):
            names = sorted(self.overlay.list_names(node))
        for name in names:
            child_path = join(path, name)
            with _naming_errors(child_path):
                child = self.overlay.lookup(node, name)
            yield from self.entry(child_path, child)
            if isinstance(child, Dir):
                yield self.walk_directory(child_path, child)

    def entry(self, path: bytes, node: Node) -> Iterator[EntryWithData]:
        """Yield the entry of one node; nothing for one that archives cannot hold."""
        with _naming_errors(path):
            entry = self._build(path, node)
        if entry is not None:
            yield entry

    def _build(self, path: bytes, node: Node) -> EntryWithData | None:
        if isinstance(node, Dir):
            layer, stored = node.lower[0]
            return self._builder.build(path, _locate(layer, stored, b""), layer.stat(stored, b""), None)
        assert isinstance(node, File) and node.lower is not None
        layer, stored, name = node.lower
        found = resized(layer.stat(stored, name), self.overlay.attributes(node).size)
        data = node.data or node.lower
        return self._builder.build(path, _locate(layer, stored, name), found, lambda: _open(data, path))


def _open(file: LowerFile, path: bytes) -> int:
    """Open the data of a file that is shown at `path`."""
    with _naming_errors(path):
        if not file.name:
            raise oserror(errno.EIO, file.path)
        return file.layer.open_file(file.path, file.name)


class _ResolvedLayer:
    """A layer with redirects and metacopies, listed with the help of the stack that it was made on."""

    def __init__(self, tree: bytes, below: Sequence[bytes], omissions: Omissions, undo: ExitStack) -> None:
        self._merged = Overlay(StackConfig(lower=(tree, *below)))
        undo.callback(self._merged.close)
        self._lower = Overlay(StackConfig(lower=tuple(below)))
        undo.callback(self._lower.close)
        self._merged_tree = _MergedTree(self._merged, omissions)
        self._layer = self._merged.root.lower[0].layer

    def walk(self) -> _Walk:
        root = self._merged.root
        yield from self._merged_tree.entry(b"", root)
        is_opaque = _is_root_opaque(self._layer)
        if is_opaque:
            yield _opaque_mark(b"")
        yield self._walk(b"", root, self._lower.root, is_opaque)

    def _walk(self, path: bytes, node: Dir, lower: Node | None, is_opaque: bool) -> _Walk:
        """Walk a directory that has not moved; `lower` is what the lower layers have at its path."""
        entries = _list_entries(self._layer, path)
        if not is_opaque:
            yield from _whiteouts(path, entries)
        for name, entry in entries.items():
            if entry.stat is None or entry.kind in (NameKind.WHITEOUT, NameKind.ABSENT):
                continue
            with _naming_errors(join(path, name)):
                child = self._merged.lookup(node, name)
            yield from self._merged_tree.entry(join(path, name), child)
            if isinstance(child, Dir):
                yield from self._directory(path, name, child, entry.stat, self._lower_child(lower, name))

    def _directory(self, parent: bytes, name: bytes, node: Dir, found: AnyStat, lower: Node | None) -> _Walk:
        path = join(parent, name)
        marks = self._layer.marks(parent, name, found)
        moved = marks.redirect is not None
        # A directory that moved over one of a lower layer hides it: in the archive that takes an opaque mark.
        if marks.opaque or (moved and isinstance(lower, Dir)):
            yield _opaque_mark(path)
        if moved:
            yield self._merged_tree.walk_directory(path, node)
        else:
            yield self._walk(path, node, None if marks.opaque else lower, marks.opaque)

    def _lower_child(self, lower: Node | None, name: bytes) -> Node | None:
        if not isinstance(lower, Dir):
            return None
        try:
            return self._lower.lookup(lower, name)
        except FileNotFoundError:
            return None


def _is_root_opaque(layer: Layer) -> bool:
    return has_opaque_root(layer.root) or layer.marks(b"", b"", layer.stat(b"", b"")).opaque


def has_opaque_root(root: int) -> bool:
    """Return whether the root of a layer, open as `root`, has the xattr that hides all lower layers.

    A mount ignores it there. Instead, an image begins with such a layer (`image.image_record`).
    """
    values = (sysio.find_xattr(root, b"", xattrs.prefix(mode) + xattrs.OPAQUE) for mode in Mode)
    return any(opaque.is_opaque(value) for value in values)
