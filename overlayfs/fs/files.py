"""Open files and open directories: handles, and the descriptors that all handles of a node share.

A handle asks its node for the descriptor at every use, so one that was opened before copy-up reads what was written
after it. (The kernel's overlayfs cannot: overlayfs.rst, "Non-standard behavior".)
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.fs.copyup import CopyUp, Requirement, is_met
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.lookup import Child
from overlayfs.fs.metadata import Metadata
from overlayfs.fs.nodes import Dir, File, Node, close_backing, close_unused_backing
from overlayfs.fs.requirements import VerbRequirements
from overlayfs.tree.layer import open_readable

_WRITES = (os.O_WRONLY, os.O_RDWR)


class FileHandle:
    """One open file: its node, and whether it was opened for writing.

    nodeid, passthrough: for an engine that knows files by several node ids and lets the kernel read and write some of
    them by itself.
    """

    __slots__ = ("closed", "node", "nodeid", "passthrough", "writes")

    def __init__(self, node: File, writes: bool) -> None:
        self.node = node
        self.writes = writes
        self.closed = False
        self.nodeid = node.number
        self.passthrough = False


class DirHandle:
    """One open directory: its node, and the names as they were when reading began."""

    __slots__ = ("closed", "names", "node")

    def __init__(self, node: Dir) -> None:
        self.node = node
        self.closed = False
        self.names: list[bytes] | None = None


class Files(Verbs):
    """All handles of one overlay."""

    def __init__(self, core: Core, metadata: Metadata, copyup: CopyUp, requirements: VerbRequirements) -> None:
        super().__init__(core)
        self._metadata = metadata
        self._copyup = copyup
        self._requirements = requirements
        self._handles: set[FileHandle | DirHandle] = set()

    def __len__(self) -> int:
        return len(self._handles)

    def _add(self, node: File, writes: bool) -> FileHandle:
        handle = FileHandle(node, writes)
        self._handles.add(handle)
        node.handles += 1
        return handle

    # --- files -----------------------------------------------------------------------------------------

    def open(self, node: Node, flags: int, strip: bool = False) -> FileHandle:
        """Open a regular file, copied up as far as `flags`, as in open(2), require; EISDIR, ENXIO for anything else.

        strip: O_TRUNC clears set-id bits and capabilities, because the caller is not privileged to keep them.
        """
        self._copyup.copy_up_all(self._requirements.open(node, flags))
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
            close_unused_backing(node)
            raise
        return self._add(node, writes)

    def open_later(self, node: File) -> FileHandle:
        """Return a handle for reading; the real file is opened by the first read, if there is one."""
        return self._add(node, False)

    def open_created(self, node: Node, writer: int) -> FileHandle:
        """Return a handle for a file that has just been made; the node takes over the descriptor `writer`."""
        assert isinstance(node, File)
        node.writer = writer
        return self._add(node, True)

    def _open_writer(self, node: File) -> int:
        _, dirfd, name = self._objects.locate(node)
        try:
            return self._stack.dirfds.open_child(dirfd, name, os.O_RDWR | os.O_NONBLOCK)
        except PermissionError:
            return sysio.open_child(dirfd, name, os.O_WRONLY | os.O_NONBLOCK)

    def _open_reader(self, node: File) -> int:
        if node.data is not None:
            return node.data.layer.open_file(node.data.path, node.data.name)
        layer, dirfd, name = self._objects.locate(node)
        if node.in_upper:
            return open_readable(self._stack.dirfds, dirfd, name, keep_atime=False)
        assert node.lower is not None
        return layer.open_file(node.lower.path, node.lower.name)

    def _truncate(self, node: File, strip: bool) -> None:
        # O_RDONLY | O_TRUNC truncates on Linux, where the caller may write: then there may be no writer.
        self._metadata.truncate(node, 0)
        if strip:
            self._metadata.strip_set_id(node)

    def read(self, handle: FileHandle, offset: int, size: int, nowait: bool = False) -> bytes:
        """Read up to `size` bytes; BlockingIOError with `nowait` when the data is not in memory."""
        return sysio.read_at(self.readable(handle), offset, size, nowait)

    def fill(self, handle: FileHandle, offset: int, buffer: memoryview) -> int:
        """Fill a buffer with data that is in memory and return its length in bytes; BlockingIOError as `read`."""
        return sysio.fill_at(self.readable(handle), offset, buffer)

    def prepare_read(self, handle: FileHandle, offset: int, size: int) -> Callable[[], bytes]:
        """Return the call that reads up to `size` bytes. Any thread may make it, even after the handle was closed."""
        fd = os.dup(self.readable(handle))

        def read() -> bytes:
            try:
                return sysio.read_at(fd, offset, size)
            finally:
                sysio.close(fd)

        return read

    def readable(self, handle: FileHandle) -> int:
        """Return the descriptor that a handle's reads go to, borrowed; EBADF for a closed handle."""
        if handle.closed:
            raise oserror(errno.EBADF)
        node = handle.node
        fd = node.reader if node.reader is not None else node.writer
        if fd is None:  # opened by `open_later`, or for writing only before a commit
            fd = node.reader = self._open_reader(node)
        return fd

    def writable(self, handle: FileHandle) -> int:
        """Return the descriptor that a handle's writes go to, borrowed; EBADF if it is closed or only reads."""
        if handle.closed or not handle.writes:
            raise oserror(errno.EBADF)
        node = handle.node
        if node.writer is None:  # a commit has made the file that it wrote to a layer's
            if not node.in_upper or node.data is not None:
                raise oserror(errno.EBADF)
            node.writer = self._reopen_writer(node)
        return node.writer

    def _reopen_writer(self, node: File) -> int:
        # The client was allowed to open it: a mode that keeps us from doing so again does not count.
        try:
            return self._open_writer(node)
        except PermissionError:
            _, dirfd, name = self._objects.locate(node)
            mode = stat.S_IMODE(sysio.stat_at(dirfd, name).st_mode)
            sysio.chmod_at(dirfd, name, mode | stat.S_IRUSR | stat.S_IWUSR)
            try:
                return self._open_writer(node)
            finally:
                sysio.chmod_at(dirfd, name, mode)

    def write(self, handle: FileHandle, offset: int, data: bytes | memoryview) -> int:
        """Write all of `data` and return its length; EBADF for a handle that only reads.

        The file is in the upper since it was opened, unless a commit has made it part of a layer.
        """
        node = handle.node
        if handle.writes and not is_met(node, Requirement.DATA):
            self._copyup.copy_up(node, Requirement.DATA)
        return sysio.write_at(self.writable(handle), offset, data)

    def flush(self, handle: FileHandle) -> None:
        """Raise what the file system reports when the last writer closes."""
        if handle.closed:
            raise oserror(errno.EBADF)
        if handle.writes and handle.node.writer is not None:
            sysio.flush(handle.node.writer)

    def release(self, handle: FileHandle | DirHandle) -> None:
        """Close a handle; the last one of a node closes its descriptors."""
        self._handles.remove(handle)
        handle.closed = True
        handle.node.handles -= 1
        if handle.node.handles == 0:
            if isinstance(handle.node, File):
                close_backing(handle.node)
                handle.node.sync_error = 0
            self._nodes.released(handle.node)

    # --- directories -----------------------------------------------------------------------------------

    def open_dir(self, node: Node) -> DirHandle:
        """Open a directory for reading; EPERM where a redirect must not be followed."""
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR)
        if node.redirect_denied:
            raise oserror(errno.EPERM, node.name)
        handle = DirHandle(node)
        self._handles.add(handle)
        node.handles += 1
        return handle

    def read_dir(self, handle: DirHandle, offset: int) -> Iterator[Child]:
        """Return the entries from a position on, without `.` and `..`; offset 0 reads the directory again."""
        if handle.closed:
            raise oserror(errno.EBADF)
        if offset == 0 or handle.names is None:
            handle.names = self._lookup.listing(handle.node)
        names = ((handle.names[at], at + 1) for at in range(offset, len(handle.names)))
        return self._lookup.children(handle.node, names)

    def close(self) -> None:
        """Invalidate all handles; the node table closes their descriptors."""
        for handle in self._handles:
            handle.closed = True
        self._handles.clear()
