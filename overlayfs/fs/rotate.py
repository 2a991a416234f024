"""Rotation of the upper: it becomes the top layer, an empty one takes its place, and the tree stays what it is.

Inode numbers, handles, descriptors and listings stay; only where the objects are changes. First `prepare`, in small
steps with other verbs between them: what only the index of the work directory records becomes names in the upper, since
a layer has no index. Then `rotate`, while nothing changes: one rename by the caller, which is the commit point, and a
walk over the live nodes. Nothing that may fail comes after the rename.

A file that is open for writing keeps its descriptor for reading only: it belongs to a layer now, so the next write
copies the file up and opens the copy (`Files.writable`). A file or directory without a name stays writable through its
descriptor: it is part of no layer.
"""

import errno
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import origin, xattrs
from overlayfs.fs.copyup import CopyUp
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.nodes import Dir, File, LowerDir, LowerFile, Node
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import Layer, join
from overlayfs.union.resolve import Kind

_SEARCHES = 3  # before the rest is left to `rotate`: each is good only if no directory moves meanwhile


class Rotation(Verbs):
    """One rotation of the upper of one overlay. On the loop."""

    def __init__(self, core: Core, copyup: CopyUp) -> None:
        super().__init__(core)
        self._copyup = copyup
        self._nameless: set[int] = set()  # numbers of unlinked files whose other names are outside the tree

    # --- before ----------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[None]:
        """Make the upper independent of the index, a little further at each step; other verbs may run between steps."""
        self._upper.work.drop_unused_index()
        for entry in self._entries():
            yield
            self._join_known_names(entry)
            if self._missing(entry) <= 0:
                self._retire(entry)
        for _ in range(_SEARCHES):
            if self.is_prepared():
                return
            yield from self._search()

    def is_prepared(self) -> bool:
        """Return whether `rotate` has nothing to search for."""
        return not self._entries() and not self._strays()

    def _entries(self) -> list[bytes]:
        index = self._upper.work.index
        return [] if index is None else [name for name, _ in sysio.list_dir(index)]

    def _find(self, entry: bytes) -> tuple[File | None, int]:
        """Return the live file that an entry stands for, and the descriptor of the index, borrowed."""
        index = self._upper.work.index
        assert index is not None
        found = sysio.stat_at(index, entry)
        return self._nodes.by_key((found.st_dev, found.st_ino)), index

    def _missing(self, entry: bytes) -> int:
        """Return how many names an indexed file has in the union beyond those in the upper."""
        upper = self._upper
        assert upper.work.index is not None
        # The delta is relative to the upper's link count, which counts the entry of the index as well.
        return self._lookup.origins.nlink_delta(upper.index_marks(entry), sysio.stat_at(upper.work.index, entry)) + 1

    def _join_known_names(self, entry: bytes) -> None:
        node, _ = self._find(entry)
        if node is not None:
            self._join(node)

    def _join(self, node: File) -> None:
        """Give an indexed file in the upper every name that is known of it."""
        if node.index is None or not node.in_upper:
            return
        for (parent, name), in_upper in list(node.names.items()):
            if not in_upper:
                with _unless_busy():
                    self._copyup.copy_up_name(parent, name, node)

    def _retire(self, entry: bytes) -> None:
        """Drop an entry that joins nothing any more, then the mark that counts from it.

        In this order, since without its entry a file's own link count is taken, whatever the mark says.
        """
        node, index = self._find(entry)
        if node is not None and False in node.names.values():
            return  # it is being copied up
        pin = self._stack.dirfds.open_child(index, entry, os.O_PATH)
        try:
            sysio.unlink_at(index, entry)
            if node is not None:
                node.index = None
                node.nlink_delta += 1
            self._restore_origin(pin)
        finally:
            sysio.close(pin)

    def _restore_origin(self, pin: int) -> None:
        """Give a file its first origin, for its inode number, where nothing needs the next lower one any more."""
        upper = self._upper
        marks = upper.marks_at(pin, b"")
        first = self._lookup.origins.lasting(marks)
        if first is not None and not marks.metacopy:
            upper.set_mark(pin, b"", xattrs.ORIGIN, origin.encode(first))
            upper.drop_mark(pin, b"", xattrs.NLINK)

    # --- names that have not been looked up --------------------------------------------------------------

    def _strays(self) -> list[File]:
        """Return the unlinked open files that have other names, which have not been looked up yet."""
        unnamed = (node for node in self._nodes.unnamed if node.number not in self._nameless)
        return [node for node in unnamed if self._has_unknown_names(node)]

    def _has_unknown_names(self, node: File) -> bool:
        if node.names or node.orphan is None:
            return False
        return sysio.stat_at(node.orphan, b"").st_nlink - (node.index is not None) > 0

    def _search(self) -> Iterator[None]:
        """Look at every name of the tree once: each joins the node that it belongs to."""
        epoch, entries, strays = self._nodes.epoch, self._entries(), self._strays()
        for directory, name in self._walk(all_names=bool(strays)):
            yield
            node = self._child(directory, name)
            if isinstance(node, File):
                self._join(node)
        if epoch == self._nodes.epoch:
            # Their remaining names are outside of these layers.
            self._nameless.update(node.number for node in strays if self._has_unknown_names(node))
            for entry in set(entries).intersection(self._entries()):
                self._retire(entry)

    def _walk(self, all_names: bool) -> Iterator[tuple[Dir, bytes]]:
        """Yield every name of the tree that is no directory's; those that the upper holds only if asked for."""
        pending = [self._lookup.root]
        try:
            while pending:
                directory = pending.pop()
                try:
                    yield from self._inside(directory, pending, all_names)
                finally:
                    self._nodes.forget(directory.number, 1)
        finally:
            for directory in pending:
                self._nodes.forget(directory.number, 1)

    def _inside(self, directory: Dir, pending: list[Dir], all_names: bool) -> Iterator[tuple[Dir, bytes]]:
        for name in self._listing(directory):
            in_upper = (directory.upper_names or {}).get(name)
            if in_upper is Kind.FILE and not all_names:
                continue
            child = self._child(directory, name)
            if isinstance(child, Dir):
                self._nodes.remember(child)
                pending.append(child)
            else:
                yield directory, name

    def _listing(self, directory: Dir) -> list[bytes]:
        with suppress(OSError):
            return self._lookup.listing(directory)
        return []

    def _child(self, directory: Dir, name: bytes) -> Node | None:
        with suppress(OSError):  # a name that cannot be looked up cannot be joined either
            return self._lookup.lookup(directory, name)
        return None

    # --- the change ------------------------------------------------------------------------------------

    def rotate(self, next_upper: bytes, layer: bytes, move: Callable[[], None]) -> None:
        """Let the upper become the directory `layer`, and the empty directory `next_upper` the upper.

        `move` carries that out on the disk: when it returns both are in their places, and when it raises neither is,
        and nothing has changed here. No change may run meanwhile: EBUSY when a node is being copied up. Both
        directories are on the upper's file system.
        """
        for _ in self.prepare():
            pass
        if self._entries() or self._copyup.running:
            raise oserror(errno.EBUSY)  # what an entry leads to would be written to, in the layer
        new_upper = self._stack.open_new_upper(next_upper)
        try:
            new_upper.apply_attributes()
            move()
        except BaseException:
            new_upper.close()
            raise
        former = self._stack.rotate(new_upper, layer)
        with _no_collection():
            self._move_nodes(former)

    def _move_nodes(self, layer: Layer) -> None:
        """Update every live node of the upper to where it is now, directory by directory.

        What has no name is reached by none, and stays what it was.
        """
        pending = [(self._lookup.root, b"")]
        while pending:
            directory, path = pending.pop()
            _move_dir(directory, LowerDir(layer, path), is_root=directory is self._lookup.root)
            for name, node in directory.children.items():
                if not node.in_upper:
                    continue
                if isinstance(node, File):
                    _move_file(node, directory, LowerFile(layer, path, name))
                elif isinstance(node, Dir):
                    pending.append((node, join(path, name)))


def holds_changes(stack: Stack) -> bool:
    """Return whether the upper holds any name, or its root shows what the top layer's root does not."""
    if stack.upper is None:
        return False
    return bool(sysio.list_dir(stack.upper.root)) or _facts(stack.upper) != _facts(stack.lower[0])


def _facts(layer: Layer) -> tuple[object, ...]:
    found, overridden = layer.stat_at(layer.root, b""), layer.override is not None
    shown = {name for name in sysio.listxattr_at(layer.root, b"") if not xattrs.is_private(name, overridden)}
    values = {name: sysio.getxattr_at(layer.root, b"", name) for name in shown}
    return found.st_mode, found.st_uid, found.st_gid, values


def _move_file(node: File, directory: Dir, place: LowerFile) -> None:
    names = node.names
    if not names[directory, place.name]:
        return  # this name is not in the upper; the file is met again under one that is
    node.lower, node.single_link = place, False
    node.in_upper = False
    if len(names) == 1:
        names[directory, place.name] = False
    else:
        node.names = dict.fromkeys(names, False)
    if node.orphan is not None:
        sysio.close(node.orphan)
        node.orphan = None
    if node.writer is not None:
        _retire_writer(node, node.writer)
    if node.reader is not None:
        sysio.keep_atime(node.reader)


def _retire_writer(node: File, writer: int) -> None:
    if node.reader is None and sysio.access_mode(writer) == os.O_RDWR:
        node.reader = writer
    else:
        sysio.close(writer)
    node.writer = None


def _move_dir(node: Dir, part: LowerDir, is_root: bool) -> None:
    node.add_pending_upper()
    node.lower = (part, *node.lower)
    node.in_upper = is_root
    node.upper_names = {} if is_root else None
    node.opaque = node.impure = False
    node.synced = node.changed
    if node.orphan is not None:
        sysio.close(node.orphan)
        node.orphan = None


@contextmanager
def _unless_busy() -> Iterator[None]:
    """Skip a node that another task is copying up: it is there again at the next step."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the collector from looking at all nodes in the middle of making many small tuples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
