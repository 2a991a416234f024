"""Open files and open directories: handles, and the descriptors that all handles of a node share.

A handle asks its node for the descriptor at every use, so one that was opened before copy-up reads what was written
after it (design, D3; the kernel documents that it cannot).
"""

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.fs.attributes import AttributeVerbs
from overlayfs.fs.lifting import Need
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, File, Node, NodeTable, close_backing
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import open_readable

_WRITES = (os.O_WRONLY, os.O_RDWR)


class FileHandle:
    """One open file: its node, and whether it may write."""

    __slots__ = ("node", "writes")

    def __init__(self, node: File, writes: bool) -> None:
        self.node = node
        self.writes = writes


class DirHandle:
    """One open directory: its node, and the names as they were when reading began."""

    __slots__ = ("names", "node")

    def __init__(self, node: Dir) -> None:
        self.node = node
        self.names: list[bytes] | None = None


class Child(NamedTuple):
    """One entry of a directory that is being read; `offset` is where reading goes on after it."""

    name: bytes
    node: Node
    offset: int


def need_of_open(node: Node, flags: int) -> Need | None:
    """Return what opening a node with these flags needs of the upper, None for nothing."""
    if node.kind != stat.S_IFREG:
        return None
    if flags & os.O_TRUNC:
        return Need.TRUNCATED
    return Need.DATA if flags & os.O_ACCMODE in _WRITES else None


class Files:
    """All handles of one overlay."""

    def __init__(self, stack: Stack, nodes: NodeTable, lookup: Lookup, attributes: AttributeVerbs) -> None:
        self._stack = stack
        self._nodes = nodes
        self._lookup = lookup
        self._attributes = attributes
        self._handles: dict[int, FileHandle | DirHandle] = {}
        self.barrier: SyncBarrier | None = None
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._handles)

    def _add(self, handle: FileHandle | DirHandle) -> int:
        number = next(self._numbers)
        self._handles[number] = handle
        handle.node.handles += 1
        return number

    def file(self, number: int) -> FileHandle:
        """Return an open file; EBADF for any other number."""
        handle = self._handles.get(number)
        if not isinstance(handle, FileHandle):
            raise oserror(errno.EBADF)
        return handle

    def directory(self, number: int) -> DirHandle:
        """Return an open directory; EBADF for any other number."""
        handle = self._handles.get(number)
        if not isinstance(handle, DirHandle):
            raise oserror(errno.EBADF)
        return handle

    # --- files -----------------------------------------------------------------------------------------

    def open(self, node: Node, flags: int, strip: bool) -> int:
        """Open a lifted-as-needed file; `strip`: set-id bits go with O_TRUNC, for the caller is not root."""
        if not isinstance(node, File) or node.kind != stat.S_IFREG:
            raise oserror(errno.EISDIR if node.kind == stat.S_IFDIR else errno.ENXIO)
        writes = flags & os.O_ACCMODE in _WRITES
        try:
            if writes and node.writer is None:
                node.writer = self._open_writer(node)
            elif not writes and node.reader is None:
                node.reader = self._open_reader(node)
            if flags & os.O_TRUNC:
                self._truncate(node, strip)
        except BaseException:
            self.close_unused(node)
            raise
        return self._add(FileHandle(node, writes))

    @staticmethod
    def close_unused(node: Node) -> None:
        """Close the descriptors of a file that nobody has open: lifting to cut it has opened one (fs.lifting)."""
        if isinstance(node, File) and not node.handles:
            close_backing(node)

    def open_later(self, node: File) -> int:
        """Return a handle for reading a file that is opened when somebody reads from it."""
        return self._add(FileHandle(node, False))

    def adopt(self, node: File, writer: int) -> int:
        """Return a handle for a file that has just been made; `writer` becomes the node's."""
        node.writer = writer
        return self._add(FileHandle(node, True))

    def _open_writer(self, node: File) -> int:
        _, dirfd, name = self._attributes.locate(node)
        try:
            return self._stack.dirfds.retry(lambda: sysio.open_child(dirfd, name, os.O_RDWR | os.O_NONBLOCK))
        except PermissionError:
            return sysio.open_child(dirfd, name, os.O_WRONLY | os.O_NONBLOCK)

    def _open_reader(self, node: File) -> int:
        if node.data is not None:
            return node.data.layer.open_file(node.data.path, node.data.name)
        layer, dirfd, name = self._attributes.locate(node)
        if node.in_upper:
            return open_readable(self._stack.dirfds, dirfd, name, keep_atime=False)
        assert node.lower is not None
        return layer.open_file(node.lower.path, node.lower.name)

    def _truncate(self, node: File, strip: bool) -> None:
        # O_RDONLY | O_TRUNC truncates on Linux, where the caller may write: then there may be no writer.
        self._attributes.truncate(node, 0, node.writer)
        if strip:
            self._attributes.strip_set_id(node)
        self._lookup.fresh = None

    def read(self, number: int, offset: int, size: int, nowait: bool) -> bytes:
        """Read up to `size` bytes; BlockingIOError with `nowait` when a disk must be waited for."""
        return sysio.read_at(self.readable(number), offset, size, nowait)

    def prepare_read(self, number: int, offset: int, size: int) -> Callable[[], bytes]:
        """Return the call that reads, from a descriptor of its own; any thread may make it."""
        fd = os.dup(self.readable(number))

        def read() -> bytes:
            try:
                return sysio.read_at(fd, offset, size)
            finally:
                sysio.close(fd)

        return read

    def readable(self, number: int) -> int:
        """Return the descriptor that a handle's reads go to, borrowed."""
        node = self.file(number).node
        fd = node.reader if node.reader is not None else node.writer
        if fd is None:  # opened by `open_later`, or for writing only before a commit
            fd = node.reader = self._open_reader(node)
        return fd

    def writable(self, number: int) -> int:
        """Return the descriptor that a handle's writes go to, borrowed; EBADF for a handle that only reads."""
        handle = self.file(number)
        if not handle.writes:
            raise oserror(errno.EBADF)
        node = handle.node
        if node.writer is None:  # a commit has made a layer's file of what it wrote to
            if not node.in_upper or node.data is not None:
                raise oserror(errno.EBADF)
            node.writer = self._reopen_writer(node)
        return node.writer

    def _reopen_writer(self, node: File) -> int:
        # Whoever opened it was allowed to: a mode that would not let us do so again does not count.
        try:
            return self._open_writer(node)
        except PermissionError:
            _, dirfd, name = self._attributes.locate(node)
            mode = stat.S_IMODE(sysio.stat_at(dirfd, name).st_mode)
            sysio.chmod_at(dirfd, name, mode | stat.S_IRUSR | stat.S_IWUSR)
            try:
                return self._open_writer(node)
            finally:
                sysio.chmod_at(dirfd, name, mode)

    def is_stranded(self, number: int) -> bool:
        """Return whether a handle may write but its file must be lifted first: a commit came after it was opened."""
        handle = self.file(number)
        return handle.writes and not handle.node.in_upper

    def write(self, number: int, offset: int, data: bytes | memoryview) -> int:
        """Write all of `data`; EBADF for a handle that only reads."""
        fd = self.writable(number)
        self._lookup.fresh = None
        return sysio.write_at(fd, offset, data)

    def flush(self, number: int) -> None:
        """Raise what the file system reports when the last writer closes."""
        handle = self.file(number)
        if handle.writes and handle.node.writer is not None:
            sysio.flush(handle.node.writer)

    def writer_of(self, number: int | None) -> int | None:
        """Return the writing descriptor behind a handle, if there is one."""
        if number is None:
            return None
        handle = self._handles.get(number)
        return handle.node.writer if isinstance(handle, FileHandle) and handle.writes else None

    def release(self, number: int) -> None:
        """Close a handle; the last one of a node closes its descriptors."""
        handle = self._handles.pop(number)
        handle.node.handles -= 1
        if handle.node.handles == 0:
            if isinstance(handle.node, File):
                close_backing(handle.node)
                handle.node.sync_error = 0
            self._nodes.released(handle.node)

    # --- durability ------------------------------------------------------------------------------------

    def prepare_fsync(self, number: int, datasync: bool) -> Callable[[], None]:
        """Return the call that makes a file durable, name included: descriptors and values only, for any thread.

        A failed fsync is reported by every later one of the node until its last handle goes (reliability, C3).
        """
        node = self.file(number).node
        if self._stack.config.volatile or not (node.in_upper or self.barrier or node.sync_error):
            return _nothing
        sync = sysio.fdatasync if datasync else sysio.fsync
        own = node.writer if node.writer is not None else node.reader
        fd = os.dup(own) if own is not None and node.in_upper else None
        parents = self._unsynced(node)
        barrier = self.barrier
        return lambda: _sync_file(node, fd, sync, parents, barrier)

    def prepare_fsyncdir(self, number: int) -> Callable[[], None]:
        """Return the call that makes the names in a directory durable, and those that lead to it."""
        return self.prepare_fsync_of(self.directory(number).node)

    def prepare_fsync_of(self, node: Dir) -> Callable[[], None]:
        """Return the same call for a directory that has no handle."""
        if self._stack.config.volatile or not (node.in_upper or self.barrier):
            return _nothing
        own = [] if node.removed else [self._pinned(node)]
        parents = own + self._unsynced(node)
        barrier = self.barrier
        return lambda: _sync_directories(parents, barrier)

    def _unsynced(self, node: Node) -> list["_Unsynced"]:
        """Return the directories that must be synced before the names that lead to a node are durable.

        Other changes in those directories are nobody's business here: a journal that comes and goes beside a
        database costs the database nothing.
        """
        found: dict[Dir, _Unsynced] = {}
        walk = [node]
        while walk:
            child = walk.pop()
            for parent in _parents(child):
                if parent not in found and parent.in_upper and not parent.removed and parent.synced < child.appeared:
                    found[parent] = self._pinned(parent)
                walk.append(parent)
        return list(found.values())

    def _pinned(self, directory: Dir) -> "_Unsynced":
        fd = sysio.open_child(self._attributes.locate(directory).dirfd, b"", os.O_RDONLY | os.O_DIRECTORY)
        return _Unsynced(directory, directory.changed, fd)

    # --- directories -----------------------------------------------------------------------------------

    def open_dir(self, node: Node) -> int:
        """Open a directory for reading; EPERM where a redirect must not be followed."""
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR)
        if node.barred:
            raise oserror(errno.EPERM, node.name)
        return self._add(DirHandle(node))

    def read_dir(self, number: int, offset: int) -> Iterator[Child]:
        """Yield the entries from a position on, without `.` and `..`; offset 0 looks at the directory anew."""
        handle = self.directory(number)
        if offset == 0 or handle.names is None:
            handle.names = self._lookup.listing(handle.node)
        for position in range(offset, len(handle.names)):
            name = handle.names[position]
            node = self._lookup.lookup(handle.node, name)
            if node is not None:
                yield Child(name, node, position + 1)

    def close(self) -> None:
        """Forget all handles; the node table closes their descriptors."""
        self._handles.clear()


class _Unsynced(NamedTuple):
    node: Dir
    changed: int
    fd: int


def _parents(node: Node) -> Iterator[Dir]:
    if isinstance(node, File):
        yield from (parent for parent, _ in node.names)
    elif isinstance(node, Dir) and node.parent is not None:
        yield node.parent


def _nothing() -> None:
    """There is nothing to make durable."""


class SyncBarrier:
    """What every fsync waits for while a commit is not durable yet: until then no new change can be, either."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._errno = 0

    def finish(self, error: OSError | None = None) -> None:
        """Let those who wait go on, or fail with the error that the commit met."""
        self._errno = 0 if error is None else error.errno or errno.EIO
        self._finished.set()

    def wait(self) -> None:
        """Wait. In any thread but the one that calls `finish`."""
        self._finished.wait()
        if self._errno:
            raise oserror(self._errno)


def _sync_file(
    node: File,
    fd: int | None,
    sync: Callable[[int], None],
    parents: list[_Unsynced],
    barrier: SyncBarrier | None,
) -> None:
    try:
        if node.sync_error:
            raise oserror(node.sync_error)
        if barrier is not None:
            barrier.wait()
        if fd is not None:
            sync(fd)
    except OSError as error:
        node.sync_error = error.errno or errno.EIO
        for parent in parents:
            sysio.close(parent.fd)
        raise
    finally:
        if fd is not None:
            sysio.close(fd)
    _sync_directories(parents, None)


def _sync_directories(parents: list[_Unsynced], barrier: SyncBarrier | None) -> None:
    try:
        if barrier is not None:
            barrier.wait()
        for node, changed, fd in parents:
            sysio.fsync(fd)
            node.synced = changed
    finally:
        for parent in parents:
            sysio.close(parent.fd)
