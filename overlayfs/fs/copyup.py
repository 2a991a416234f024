"""Lifting: bringing a node to the upper, ancestors first, one step per node.

A step is decided on the loop, staged with descriptors and values (in a thread if it is heavy), and published on the
loop, which looks again at where the node is now: it may have been renamed or unlinked meanwhile. `next_lift` answers
what is missing at this moment, so an engine asks it again after every step and after every wait.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum, auto

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import metacopy, nlink, origin, xattrs
from overlayfs.format.origin import Origin
from overlayfs.fs.durability import Durability
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.metadata import Located, Metadata
from overlayfs.fs.nodes import Dir, File, LowerFile, Node, NodeTable
from overlayfs.fs.stack import Stack
from overlayfs.tree import staging
from overlayfs.tree.layer import Layer, open_readable
from overlayfs.tree.staging import Content, Source
from overlayfs.tree.stats import resized
from overlayfs.tree.upper import Upper
from overlayfs.union.plans import Create
from overlayfs.union.resolve import Kind


class Requirement(Enum):
    """What a verb needs of a node in the upper."""

    METADATA = auto()  # the object with its attributes; data may stay below
    DATA = auto()  # the data as well
    TRUNCATED = auto()  # the object, its data about to be cut off: none is copied


class CopyUpStep:
    """One step: `begin` on the loop, `stage` in any thread, `publish` on the loop; or `abort` after either.

    heavy: stage may take long (data is copied and synced), so an engine runs it in a thread.
    """

    heavy = False

    def __init__(self, node: Node) -> None:
        self.node = node

    def begin(self) -> None:
        """Open what staging needs. On the loop."""

    def stage(self) -> None:
        """Build what is to be published. Uses descriptors and values only."""

    def publish(self) -> None:
        """Make it visible and settle the node. On the loop."""

    def abort(self) -> None:
        """Give up: nothing stays."""

    def run(self) -> None:
        """Do all of it here and now."""
        try:
            self.begin()
            self.stage()
        except BaseException:
            self.abort()
            raise
        self.publish()


class _Wait(CopyUpStep):
    """Somebody is at it: there is nothing to do but to wait for the node's lock, and to ask again."""

    def run(self) -> None:
        """Who cannot wait is told so: an engine lifts before it calls a verb, so none should come here."""
        raise oserror(errno.EBUSY)


class CopyUp:
    """Decides which step comes next, and carries out the parts of steps that need the tables."""

    def __init__(
        self, stack: Stack, nodes: NodeTable, lookup: Lookup, attributes: Metadata, durability: Durability
    ) -> None:
        self.durability = durability
        self.stack = stack
        self.nodes = nodes
        self.lookup = lookup
        self.attributes = attributes
        self.running: set[Node] = set()  # nodes of which a copy is being staged

    def begun(self, node: Node) -> None:
        """Note that a copy of a node is being staged."""
        node.copying_up = True
        self.running.add(node)

    def ended(self, node: Node) -> None:
        """Note that it is published or given up."""
        node.copying_up = False
        self.running.discard(node)

    def next_copy_up(self, node: Node, requirement: Requirement) -> CopyUpStep | None:
        """Return the step that is next before `need` is met, None when it is; EROFS without an upper."""
        upper = self.attributes.upper
        if node.copying_up:
            return _Wait(node)
        if node.in_upper:
            return self._next_of_copied_up(upper, node, requirement)
        parent = self._parent_to_copy_up(node)
        if parent is not None:
            return _Wait(parent) if parent.copying_up else _Build(self, upper, parent, requirement)
        return _Build(self, upper, node, requirement)

    def _next_of_copied_up(self, upper: Upper, node: Node, requirement: Requirement) -> CopyUpStep | None:
        if not isinstance(node, File) or node.data is None or requirement is Requirement.METADATA:
            return None
        return _Fill(self, upper, node, node.data) if requirement is Requirement.DATA else _Cut(self, upper, node)

    def directory_source(self, node: Dir) -> Source:
        """Return what copying a directory without its entries takes; the caller closes it. No upper is needed."""
        layer, dirfd, name = self.attributes.locate(node)
        pin = self.stack.dirfds.retry(lambda: sysio.open_child(dirfd, name, os.O_PATH))
        try:
            own = layer.filesystem.origin(sysio.file_handle(pin, b""))
            first = self.lookup.lasting_origin(layer.marks_at(pin, b"")) or own
            marks = {} if first is None else {xattrs.ORIGIN: origin.encode(first)}
            return Source(pin, layer.stat_at(pin, b""), marks=marks, override=layer.override is not None)
        except BaseException:
            sysio.close(pin)
            raise

    def _parent_to_copy_up(self, node: Node) -> Dir | None:
        if isinstance(node, File):
            parent = next((parent for parent, _ in node.names), None)
        else:
            parent = node.parent if isinstance(node, Dir) else None
        highest = None
        while parent is not None and not parent.in_upper:
            highest, parent = parent, parent.parent
        return highest

    def copy_up(self, node: Node, requirement: Requirement = Requirement.METADATA) -> None:
        """Meet a need here and now."""
        while (step := self.next_copy_up(node, requirement)) is not None:
            step.run()

    def copy_up_name(self, parent: Dir, name: bytes, node: Node) -> None:
        """See to it that a name, not only its node, exists in the upper: a further name of a copied-up file."""
        self.copy_up(parent)
        self.copy_up(node)
        if isinstance(node, File) and node.names.get((parent, name)) is False:
            self.link_name(node, parent, name)

    def link_name(self, node: File, parent: Dir, name: bytes) -> None:
        """Give an upper file the name that it has below: the union's link count stays."""
        place = self.lookup.path(parent), name
        with self.parent_times_kept(parent):
            located = self.attributes.locate(node)
            self._count_from_lower(node, located)
            self.attributes.upper.link(located.dirfd, located.name, place, Create.IN_PLACE)
        node.nlink_delta -= 1
        node.names[parent, name] = True
        parent.gain(name, Kind.FILE, node)
        with suppress(OSError):  # relative to the lower count it is as true
            self.persist_nlink(node)

    def _count_from_lower(self, node: File, located: Located) -> None:
        """Write the union's link count relative to the lower file's, so that the upper's may change (ovl_link_up)."""
        if node.index is None or node.lower is None:
            return
        layer, path, name = node.lower
        union = located.layer.stat_at(located.dirfd, located.name).st_nlink + node.nlink_delta
        value = nlink.encode("L", union - layer.stat(path, name).st_nlink)
        self.attributes.upper.set_mark(located.dirfd, located.name, xattrs.NLINK, value)

    @contextmanager
    def one_name_less(self, node: File) -> Iterator[None]:
        """Within this context the union gets one name less, relative to the upper; not if it ends with an error."""
        node.nlink_delta -= 1
        try:
            self.persist_nlink(node)
            yield
        except BaseException:
            node.nlink_delta += 1
            with suppress(OSError):
                self.persist_nlink(node)
            raise

    def persist_nlink(self, node: File) -> None:
        """Write the union's link count, relative to the upper's, on an indexed file (ovl_set_nlink_upper)."""
        if node.index is not None:
            _, dirfd, name = self.attributes.locate(node)
            self.attributes.upper.set_mark(dirfd, name, xattrs.NLINK, nlink.encode("U", node.nlink_delta))

    def drop_index(self, node: File) -> None:
        """Remove the entry of a file in the index: its last name has gone."""
        index = self.attributes.upper.work.index
        if node.index is not None and index is not None:
            with suppress(OSError):  # it stands for no name: the kernel drops such an entry at its next mount
                sysio.unlink_at(index, node.index)
                node.nlink_delta += 1
            node.index = None

    def origin_without_metacopy(self, upper: Upper, pin: int) -> Origin | None:
        """Return the origin that a metadata-only file gets with its data, None where it keeps the one it has.

        Without data it names the object right below, as the kernel wants; a file with data, the first of the chain.
        An indexed one is found by its origin, which stays.
        """
        marks = upper.marks_at(pin, b"")
        first = None if marks.nlink is not None else self.lookup.lasting_origin(marks)
        return None if first == marks.origin else first

    @staticmethod
    def renew_origin(upper: Upper, dirfd: int, name: bytes, first: Origin | None) -> None:
        """Write such an origin, None for nothing to write."""
        if first is not None:
            with suppress(OSError):  # only the number after the next mount depends on it
                upper.set_mark(dirfd, name, xattrs.ORIGIN, origin.encode(first))

    def parent_times_kept(self, parent: Dir) -> "_TimesKept":
        """Return a context in which changes of names do not move a directory's times: lifting is invisible."""
        return _TimesKept(self.attributes, parent)

    def mark_impure(self, parent: Dir) -> None:
        """Mark a directory that holds objects with an origin, for the kernel's readdir (formats, section 4)."""
        if not parent.impure:
            upper = self.attributes.upper
            upper.set_mark(upper.dirfd(self.lookup.path(parent)), b"", xattrs.IMPURE, b"y")
            parent.impure = True


class _TimesKept:
    def __init__(self, attributes: Metadata, parent: Dir) -> None:
        self._attributes = attributes
        self._parent = parent

    def __enter__(self) -> None:
        self._before = self._attributes.stat(self._parent)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what was published stays published
            dirfd, name = self._attributes.locate(self._parent)[1:]
            sysio.utimens_at(dirfd, name, self._before.st_atime_ns, self._before.st_mtime_ns)


class _Build(CopyUpStep):
    """Copy-up of one object."""

    def __init__(self, copyup: CopyUp, upper: Upper, node: Node, requirement: Requirement) -> None:
        super().__init__(node)
        self._copyup = copyup
        self._upper = upper
        self._need = requirement if isinstance(node, File) else Requirement.METADATA
        found = copyup.attributes.stat(node)
        self._size = copyup.attributes.size(node, found)
        self._content = self._choose_content(self._size)
        self.heavy = self._content is Content.COPY
        self._nlink = found.st_nlink
        self._origin: Origin | None = None
        self._source: Source | None = None
        self._staged: bytes | None = None

    def _choose_content(self, size: int) -> Content:
        if self.node.kind != stat.S_IFREG or self._need is Requirement.TRUNCATED or size == 0:
            return Content.NONE
        if self._need is Requirement.METADATA and self._copyup.stack.metacopy:
            return Content.METACOPY
        return Content.COPY

    def begin(self) -> None:
        self._copyup.begun(self.node)
        self._source = self._open_source()

    def stage(self) -> None:
        assert self._source is not None
        self._staged = staging.build(self._upper, self._source)

    def _open_source(self) -> Source:
        layer, dirfd, name = self._locate()
        pin = self._copyup.stack.dirfds.retry(lambda: sysio.open_child(dirfd, name, os.O_PATH))
        data = None
        try:
            if self._content is Content.COPY:
                data = self._open_data()
            marks = self._marks(layer, pin)
            found = resized(layer.stat_at(pin, b""), self._size)
            suid = layer.suid or not self._upper.suid
            return Source(pin, found, self._content, data, marks, layer.override is not None, suid)
        except BaseException:
            sysio.close(pin)
            if data is not None:
                sysio.close(data)
            raise

    def _locate(self) -> Located:
        return self._copyup.attributes.locate(self.node)

    def _open_data(self) -> int:
        assert isinstance(self.node, File) and self.node.lower is not None
        place = self.node.data or self.node.lower
        return place.layer.open_file(place.path, place.name)

    def _marks(self, layer: Layer, pin: int) -> dict[bytes, bytes]:
        marks = {}
        self._origin = layer.filesystem.origin(sysio.file_handle(pin, b""))
        first = self._origin
        if self._content is not Content.METACOPY:
            first = self._copyup.lookup.lasting_origin(layer.marks_at(pin, b"")) or first
        if first is not None:
            marks[xattrs.ORIGIN] = origin.encode(first)
        if self._content is Content.METACOPY:
            marks[xattrs.METACOPY] = metacopy.VALUE
        if self._is_indexed():
            assert self._origin is not None
            marks[xattrs.ORIGIN] = origin.encode(self._origin)
            marks[xattrs.NLINK] = nlink.encode("L", self._delta_before())
        return marks

    def _is_indexed(self) -> bool:
        linked = isinstance(self.node, File) and self._nlink > 1
        return linked and self._copyup.stack.index and self._origin is not None

    def _delta_before(self) -> int:
        return self.node.nlink_delta if isinstance(self.node, File) else 0

    def abort(self) -> None:
        self._copyup.ended(self.node)
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._staged is not None:
            self._upper.work.tidy(self._staged)
            self._staged = None

    def publish(self) -> None:
        assert self._staged is not None and self._source is not None
        try:
            if isinstance(self.node, Dir):
                self._publish_dir(self.node)
            elif isinstance(self.node, File):
                self._publish_file(self.node)
        finally:
            self.abort()

    def _publish_dir(self, node: Dir) -> None:
        parent = node.parent
        if parent is None or node.removed:
            raise oserror(errno.ESTALE)
        self._appear(parent, node.name)
        node.in_upper = True
        node.upper_names = {}
        parent.gain(node.name, Kind.DIR, node)

    def _appear(self, parent: Dir, name: bytes) -> None:
        self._mark_impure(parent)
        with self._copyup.parent_times_kept(parent):
            assert self._staged is not None
            self._upper.publish(self._staged, (self._copyup.lookup.path(parent), name), Create.IN_PLACE)
        self._staged = None

    def _mark_impure(self, parent: Dir) -> None:
        if self._source is not None and xattrs.ORIGIN in self._source.marks:
            self._copyup.mark_impure(parent)

    def _publish_file(self, node: File) -> None:
        assert self._staged is not None
        pinned = sysio.open_child(self._upper.work.fd, self._staged, os.O_PATH)
        try:
            self._settle(node, pinned)
        finally:
            sysio.close(pinned)

    def _settle(self, node: File, pinned: int) -> None:
        # All that may fail comes first: when descriptors have run out nothing has happened yet.
        found = sysio.stat_at(pinned, b"")
        with ExitStack() as failing:
            reader = self._open_reader(node, pinned)
            if reader is not None:
                failing.callback(sysio.close, reader)
            writer = self._open_writer(node, pinned)
            if writer is not None:
                failing.callback(sysio.close, writer)
            links = self._place(node, pinned)
            failing.pop_all()
        self._copyup.nodes.add_key(node, (found.st_dev, found.st_ino))
        node.nlink_delta += self._nlink - links
        node.in_upper = True
        node.data = (node.data or node.lower) if self._content is Content.METACOPY else None
        with suppress(OSError):  # the mark that was staged with it, relative to the lower count, is as good
            self._copyup.persist_nlink(node)
        if reader is not None:
            _swap_reader(node, reader)
        if writer is not None:
            node.writer = writer

    def _open_reader(self, node: File, pinned: int) -> int | None:
        if node.reader is None or self._content is Content.METACOPY:
            return None
        return self._copyup.stack.dirfds.retry(lambda: sysio.open_child(pinned, b"", os.O_RDONLY))

    def _open_writer(self, node: File, pinned: int) -> int | None:
        """Open what a truncated file is written through: no content may be lost for an open that fails after all."""
        if self._need is not Requirement.TRUNCATED or node.writer is not None:
            return None
        with suppress(PermissionError):  # without privilege the mode may stand against reading
            return self._copyup.stack.dirfds.retry(lambda: sysio.open_child(pinned, b"", os.O_RDWR | os.O_NONBLOCK))
        return None

    def _place(self, node: File, pinned: int) -> int:
        """Give the copy its names in the upper; return how many links it has then. On an error it has none of them."""
        names = self._reachable_names(node)
        if self._is_indexed():
            self._place_in_index(node)
        elif names:
            self._appear(*names[0])
            self._named(node, names[0])
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
                    sysio.unlink_at(self._upper.dirfd(self._copyup.lookup.path(parent)), name)
                    node.names[parent, name] = False
                    parent.note(name, Kind.ABSENT)
        node.index = None

    def _reachable_names(self, node: File) -> list[tuple[Dir, bytes]]:
        # The name whose parents were lifted may have gone while the copy was staged.
        if node.names and not any(parent.in_upper for parent, _ in node.names):
            self._copyup.copy_up(next(iter(node.names))[0])
        return [(parent, name) for parent, name in node.names if parent.in_upper]

    def _place_in_index(self, node: File) -> None:
        assert self._origin is not None and self._staged is not None and self._upper.work.index is not None
        name = origin.index_name(self._origin)
        sysio.rename_at(self._upper.work.fd, self._staged, self._upper.work.index, name)
        node.index = name
        self._staged = None

    def _place_nowhere(self, node: File) -> None:
        # Unlinked while it was open: the copy lives as long as the node, without a name.
        assert self._staged is not None
        node.orphan = sysio.open_child(self._upper.work.fd, self._staged, os.O_PATH)
        self._upper.work.tidy(self._staged)
        self._staged = None

    def _link(self, node: File, pinned: int, parent: Dir, name: bytes) -> None:
        self._mark_impure(parent)
        with self._copyup.parent_times_kept(parent):
            self._upper.link(pinned, b"", (self._copyup.lookup.path(parent), name), Create.IN_PLACE)
        self._named(node, (parent, name))

    @staticmethod
    def _named(node: File, place: tuple[Dir, bytes]) -> None:
        node.names[place] = True
        place[0].gain(place[1], Kind.FILE, node)


def _swap_reader(node: File, reader: int) -> None:
    if node.reader is not None:
        sysio.close(node.reader)
    node.reader = reader


class _Fill(CopyUpStep):
    """A metadata-only copy gets its data."""

    heavy = True

    def __init__(self, copyup: CopyUp, upper: Upper, node: File, data: LowerFile) -> None:
        super().__init__(node)
        self._copyup = copyup
        self._upper = upper
        self._data = data
        self._open: list[int] = []
        self._origin: Origin | None = None

    def begin(self) -> None:
        self._copyup.begun(self.node)
        _, dirfd, name = self._copyup.attributes.locate(self.node)
        retry = self._copyup.stack.dirfds.retry
        pin = retry(lambda: sysio.open_child(dirfd, name, os.O_PATH))
        self._open.append(pin)
        self._origin = self._copyup.origin_without_metacopy(self._upper, pin)
        self._open.append(retry(lambda: sysio.open_child(pin, b"", os.O_RDWR)))
        self._open.append(self._data.layer.open_file(self._data.path, self._data.name))
        self._sync_places_left = self._copyup.durability.of_places_left(self.node)

    def stage(self) -> None:
        self._sync_places_left()
        staging.fill(self._upper, *self._open)

    def publish(self) -> None:
        assert isinstance(self.node, File)
        try:
            if self.node.reader is not None:
                _swap_reader(self.node, sysio.open_child(self._open[0], b"", os.O_RDONLY))
            self.node.unmark()
            self._copyup.renew_origin(self._upper, self._open[0], b"", self._origin)
        finally:
            self.abort()

    def abort(self) -> None:
        self._copyup.ended(self.node)
        while self._open:
            sysio.close(self._open.pop())


class _Cut(CopyUpStep):
    """A metadata-only copy whose data nobody wants any more: cut to nothing, then unmarked."""

    def __init__(self, copyup: CopyUp, upper: Upper, node: File) -> None:
        super().__init__(node)
        self._copyup = copyup
        self._upper = upper

    def publish(self) -> None:
        assert isinstance(self.node, File)
        _, dirfd, name = self._copyup.attributes.locate(self.node)
        with ExitStack() as failing:
            fd = sysio.open_child(dirfd, name, os.O_RDWR)
            failing.callback(sysio.close, fd)
            first = self._copyup.origin_without_metacopy(self._upper, fd)
            if self.node.reader is not None:
                reader = open_readable(self._copyup.stack.dirfds, fd, b"", keep_atime=False)
                failing.callback(sysio.close, reader)
            self._cut(fd)
            failing.pop_all()
        self._copyup.renew_origin(self._upper, fd, b"", first)
        if self.node.reader is not None:
            _swap_reader(self.node, reader)
        self._keep_writer(self.node, fd)
        self.node.unmark()

    @staticmethod
    def _keep_writer(node: File, fd: int) -> None:
        """Keep what a truncated file is written through, so that the open that wants it cannot fail after all."""
        if node.writer is None:
            node.writer = fd
        else:
            sysio.close(fd)

    def _cut(self, fd: int) -> None:
        """Cut, then drop the mark: the other way round a crash between would show zeros; so it shows what was there."""
        before = sysio.stat_at(fd, b"")
        sysio.truncate_fd(fd, 0)
        try:
            self._upper.drop_mark(fd, b"", xattrs.METACOPY)
        except OSError:
            with suppress(OSError):  # still marked, it is as it was
                sysio.truncate_fd(fd, before.st_size)
                sysio.utimens_at(fd, b"", before.st_atime_ns, before.st_mtime_ns)
            raise
