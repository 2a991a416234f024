"""What a layer, or the tree that a stack shows, is as entries of an archive: in one order, in one form.

A directory comes first, then its opaque mark, then the deletions in it, then what it holds, names sorted as bytes. The
first name of a hard-linked file carries the data. Deletions have neither owner nor time, for a layer is the same layer
whoever has deleted something in it, and when.

Archives know neither redirect nor metacopy. A layer with these marks is resolved over the layers it was made on: a
directory that was moved is written in full at its new place, and a file gets its data from below.
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
from overlayfs.union.resolve import Kind as Held

_KINDS = {
    stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHARACTER, stat.S_IFBLK: Kind.BLOCK,
}  # fmt: skip
_LOCAL = frozenset((b"security.selinux", b"system.nfs4_acl"))
_MARKED = frozenset(xattrs.prefix(mode) + suffix for mode in Mode for suffix in (xattrs.REDIRECT, xattrs.METACOPY))

OpenData = Callable[[], int]


class EntryWithData(NamedTuple):
    """An entry and, for a file with data, the function that opens it for reading; the caller closes it."""

    entry: TarEntry
    open: OpenData | None = None


_Walk = Iterator["EntryWithData | _Walk"]  # what is found, and the walks into what is found


class Losses:
    """What an archive cannot carry: how many sockets, and how many attributes without a value or with a `=`."""

    def __init__(self) -> None:
        self.sockets = 0
        self.attributes = 0

    def sentences(self) -> list[str]:
        """Return a sentence for each kind of loss."""
        facts = (
            (self.sockets, "sockets were left out: archives have no form for them"),
            (self.attributes, "extended attributes were left out: they have no value, or = in their name"),
        )
        return [f"{count} {text}" for count, text in facts if count]


@contextmanager
def layer_entries(tree: bytes, below: Sequence[bytes], losses: Losses) -> Iterator[Iterator[EntryWithData]]:
    """Give the entries of the layer at `tree`. `below`: the stack it was made on, top first, where its marks need one.

    The iterator must be used inside the context.
    """
    with ExitStack() as undo:
        if not below:
            yield _PlainLayer(tree, losses, undo).items()
        else:
            yield _ResolvedLayer(tree, below, losses, undo).items()


@contextmanager
def merged_entries(
    stack: Sequence[bytes], losses: Losses, hidden: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Iterator[EntryWithData]]:
    """Give the entries of the tree that a stack shows, top first; no deletions. Use it inside the context.

    `hidden`: directories, by (st_dev, st_ino), that are left out.
    """
    overlay = Overlay(StackConfig(lower=tuple(stack), hidden=hidden))
    try:
        yield _MergedTree(overlay, losses).items()
    finally:
        overlay.close()


class _Location(NamedTuple):
    """Where a real object lies, and the names of its attributes as stored."""

    layer: Layer
    dirfd: int
    name: bytes
    attributes: list[bytes]


def _where(layer: Layer, path: bytes, name: bytes) -> _Location:
    dirfd = layer.dirfd(path)
    return _Location(layer, dirfd, name, sysio.listxattr_at(dirfd, name))


class _EntryBuilder:
    """Makes entries of real objects, and joins the names of hard-linked files."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._linked: dict[tuple[int, int], list[bytes | int]] = {}

    def item(self, path: bytes, where: _Location, found: AnyStat, data: OpenData | None) -> EntryWithData | None:
        """Return the entry of an object; None for one that archives cannot hold."""
        kind = _KINDS.get(stat.S_IFMT(found.st_mode))
        if kind is None:
            self._losses.sockets += 1
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
        if where.attributes:
            entry = entry._replace(xattrs=self._xattrs(where))
        if kind is Kind.FILE:
            return EntryWithData(entry._replace(size=found.st_size), data)
        if kind is Kind.SYMLINK:
            return EntryWithData(entry._replace(target=sysio.readlink_at(where.dirfd, where.name)))
        if kind in (Kind.CHARACTER, Kind.BLOCK):
            return EntryWithData(entry._replace(device=(os.major(found.st_rdev), os.minor(found.st_rdev))))
        return EntryWithData(entry)

    def _first_name(self, path: bytes, kind: Kind, found: AnyStat) -> bytes | None:
        """Return the name under which a file was described before; only those with names to come are remembered."""
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

    def _xattrs(self, where: _Location) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for stored in where.attributes:
            attribute = _shown_name(stored, where.layer.override is not None)
            if attribute is None or attribute in _LOCAL:
                continue
            value = sysio.getxattr_at(where.dirfd, where.name, stored)
            if value and b"=" not in attribute:
                found[attribute] = value
            else:
                self._losses.attributes += 1
        return found


def _shown_name(stored: bytes, overridden: bool) -> bytes | None:
    covered = override.uncovered_name(stored) if overridden else None
    return covered or xattrs.shown_name(stored, overridden)


@contextmanager
def _reading(path: bytes) -> Iterator[None]:
    """Within this context an error is told with the entry that it was met at."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {shown(path) or '/'}: {error.strerror}") from error


def _held(layer: Layer, path: bytes) -> dict[bytes, LayerEntry]:
    """Return what a directory of one layer holds, by names in order."""
    with _reading(path):
        names = sorted(layer.names(path))
    found = {}
    for name in names:
        with _reading(join(path, name)):
            found[name] = layer.probe(path, name)
    return found


def _deletions(path: bytes, held: Mapping[bytes, LayerEntry]) -> Iterator[EntryWithData]:
    for name, entry in held.items():
        if entry.kind is Held.WHITEOUT:
            yield EntryWithData(TarEntry(join(path, whiteout.name_for(name)), Kind.FILE, 0))


def _opaque_mark(path: bytes) -> EntryWithData:
    return EntryWithData(TarEntry(join(path, whiteout.OPAQUE_MARK), Kind.FILE, 0))


class _PlainLayer:
    """A layer as it lies."""

    def __init__(self, tree: bytes, losses: Losses, undo: ExitStack) -> None:
        root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(sysio.close, root)
        dirfds = DirFds(default_capacity())
        undo.callback(dirfds.close)
        mode = Mode.TRUSTED if os.geteuid() == 0 else Mode.USER
        self._layer = Layer(0, root, dirfds, mode, lowest=False)
        self._describer = _EntryBuilder(losses)

    def items(self) -> Iterator[EntryWithData]:
        yield from self._item(b"", b"", self._layer.stat(b"", b""))
        cut = _has_any_opaque_root(self._layer)
        if cut:
            yield _opaque_mark(b"")
        pending = [self._inside(b"", cut)]
        while pending:
            found = next(pending[-1], None)
            if found is None:
                pending.pop()
            elif isinstance(found, EntryWithData):
                yield found
            else:
                pending.append(self._inside(*found))

    def _inside(self, path: bytes, cut: bool) -> Iterator[EntryWithData | tuple[bytes, bool]]:
        """Yield the items of a directory, and after each directory in it the arguments of this method for that.

        `cut`: it is opaque, and so the deletions in it say nothing.
        """
        held = _held(self._layer, path)
        if not cut:
            yield from _deletions(path, held)
        for name, entry in held.items():
            if entry.stat is None or entry.kind in (Held.WHITEOUT, Held.ABSENT):
                continue
            yield from self._item(path, name, entry.stat)
            if stat.S_ISDIR(entry.stat.st_mode):
                covers = self._layer.marks(path, name, entry.stat).opaque
                if covers:
                    yield _opaque_mark(join(path, name))
                yield join(path, name), covers

    def _item(self, path: bytes, name: bytes, found: AnyStat) -> Iterator[EntryWithData]:
        with _reading(join(path, name)):
            where = _where(self._layer, path, name)
            if not _MARKED.isdisjoint(where.attributes):
                raise UserError(f"{shown(join(path, name))} counts on layers below, and nothing says which they are")
            item = self._describer.item(join(path, name), where, found, lambda: self._layer.open_file(path, name))
        if item is not None:
            yield item


class _MergedTree:
    """The tree that a read-only overlay shows."""

    def __init__(self, overlay: Overlay, losses: Losses) -> None:
        self.overlay = overlay
        self._describer = _EntryBuilder(losses)

    def items(self) -> Iterator[EntryWithData]:
        root = self.overlay.root
        yield from self.item(b"", root)
        yield from self.below(b"", root)

    def below(self, path: bytes, node: Node) -> Iterator[EntryWithData]:
        """Yield all that is in a directory."""
        pending = [self._inside(path, node)]
        while pending:
            found = next(pending[-1], None)
            if found is None:
                pending.pop()
                continue
            path, child = found
            yield from self.item(path, child)
            if isinstance(child, Dir):
                pending.append(self._inside(path, child))

    def _inside(self, path: bytes, node: Node) -> Iterator[tuple[bytes, Node]]:
        with _reading(path):
            names = sorted(self.overlay.list_names(node))
        for name in names:
            with _reading(join(path, name)):
                child = self.overlay.lookup(node, name)
            yield join(path, name), child

    def item(self, path: bytes, node: Node) -> Iterator[EntryWithData]:
        """Yield the item of one node, none for what archives cannot hold."""
        with _reading(path):
            item = self._described(path, node)
        if item is not None:
            yield item

    def _described(self, path: bytes, node: Node) -> EntryWithData | None:
        if isinstance(node, Dir):
            layer, place = node.lower[0]
            return self._describer.item(path, _where(layer, place, b""), layer.stat(place, b""), None)
        assert isinstance(node, File) and node.lower is not None
        layer, place, name = node.lower
        found = resized(layer.stat(place, name), self.overlay.attributes(node).size)
        data = node.data or node.lower
        return self._describer.item(path, _where(layer, place, name), found, lambda: _open(data, path))


def _open(place: LowerFile, path: bytes) -> int:
    """Open the data of a file that is shown at `path`."""
    with _reading(path):
        if not place.name:
            raise oserror(errno.EIO, place.path)
        return place.layer.open_file(place.path, place.name)


class _ResolvedLayer:
    """A layer with redirects and metadata-only copies, seen over the stack that it was made on."""

    def __init__(self, tree: bytes, below: Sequence[bytes], losses: Losses, undo: ExitStack) -> None:
        self._view = Overlay(StackConfig(lower=(tree, *below)))
        undo.callback(self._view.close)
        self._beneath = Overlay(StackConfig(lower=tuple(below)))
        undo.callback(self._beneath.close)
        self._merged = _MergedTree(self._view, losses)
        self._layer = self._view.root.lower[0].layer

    def items(self) -> Iterator[EntryWithData]:
        root = self._view.root
        yield from self._merged.item(b"", root)
        cut = _has_any_opaque_root(self._layer)
        if cut:
            yield _opaque_mark(b"")
        pending = [self._inside(b"", root, self._beneath.root, cut)]
        while pending:
            found = next(pending[-1], None)
            if found is None:
                pending.pop()
            elif isinstance(found, EntryWithData):
                yield found
            else:
                pending.append(found)

    def _inside(self, path: bytes, node: Dir, beneath: Node | None, cut: bool) -> "_Walk":
        """Yield the items of a directory that has not moved.

        `beneath`: what the layers below show at its path. `cut`: it is opaque.
        """
        held = _held(self._layer, path)
        if not cut:
            yield from _deletions(path, held)
        for name, entry in held.items():
            if entry.stat is None or entry.kind in (Held.WHITEOUT, Held.ABSENT):
                continue
            with _reading(join(path, name)):
                child = self._view.lookup(node, name)
            yield from self._merged.item(join(path, name), child)
            if isinstance(child, Dir):
                yield from self._directory(path, name, child, entry.stat, self._seen_beneath(beneath, name))

    def _directory(self, parent: bytes, name: bytes, node: Dir, found: AnyStat, beneath: Node | None) -> "_Walk":
        path = join(parent, name)
        marks = self._layer.marks(parent, name, found)
        moved = marks.redirect is not None
        # As in a plain layer; only where a directory has moved to is an opaque mark our own.
        if marks.opaque or (moved and isinstance(beneath, Dir)):
            yield _opaque_mark(path)
        if moved:
            yield self._merged.below(path, node)
        else:
            yield self._inside(path, node, None if marks.opaque else beneath, marks.opaque)

    def _seen_beneath(self, beneath: Node | None, name: bytes) -> Node | None:
        if not isinstance(beneath, Dir):
            return None
        try:
            return self._beneath.lookup(beneath, name)
        except FileNotFoundError:
            return None


def _has_any_opaque_root(layer: Layer) -> bool:
    return has_opaque_root(layer.root) or layer.marks(b"", b"", layer.stat(b"", b"")).opaque


def has_opaque_root(root: int) -> bool:
    """Return whether the root of a layer carries the mark that cuts off all layers below.

    No mount looks at it there: an image begins with such a layer instead (`image.image_record`).
    """
    values = (sysio.find_xattr(root, b"", xattrs.prefix(mode) + xattrs.OPAQUE) for mode in Mode)
    return any(opaque.is_opaque(value) for value in values)
