"""Squash: replaces the topmost layers of a stack by one layer with the same effect.

Two views are compared, of the whole stack and of the layers that remain: where they differ, the new layer gets what the
first one shows, and whiteouts or opaque directories where the second one shows more. So the new layer never has
redirects or metadata-only copies, it has whiteouts only where they hide something, and it can be read without others.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.format import opaque, xattrs
from overlayfs.fs.config import StackConfig
from overlayfs.fs.nodes import Dir, File, Key, LowerDir, Node
from overlayfs.fs.overlay import Overlay
from overlayfs.store import layout
from overlayfs.store.layers import StagedLayer
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import History, ImageRecord, now
from overlayfs.store.scan import Progress
from overlayfs.store.store import LayerStore
from overlayfs.tree import staging
from overlayfs.tree.dirfds import SPARE, DirFds
from overlayfs.tree.features import find_features
from overlayfs.tree.layer import join
from overlayfs.tree.staging import Content, Source
from overlayfs.tree.upper import Upper
from overlayfs.tree.workdir import WorkDir, remove_tree
from overlayfs.union.plans import Remove

_OPAQUE = {xattrs.OPAQUE: opaque.OPAQUE_VALUE}
_WORK = b"work"
_NO_MARKS: dict[bytes, bytes] = {}


def squash(layers: tuple[bytes, ...], count: int, tree: bytes, work: bytes, progress: Progress | None = None) -> None:
    """Fill the empty directory `tree` with the effect of the first `count` of `layers` (directories, top first).

    `work` is an empty directory on the same file system, to be removed by the caller afterwards. `progress(entries,
    bytes)` is called periodically. The layers must not change meanwhile. Raises UserError if something cannot be read
    or written.
    """
    with ExitStack() as closing:
        whole = Overlay(StackConfig(lower=layers))
        closing.callback(whole.close)
        rest = Overlay(StackConfig(lower=layers[count:])) if len(layers) > count else None
        if rest is not None:
            closing.callback(rest.close)
        try:
            writer = _Writer(tree, work, whole, progress, closing)
            _Squash(whole, rest, count, writer).run()
        except OSError as error:
            name = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, bytes) else ""
            raise UserError(f"cannot squash: {error.strerror}{name}") from error


# --- writing -----------------------------------------------------------------------------------------------


class _Writer:
    """Copies nodes to the new layer: built in the work directory, then moved into place."""

    def __init__(self, tree: bytes, work: bytes, view: Overlay, progress: Progress | None, closing: ExitStack) -> None:
        directory = WorkDir.open(work)
        closing.callback(directory.close, clean=False)
        directory.prepare()
        root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        closing.callback(sysio.close, root)
        dirfds = DirFds(2 * SPARE)
        closing.callback(dirfds.close)
        # Without privilege, owners are stored as the layers store them. Nothing is synced here: publishing does that.
        keeps = None if os.geteuid() == 0 else view.root.lower[0].layer.override
        self._upper = Upper(root, dirfds, find_features(directory, None), directory, True, keeps)
        self._view = view
        self._progress = progress
        self._entries = 0
        self._bytes = 0
        self.linked: dict[Key, bytes] = {}  # the first path of each inode that has several names
        self.names: dict[Key, int] = {}  # how many of them there are

    def apply_attributes_to_root(self, node: Dir) -> None:
        """Give the root of the layer the attributes of the merged root."""
        source = _directory_source(node, _NO_MARKS)
        try:
            self._upper.set_owner(self._upper.root, b"", source.stat.st_uid, source.stat.st_gid)
            staging.copy_xattrs(self._upper, source, self._upper.root, b"")
            self._upper.set_mode(self._upper.root, b"", stat.S_IMODE(source.stat.st_mode))
        finally:
            source.close()
        self._count(0)

    def add_directory(self, parent: bytes, name: bytes, node: Dir, opaque: bool) -> None:
        """Create a directory; `opaque`: it hides the directory below."""
        self._add(parent, name, _directory_source(node, _OPAQUE if opaque else _NO_MARKS))
        self._count(0)

    def add_file(self, parent: bytes, name: bytes, node: File) -> None:
        """Copy a file, or link it to its copy under another name."""
        key = node.keys[0]
        first = self.linked.get(key)
        if first is not None:
            directory, base = os.path.split(first)
            sysio.link_at(self._upper.dirfd(directory), base, self._upper.dirfd(parent), name)
            self.names[key] += 1
            self._count(0)
            return
        source = _file_source(node)
        if source.stat.st_nlink > 1:
            self.linked[key], self.names[key] = join(parent, name), 1
        self._add(parent, name, source)
        self._count(source.stat.st_size if source.content is Content.COPY else 0)

    def _add(self, parent: bytes, name: bytes, source: Source) -> None:
        try:
            staged = staging.build(self._upper, source)
        finally:
            source.close()
        try:
            sysio.rename_at(self._upper.work.fd, staged.name, self._upper.dirfd(parent), name)
        finally:
            staged.close()

    def hide(self, parent: bytes, name: bytes) -> None:
        """Create a whiteout."""
        self._upper.remove((parent, name), Remove.WHITEOUT, False)
        self._count(0)

    def has(self, path: bytes) -> bool:
        """Return whether the new layer has a path."""
        directory, name = os.path.split(path)
        return sysio.exists_at(self._upper.dirfd(directory), name)

    def restore_times(self, path: bytes, node: Dir) -> None:
        """Set the times of a directory, once nothing is added to it any more."""
        layer, place = node.lower[0]
        found = layer.stat(place, b"")
        sysio.utimens_at(self._upper.dirfd(path), b"", found.st_atime_ns, found.st_mtime_ns)

    def _count(self, size: int) -> None:
        self._entries += 1
        self._bytes += size
        if self._progress is not None and (size or self._entries % 64 == 0):
            self._progress(self._entries, self._bytes)


def _directory_source(node: Dir, marks: dict[bytes, bytes]) -> Source:
    layer, path = node.lower[0]
    pin = layer.pin(path, b"")
    return Source(pin, layer.stat(path, b""), marks=marks, override=layer.override is not None)


def _file_source(node: File) -> Source:
    assert node.lower is not None
    layer, path, name = node.lower
    pin = layer.pin(path, name)
    try:
        found = layer.stat_at(pin, b"")
        if not stat.S_ISREG(found.st_mode) or (found.st_size == 0 and node.data is None):
            return Source(pin, found, override=layer.override is not None)
        place = node.data or node.lower
        data = place.layer.open_file(place.path, place.name)
        return Source(pin, found, Content.COPY, data, override=layer.override is not None)
    except BaseException:
        sysio.close(pin)
        raise


# --- deciding ----------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """A directory of the new layer being filled. rest: what the remaining layers show at its path."""

    path: bytes
    node: Dir
    rest: Dir | None
    names: Iterator[bytes]


class _Squash:
    """Walks both views at once; `rest` is None if no layer remains."""

    def __init__(self, whole: Overlay, rest: Overlay | None, count: int, writer: _Writer) -> None:
        self._whole = whole
        self._rest = rest
        self._count = count
        self._writer = writer
        self._moved: dict[Key, int] = {}  # link counts of copied files of the remaining layers

    def run(self) -> None:
        """Fill the new layer."""
        self._writer.apply_attributes_to_root(self._whole.root)
        self._fill([self._level(b"", self._whole.root, None if self._rest is None else self._rest.root)])
        self._add_other_names()

    def _level(self, path: bytes, node: Dir, rest: Dir | None) -> _Level:
        names = set(self._whole.list_names(node))
        if rest is not None and self._rest is not None:
            names.update(self._rest.list_names(rest))
        return _Level(path, node, rest, iter(sorted(names)))

    def _fill(self, levels: list[_Level]) -> None:
        # Not recursive: a tree may be deeper than the interpreter's stack.
        while levels:
            level = levels[-1]
            name = next(level.names, None)
            if name is None:
                self._writer.restore_times(level.path, level.node)
                levels.pop()
                continue
            below = self._add(level, name)
            if below is not None:
                levels.append(below)

    def _add(self, level: _Level, name: bytes) -> _Level | None:
        """Add what the new layer needs under one name; return the directory to fill next, if it is one."""
        node = _find(self._whole, level.node, name)
        other = None if self._rest is None or level.rest is None else _find(self._rest, level.rest, name)
        if node is None:
            if other is not None:
                self._writer.hide(level.path, name)
            return None
        if isinstance(node, Dir):
            return self._add_directory(level, name, node, other)
        assert isinstance(node, File)
        if not self._shows_the_same_file(node, other):
            self._note_moved(node)
            self._writer.add_file(level.path, name, node)
        return None

    def _add_directory(self, level: _Level, name: bytes, node: Dir, other: Node | None) -> _Level | None:
        below = [part for part in node.lower if part.layer.index >= self._count]
        merged = isinstance(other, Dir) and bool(below) and self._is_same(below, other)
        if merged and len(below) == len(node.lower):
            return None  # the remaining layers show all of it
        opaque = isinstance(other, Dir) and not merged
        self._writer.add_directory(level.path, name, node, opaque)
        return self._level(join(level.path, name), node, other if merged and isinstance(other, Dir) else None)

    def _is_same(self, below: list[LowerDir], other: Dir) -> bool:
        return [(part.layer.index - self._count, part.path) for part in below] == [
            (part.layer.index, part.path) for part in other.lower
        ]

    def _shows_the_same_file(self, node: File, other: Node | None) -> bool:
        return isinstance(other, File) and node.keys[0] == other.keys[0] and _data(node) == _data(other)

    # --- hard links ------------------------------------------------------------------------------------

    def _note_moved(self, node: File) -> None:
        assert node.lower is not None
        if node.lower.layer.index >= self._count:
            self._moved[node.keys[0]] = node.lower.layer.stat(node.lower.path, node.lower.name).st_nlink

    def _add_other_names(self) -> None:
        """Copy the other names of files that were copied from a remaining layer: they must stay one file."""
        missing = {key for key, count in self._moved.items() if count > self._writer.names.get(key, count)}
        if not missing:
            return
        pending: list[tuple[bytes, Dir]] = [(b"", self._whole.root)]
        while pending:
            path, node = pending.pop()
            for name in self._whole.list_names(node):
                child = self._whole.lookup(node, name)
                if isinstance(child, Dir):
                    pending.append((join(path, name), child))
                elif isinstance(child, File) and child.keys[0] in missing:
                    self._add_other_name(path, name, child)

    def _add_other_name(self, path: bytes, name: bytes, node: File) -> None:
        above = self._make_parents(path)
        if not self._writer.has(join(path, name)):
            self._writer.add_file(path, name, node)
        for directory, found in reversed(above):
            self._writer.restore_times(directory, found)

    def _make_parents(self, path: bytes) -> list[tuple[bytes, Dir]]:
        """Create the missing directories above a name; return all of them, the root first."""
        node: Dir = self._whole.root
        above = [(b"", node)]
        for name in filter(None, path.split(b"/")):
            parent = above[-1][0]
            child = self._whole.lookup(node, name)
            assert isinstance(child, Dir)
            if not self._writer.has(join(parent, name)):
                self._writer.add_directory(parent, name, child, opaque=False)
            node = child
            above.append((join(parent, name), node))
        return above


def _find(view: Overlay, parent: Dir, name: bytes) -> Node | None:
    try:
        return view.lookup(parent, name)
    except FileNotFoundError:
        return None


def _data(node: File) -> tuple[Key, bytes, bytes] | None:
    if node.data is None:
        return None
    about = sysio.stat_at(node.data.layer.root, b"")
    return (about.st_dev, about.st_ino), node.data.path, node.data.name


# --- images ------------------------------------------------------------------------------------------------


def squash_image(
    store: LayerStore, given: str, name: str, last: int | None = None, *, message: str = "", author: str = "",
    progress: Progress | None = None, hash_progress: Progress | None = None,
) -> ImageRecord:  # fmt: skip
    """Put an image `name`: the image `given` with its `last` topmost layers (None: all) made one. Return it.

    `progress(entries, bytes)` is called periodically while the layer is written, `hash_progress(entries, bytes)` while
    it is hashed. Raises UserError if the image has fewer layers; nothing is left behind then, or on an interrupt.
    """
    layout.image_name(name)  # an invalid name is refused before any work
    image = store.images.find(given)
    count = len(image.layers) if last is None else last
    if not 1 <= count <= len(image.layers):
        raise UserError(f"{image.name} has {len(image.layers)} layers; squash between 1 and that many of them")
    with ExitStack() as holds, store.layers.stage() as staged:
        stack = tuple(store.layers.find(layer_id) for layer_id in image.layers)
        for layer in stack:
            holds.enter_context(layer.hold())
        _fill_staged(staged, tuple(layer.tree_path for layer in stack), count, progress)
        with Manifest.build(staged.tree_fd, progress=hash_progress) as manifest:
            made = staged.publish(manifest=manifest, author=author, message=message)
        return store.images.put(_squashed(image, name, count, made.id, message, author))


def _fill_staged(staged: StagedLayer, layers: tuple[bytes, ...], count: int, progress: Progress | None) -> None:
    parent = os.path.dirname(staged.tree_path)
    work = os.path.join(parent, _WORK)
    os.mkdir(work, 0o700)
    squash(layers, count, staged.tree_path, work, progress)
    fd = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(fd, _WORK)
    finally:
        sysio.close(fd)


def _squashed(image: ImageRecord, name: str, count: int, layer_id: str, message: str, author: str) -> ImageRecord:
    return msgspec.structs.replace(
        image,
        name=name,
        layers=(layer_id, *image.layers[count:]),
        created=now(),
        author=author or image.author,
        history=_history(image, count, message, author),
    )


def _history(image: ImageRecord, count: int, message: str, author: str) -> tuple[History, ...]:
    """Return the history of an image plus the squash; steps whose layers were squashed become empty-layer steps."""
    with_layer = [position for position, step in enumerate(image.history) if not step.empty_layer]
    if len(with_layer) != len(image.layers):  # other tools may omit steps
        return image.history
    gone = set(with_layer[len(with_layer) - count :])
    steps = (
        msgspec.structs.replace(step, empty_layer=True) if position in gone else step
        for position, step in enumerate(image.history)
    )
    return *steps, History(created=now(), author=author, created_by="overlayfs squash", comment=message)
