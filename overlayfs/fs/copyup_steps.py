"""The steps of a copy-up: an object is built, a metadata-only copy gets its data, or it is truncated."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import metacopy, nlink, origin, xattrs
from overlayfs.format.origin import Origin
from overlayfs.fs.core import Core
from overlayfs.fs.durability import Durability
from overlayfs.fs.hardlinks import HardLinks, keeping_times
from overlayfs.fs.nodes import Dir, File, LowerFile, Node
from overlayfs.tree import staging
from overlayfs.tree.layer import Layer, open_readable
from overlayfs.tree.staging import Content, Source, Staged
from overlayfs.tree.stats import resized
from overlayfs.tree.upper import Upper
from overlayfs.union.plans import Create
from overlayfs.union.resolve import Kind


class StepContext:
    """What steps share: the parts of the overlay, and the nodes of which a copy is being staged."""

    def __init__(self, core: Core, links: HardLinks, durability: Durability, copy_up: Callable[[Node], None]) -> None:
        self.stack, self.nodes, self.lookup, self.objects = core.stack, core.nodes, core.lookup, core.objects
        self.links = links
        self.durability = durability
        self.copy_up = copy_up
        self.running: set[Node] = set()

    def begin(self, node: Node) -> None:
        """Note that a copy of a node is being staged, until the step is published or given up."""
        node.copying_up = True
        self.running.add(node)

    def mark_impure(self, upper: Upper, parent: Dir, dirfd: int) -> None:
        """Mark an upper directory with entries that have an origin, for the kernel's readdir (ovl_set_impure)."""
        if not parent.impure:
            upper.set_mark(dirfd, b"", xattrs.IMPURE, b"y")
            parent.impure = True

    def origin_without_metacopy(self, upper: Upper, pin: int) -> Origin | None:
        """Return the origin that a metadata-only copy gets with its data, None where it keeps the one it has.

        Without data it names the next lower object, as the kernel wants; with data, the first of the chain. An indexed
        one is found by its origin, which stays.
        """
        marks = upper.marks_at(pin, b"")
        first = None if marks.nlink is not None else self.lookup.origins.lasting(marks)
        return None if first == marks.origin else first


class CopyUpStep:
    """One step: `begin` on the loop, `stage` in any thread, `publish` on the loop; or `abort` after either.

    copies_data: known after `begin`; staging may take long (data is copied and synced), so an engine uses a thread.
    """

    copies_data = False

    def begin(self) -> None:
        """Open what staging needs. On the loop."""

    def stage(self) -> None:
        """Build what is to be published. Uses descriptors and values only."""

    def publish(self) -> None:
        """Make it visible and update the node. On the loop."""

    def abort(self) -> None:
        """Give up: nothing stays."""

    def perform(self) -> None:
        """Do all of it here and now."""
        try:
            self.begin()
            self.stage()
        except BaseException:
            self.abort()
            raise
        self.publish()


class Build(CopyUpStep):
    """Copy-up of one object; `content` says what becomes of the data of a regular file that has any."""

    def __init__(self, context: StepContext, upper: Upper, node: Node, content: Content) -> None:
        self.node = node
        self._context = context
        self._upper = upper
        self._truncates = content is Content.NONE and node.kind == stat.S_IFREG
        self._content = content if node.kind == stat.S_IFREG else Content.NONE
        self._nlink = 1
        self._is_indexed = False  # the copy gets an entry in the index, which keeps its names together
        self._origin: Origin | None = None
        self._source: Source | None = None
        self._staged: Staged | None = None
        self._is_placed = False  # the staged copy has left the work directory

    # --- on the loop, before ---------------------------------------------------------------------------

    def begin(self) -> None:
        context, node = self._context, self.node
        context.begin(node)
        layer, dirfd, name = context.objects.locate(node)
        pin = context.stack.dirfds.open_child(dirfd, name, os.O_PATH)
        data = None
        try:
            found = layer.stat_at(pin, b"")
            self._nlink = found.st_nlink
            if isinstance(node, File) and node.data is not None:
                found = resized(found, context.objects.size(node, found))
            if found.st_size == 0:
                self._content = Content.NONE
            self.copies_data = self._content is Content.COPY
            if self.copies_data and isinstance(node, File) and node.lower is not None:
                place = node.data or node.lower
                data = place.layer.open_file(place.path, place.name)
            suid = layer.suid or not self._upper.suid
            attributes = sysio.listxattr_at(pin, b"")
            marks = self._marks(layer, pin, attributes)
            self._source = Source(pin, found, self._content, data, marks, layer.override is not None, suid, attributes)
        except BaseException:
            sysio.close(pin)
            if data is not None:
                sysio.close(data)
            raise

    def _marks(self, layer: Layer, pin: int, attributes: list[bytes]) -> dict[bytes, bytes]:
        marks = {}
        self._origin = own = layer.filesystem.origin(sysio.file_handle(pin, b""))
        indexed = isinstance(self.node, File) and self._nlink > 1 and self._context.stack.index
        if indexed and own is not None:
            self._is_indexed = True
            marks[xattrs.NLINK] = nlink.encode("L", self.node.nlink_delta if isinstance(self.node, File) else 0)
        elif attributes and self._content is not Content.METACOPY:
            own = self._context.lookup.origins.lasting(layer.marks_of(pin, b"", attributes)) or own
        if own is not None:
            marks[xattrs.ORIGIN] = origin.encode(own)
        if self._content is Content.METACOPY:
            marks[xattrs.METACOPY] = metacopy.VALUE
        return marks

    # --- in any thread ---------------------------------------------------------------------------------

    def stage(self) -> None:
        assert self._source is not None
        self._staged = staging.build(self._upper, self._source)

    # --- on the loop, after ----------------------------------------------------------------------------

    def abort(self) -> None:
        self.node.copying_up = False
        self._context.running.discard(self.node)
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._staged is not None:
            if self._staged.fd is not None:
                sysio.close(self._staged.fd)
            if not self._is_placed:
                self._upper.work.tidy(self._staged.name)
            self._staged = None

    def publish(self) -> None:
        assert self._staged is not None and self._source is not None
        try:
            if isinstance(self.node, Dir):
                self._publish_dir(self.node)
            elif isinstance(self.node, File):
                self._publish_file(self.node, self._staged)
        finally:
            self.abort()

    def _publish_dir(self, node: Dir) -> None:
        parent = node.parent
        if parent is None or node.removed:
            raise oserror(errno.ESTALE)
        self._appear(parent, node.name)
        node.in_upper = True
        node.upper_names = {}
        parent.record_node(node.name, Kind.DIR, node)

    def _appear(self, parent: Dir, name: bytes) -> None:
        """Publish what is staged under a name; the directory keeps its times."""
        assert self._staged is not None and self._source is not None
        upper = self._upper
        dirfd = upper.dirfd(self._context.nodes.path(parent))
        if not parent.impure and xattrs.ORIGIN in self._source.marks:
            upper.set_mark(dirfd, b"", xattrs.IMPURE, b"y")
            parent.impure = True
        before = sysio.stat_at(dirfd, b"")
        try:
            upper.publish(self._staged.name, dirfd, name, Create.IN_PLACE)
            self._is_placed = True
        finally:
            with suppress(OSError):  # what was published stays published
                sysio.utimens_at(dirfd, b"", before.st_atime_ns, before.st_mtime_ns)

    def _publish_file(self, node: File, staged: Staged) -> None:
        # All that may fail comes first: when descriptors have run out nothing has happened yet.
        with ExitStack() as opened:
            pinned = staged.fd
            if pinned is None:
                pinned = sysio.open_child(self._upper.work.fd, staged.name, os.O_PATH)
                opened.callback(sysio.close, pinned)
            found = sysio.stat_at(pinned, b"")
            with ExitStack() as failing:
                reader = writer = None
                if node.reader is not None and self._content is not Content.METACOPY:
                    reader = self._context.stack.dirfds.open_child(pinned, b"", os.O_RDONLY)
                    failing.callback(sysio.close, reader)
                if self._truncates and node.writer is None:
                    writer = self._open_writer(pinned)
                if writer is not None:
                    failing.callback(sysio.close, writer)
                links = self._place(node, pinned)
                failing.pop_all()
        self._context.nodes.add_key(node, (found.st_dev, found.st_ino))
        node.nlink_delta += self._nlink - links
        node.in_upper = True
        node.data = (node.data or node.lower) if self._content is Content.METACOPY else None
        if node.index is not None:
            with suppress(OSError):  # the mark that was staged with it, relative to the lower count, is as good
                self._context.links.persist_nlink(node)
        if reader is not None:
            _replace_reader(node, reader)
        if writer is not None:
            node.writer = writer

    def _open_writer(self, pinned: int) -> int | None:
        """Open what a truncated file is written through: no content may be lost for an open that fails after all."""
        with suppress(PermissionError):  # without privilege the mode may stand against reading
            return self._context.stack.dirfds.open_child(pinned, b"", os.O_RDWR | os.O_NONBLOCK)
        return None

    def _place(self, node: File, pinned: int) -> int:
        """Give the copy its names in the upper; return how many links it has then. On an error it has none of them."""
        names = self._reachable_names(node)
        if self._is_indexed:
            self._place_in_index(node)
        elif names:
            self._appear(*names[0])
            node.names[names[0]] = True
            names[0][0].record_node(names[0][1], Kind.FILE, node)
        else:
            self._place_nowhere(node)
            return 0
        # Without an index nothing else would keep the other known names together.
        rest = names[:1] if node.index is not None else names[1:]
        try:
            for parent, name in rest:
                self._link(node, pinned, parent, name)
        except BaseException:
            self._displace(node)
            raise
        return 1 + len(rest)

    def _displace(self, node: File) -> None:
        """Take the names away again; what the index has is replaced by the next attempt."""
        for (parent, name), in_upper in node.names.items():
            if in_upper:
                with suppress(OSError):
                    sysio.unlink_at(self._upper.dirfd(self._context.nodes.path(parent)), name)
                    node.names[parent, name] = False
                    parent.record(name, Kind.ABSENT)
        node.index = None

    def _reachable_names(self, node: File) -> list[tuple[Dir, bytes]]:
        names = [(parent, name) for parent, name in node.names if parent.in_upper]
        if node.names and not names:  # the name whose directory was copied up may have gone while the copy was staged
            self._context.copy_up(next(iter(node.names))[0])
            names = [(parent, name) for parent, name in node.names if parent.in_upper]
        return names

    def _place_in_index(self, node: File) -> None:
        assert self._origin is not None and self._staged is not None and self._upper.work.index is not None
        name = origin.index_name(self._origin)
        sysio.rename_at(self._upper.work.fd, self._staged.name, self._upper.work.index, name)
        node.index = name
        self._is_placed = True

    def _place_nowhere(self, node: File) -> None:
        # Unlinked while it was open: the copy lives as long as the node, without a name.
        assert self._staged is not None
        node.orphan = sysio.open_child(self._upper.work.fd, self._staged.name, os.O_PATH)
        self._upper.work.tidy(self._staged.name)
        self._is_placed = True

    def _link(self, node: File, pinned: int, parent: Dir, name: bytes) -> None:
        assert self._source is not None
        upper, path = self._upper, self._context.nodes.path(parent)
        dirfd = upper.dirfd(path)
        if xattrs.ORIGIN in self._source.marks:
            self._context.mark_impure(upper, parent, dirfd)
        with keeping_times(upper, dirfd):
            upper.link(pinned, b"", (path, name), Create.IN_PLACE)
        node.names[parent, name] = True
        parent.record_node(name, Kind.FILE, node)


class Fill(CopyUpStep):
    """A metadata-only copy gets its data."""

    copies_data = True

    def __init__(self, context: StepContext, upper: Upper, node: File, data: LowerFile) -> None:
        self.node = node
        self._context = context
        self._upper = upper
        self._data = data
        self._open: list[int] = []
        self._origin: Origin | None = None

    def begin(self) -> None:
        context = self._context
        context.begin(self.node)
        _, dirfd, name = context.objects.locate(self.node)
        pin = context.stack.dirfds.open_child(dirfd, name, os.O_PATH)
        self._open.append(pin)
        self._origin = context.origin_without_metacopy(self._upper, pin)
        self._open.append(context.stack.dirfds.open_child(pin, b"", os.O_RDWR))
        self._open.append(self._data.layer.open_file(self._data.path, self._data.name))
        self._sync_places_left = context.durability.of_places_left(self.node)

    def stage(self) -> None:
        self._sync_places_left()
        staging.fill(self._upper, *self._open)

    def publish(self) -> None:
        try:
            if self.node.reader is not None:
                _replace_reader(self.node, sysio.open_child(self._open[0], b"", os.O_RDONLY))
            self.node.unmark()
            _renew_origin(self._upper, self._open[0], self._origin)
        finally:
            self.abort()

    def abort(self) -> None:
        self.node.copying_up = False
        self._context.running.discard(self.node)
        while self._open:
            sysio.close(self._open.pop())


class Truncate(CopyUpStep):
    """A metadata-only copy whose data is not wanted any more: truncated to nothing, then unmarked."""

    def __init__(self, context: StepContext, upper: Upper, node: File) -> None:
        self.node = node
        self._context = context
        self._upper = upper

    def publish(self) -> None:
        node, dirfds = self.node, self._context.stack.dirfds
        _, dirfd, name = self._context.objects.locate(node)
        with ExitStack() as failing:
            fd = sysio.open_child(dirfd, name, os.O_RDWR)
            failing.callback(sysio.close, fd)
            first = self._context.origin_without_metacopy(self._upper, fd)
            if node.reader is not None:
                reader = open_readable(dirfds, fd, b"", keep_atime=False)
                failing.callback(sysio.close, reader)
            self._truncate(fd)
            failing.pop_all()
        _renew_origin(self._upper, fd, first)
        if node.reader is not None:
            _replace_reader(node, reader)
        if node.writer is None:
            node.writer = fd  # so that the open that wants it cannot fail after all
        else:
            sysio.close(fd)
        node.unmark()

    def _truncate(self, fd: int) -> None:
        """Truncate, then remove the mark: in the other order a crash between the two would show zeros."""
        before = sysio.stat_at(fd, b"")
        sysio.truncate_fd(fd, 0)
        try:
            self._upper.drop_mark(fd, b"", xattrs.METACOPY)
        except OSError:
            with suppress(OSError):  # still marked, it is as it was
                sysio.truncate_fd(fd, before.st_size)
                sysio.utimens_at(fd, b"", before.st_atime_ns, before.st_mtime_ns)
            raise


def _replace_reader(node: File, reader: int) -> None:
    if node.reader is not None:
        sysio.close(node.reader)
    node.reader = reader


def _renew_origin(upper: Upper, pin: int, first: Origin | None) -> None:
    """Write the origin that an object keeps, None for nothing to write."""
    if first is not None:
        with suppress(OSError):  # only the inode number after the next mount depends on it
            upper.set_mark(pin, b"", xattrs.ORIGIN, origin.encode(first))
