"""Requests about open files: opening, data, durability, space."""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator

from overlayfs.errors import oserror
from overlayfs.fs.copyup import Requirement
from overlayfs.fs.metadata import after_change
from overlayfs.fs.names import Caller
from overlayfs.fs.nodes import File, Node
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.kernel.handshake import MAX_WRITE
from overlayfs.fuse.kernel.passthrough import KEEP_CACHE, Target
from overlayfs.fuse.kernel.protocol import (
    FSYNC_FDATASYNC,
    LAYOUTS,
    OPEN_KILL_SUIDGID,
    WRITE_KILL_SUIDGID,
    Init,
    Op,
)
from overlayfs.fuse.kernel.request import Handler, Reply, Request
from overlayfs.fuse.kernel.session import Session

_OPEN = LAYOUTS["open_in"]
_OPEN_REPLY = LAYOUTS["open_reply"]
_OPENED = LAYOUTS["open_out"]
_CREATE = LAYOUTS["create_in"]
_READ = LAYOUTS["read_in"]
_WRITE = LAYOUTS["write_in"]
_WRITTEN = LAYOUTS["write_out"]
_RELEASE = LAYOUTS["release_in"]
_FSYNC = LAYOUTS["fsync_in"]
_FALLOCATE = LAYOUTS["fallocate_in"]
_LSEEK = LAYOUTS["lseek_in"]
_COPY = LAYOUTS["copy_file_range_in"]
_LONG = LAYOUTS["copy_file_range_out"]
_OUT = LAYOUTS["out_header"]

_QUICK = 1 << 20  # bytes that are copied at once; more goes to a thread
_UNOPENED = 512  # files that a read-only mount keeps open for reads without an open


class _Opened:
    """One open file: its node, the number that the kernel opened, and whether its data goes past us."""

    __slots__ = ("node", "nodeid", "through")

    def __init__(self, node: Node, nodeid: int, through: bool) -> None:
        self.node = node
        self.nodeid = nodeid
        self.through = through


class FileHandlers:
    """The handlers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self._open_files = session.open_files
        self._no_open = session.overlay.read_only and bool(session.features & Init.NO_OPEN_SUPPORT)
        self._kills = bool(session.features & Init.HANDLE_KILLPRIV_V2)  # set-id bits are ours to drop
        self._opened: dict[int, _Opened] = {}
        self._unopened = _Unopened(session.overlay)
        self._buffer = memoryview(bytearray(MAX_WRITE))  # for what is read at once: its reply leaves before the next
        self.handlers: dict[int, Handler] = {
            Op.OPEN: self.open,
            Op.CREATE: self.create,
            Op.TMPFILE: self.tmpfile,
            Op.READ: self.read,
            Op.WRITE: self.write,
            Op.RELEASE: self.release,
            Op.FLUSH: self.flush,
            Op.FSYNC: self.fsync,
            Op.FALLOCATE: self.fallocate,
            Op.LSEEK: self.lseek,
            Op.COPY_FILE_RANGE: self.copy_file_range,
            Op.COPY_FILE_RANGE_64: self.copy_file_range_64,
        }

    def forget(self, nodeid: int) -> None:
        """The kernel has let a number go."""
        self._open_files.forget(nodeid)
        self._unopened.forget(nodeid)

    # --- opening ---------------------------------------------------------------------------------------

    def open(self, request: Request) -> Reply:
        """Open a file; O_TRUNC arrives here and no SETATTR follows. Without an upper nobody needs to open."""
        if self._no_open:
            return self._session.refused(request, errno.ENOSYS)
        flags, open_flags = _OPEN.unpack_from(request.body)
        node = self._session.node(request.nodeid)
        requirement = self._overlay.requirement_of_open(node, flags)
        if requirement is None:
            return self._open_complete(request, node) or self._open(request, node, flags, False)
        strip = bool(open_flags & OPEN_KILL_SUIDGID) if self._kills else request.uid != 0
        lifts = self._overlay.next_copy_up(node, requirement) is not None
        return self._session.change(
            request,
            lambda: ((node, requirement),),
            lambda: self._open(request, node, flags, strip, changed=lifts or bool(flags & os.O_TRUNC)),
        )

    def _open_complete(self, request: Request, node: Node) -> Reply:
        """Answer for a reader of a file that the kernel holds all of: it will hardly read from us. None for others."""
        if not self._open_files.open_complete(request.nodeid):
            return None
        handle = self._overlay.open_later(node)
        self._opened[handle] = _Opened(node, request.nodeid, False)
        return _OPEN_REPLY.pack(_OPEN_REPLY.size, 0, request.unique, handle, KEEP_CACHE, 0)

    def _open(self, request: Request, node: Node, flags: int, strip: bool, changed: bool = False) -> Reply:
        nodeid = request.nodeid
        if self._must_be_found_anew(nodeid, node):
            raise self._stale(request, node)
        handle = self._overlay.open(node, self._session.policy.backing_flags(flags), request.caller(), strip)
        reply_flags, backing = self._way(nodeid, node, handle, flags)
        if changed:
            self._session.connection.forget_attributes(nodeid)
        return _OPEN_REPLY.pack(_OPEN_REPLY.size, 0, request.unique, handle, reply_flags, backing)

    def _way(self, nodeid: int, node: Node, handle: int, flags: int) -> tuple[int, int]:
        """Decide how an open file is read and written; return flags and backing id for the reply.

        If that fails the handle is closed.
        """
        writes = flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)  # a fourth value, 3, is for ioctls alone (open(2))
        try:
            fd = self._overlay.descriptor(handle, writes)
            found = after_change(lambda: os.fstat(fd))
            own, direct, maps = _has_own_data(node), bool(flags & os.O_DIRECT), flags & os.O_ACCMODE == os.O_RDWR
            through, reply_flags, backing = self._open_files.open(
                Target(nodeid, fd, own, writes, found.st_size, found.st_mode, direct, maps)
            )
        except BaseException:
            self._overlay.release(handle)
            raise
        self._opened[handle] = _Opened(node, nodeid, through)
        return reply_flags, backing

    def _must_be_found_anew(self, nodeid: int, node: Node) -> bool:
        """Return whether a file cannot be opened by this number any more: its inode reads a file of a layer past us."""
        replaced = self._session.node_ids.is_replaced(nodeid, node)
        return replaced or self._open_files.is_replaced(nodeid, _has_own_data(node))

    def _stale(self, request: Request, node: Node) -> OSError:
        """Return the error that makes the kernel look the name up again; no caller ever sees it.

        Who opens by /proc/self/fd has no name to look up and comes again at once: it is told that the file is busy.
        """
        session, nodeid = self._session, request.nodeid
        if session.sent_back.pop(request.pid, None) == nodeid:
            return oserror(errno.EBUSY)
        session.sent_back[request.pid] = nodeid
        if not session.node_ids.is_replaced(nodeid, node):
            session.node_ids.renew(node)
            session.connection.forget_attributes(nodeid)
        return oserror(errno.ESTALE)

    def create(self, request: Request) -> Reply:
        """Make and open a file."""
        flags, mode, umask, _ = _CREATE.unpack_from(request.body)
        name, parent = request.name(_CREATE.size), self._session.node(request.nodeid)

        def act() -> Reply:
            asked = self._session.policy.backing_flags(flags)
            masked = self._session.masked(parent, mode, umask)
            is_new = self._overlay.find(parent, name) is None
            node, handle = self._overlay.create(parent, name, masked, asked, request.caller(umask))
            reply = self._created(request, node, handle, flags)
            if is_new:
                self._session.no_caps.add(self._session.node_ids.number(node))
            return reply

        return self._session.change(request, lambda: self._requirements_of_create(parent, name, flags), act)

    def _requirements_of_create(self, parent: Node, name: bytes, flags: int) -> Iterator[tuple[Node, Requirement]]:
        yield parent, Requirement.METADATA
        existing = self._overlay.find(parent, name)
        if existing is not None and (requirement := self._overlay.requirement_of_open(existing, flags)) is not None:
            yield existing, requirement

    def tmpfile(self, request: Request) -> Reply:
        """Make and open a file without a name."""
        flags, mode, umask, _ = _CREATE.unpack_from(request.body)
        parent = self._session.node(request.nodeid)

        def act() -> Reply:
            masked = self._session.masked(parent, mode, umask)
            node, handle = self._overlay.create_unnamed(parent, masked, request.caller(umask))
            return self._created(request, node, handle, flags)

        return self._session.change(request, lambda: ((parent, Requirement.METADATA),), act)

    def _created(self, request: Request, node: Node, handle: int, flags: int) -> Reply:
        if self._must_be_found_anew(self._session.node_ids.number(node), node):
            self._session.node_ids.renew(node)  # it was there already; the reply names the number
        reply_flags, backing = self._way(self._session.node_ids.number(node), node, handle, flags)
        try:
            entry = self._session.entry(request, node)
        except BaseException:
            self._close(handle)
            raise
        opened = _OPENED.pack(handle, reply_flags, backing)
        return self._session.done(request, entry[_OUT.size :] + opened)

    def release(self, request: Request) -> Reply:
        """Forget an open file."""
        handle, *_ = _RELEASE.unpack_from(request.body)
        self._close(handle)
        return self._session.done(request)

    def _close(self, handle: int) -> None:
        opened = self._opened.pop(handle, None)
        if opened is not None:  # a read-only mount has nothing open
            self._open_files.close(opened.nodeid, opened.through)
            self._overlay.release(handle)

    def flush(self, request: Request) -> Reply:
        """Decline for good: writes have gone through when they are answered, so close has nothing to add.

        The kernel takes this one ENOSYS as an answer for the life of the mount and still writes dirty
        mapped pages at close, which saves a round trip for each close.
        """
        return self._session.refused(request, errno.ENOSYS)

    def open_to_write(self) -> set[int]:
        """Return the numbers of the files that somebody may write to through the page cache."""
        opened = ((handle, each) for handle, each in self._opened.items() if not each.through)
        return {each.nodeid for handle, each in opened if self._overlay.may_write(handle)}

    def nodes_written_in_passthrough(self) -> set[Node]:
        """Return the nodes in the upper that somebody has open past us."""
        return {opened.node for opened in self._opened.values() if opened.through and opened.node.in_upper}

    # --- data ------------------------------------------------------------------------------------------

    def read(self, request: Request) -> Reply:
        """Read what is in memory at once, the rest in a thread."""
        handle, offset, size, *_ = _READ.unpack_from(request.body)
        size = min(size, MAX_WRITE)
        if not handle:
            handle = self._unopened.handle(request.nodeid, self._session.node(request.nodeid))
        try:
            count = self._overlay.fill(handle, offset, self._buffer[:size])
            return self._data(request, self._buffer[:count])
        except BlockingIOError:
            pass
        call = self._overlay.prepare_read(handle, offset, size)
        self._session.in_thread(request, call, lambda data: self._data(request, data))
        return None

    @staticmethod
    def _data(request: Request, data: bytes | memoryview) -> Reply:
        return _OUT.pack(_OUT.size + len(data), 0, request.unique), data

    def write(self, request: Request) -> Reply:
        """Write to a file that its open has lifted; after a commit the node may have to be lifted again."""
        handle, offset, size, flags, *_ = _WRITE.unpack_from(request.body)
        data = request.body[_WRITE.size : _WRITE.size + size]
        node, strip = self._node_of(handle), bool(flags & WRITE_KILL_SUIDGID) and self._kills
        if self._session.is_ready(node, Requirement.DATA):
            return self._write(request, node, handle, offset, data, strip)
        kept = bytes(data)  # the buffer takes the next request
        return self._session.change(
            request,
            lambda: ((node, Requirement.DATA),),
            lambda: self._write(request, node, handle, offset, kept, strip),
        )

    def _write(
        self, request: Request, node: Node, handle: int, offset: int, data: bytes | memoryview, strip: bool
    ) -> Reply:
        written = self._overlay.write(handle, offset, data)
        if strip:
            self._overlay.strip_set_id(node)
            self._session.connection.forget_attributes(request.nodeid)
        return self._session.done(request, _WRITTEN.pack(written, 0))

    def _node_of(self, handle: int) -> Node:
        opened = self._opened.get(handle)
        if opened is None:
            raise oserror(errno.EBADF)
        return opened.node

    def fsync(self, request: Request) -> Reply:
        """Answer when the file is durable, its name included."""
        handle, flags, _ = _FSYNC.unpack_from(request.body)
        if not handle:
            return self._session.done(request)  # without an upper everything is as durable as it will be
        return self._session.synced(request, self._overlay.prepare_fsync(handle, bool(flags & FSYNC_FDATASYNC)))

    # --- space -----------------------------------------------------------------------------------------

    def fallocate(self, request: Request) -> Reply:
        """Allocate, punch, zero, collapse or insert, as the upper's file system can."""
        handle, offset, length, mode, _ = _FALLOCATE.unpack_from(request.body)
        node = self._node_of(handle)

        def act() -> Reply:
            self._overlay.space.allocate(handle, mode, offset, length)
            self._strip_for(request, node, request.nodeid)
            return self._session.done(request)

        return self._session.change(request, lambda: ((node, Requirement.DATA),), act)

    def _strip_for(self, request: Request, node: Node, nodeid: int) -> None:
        """Drop set-id bits after a change for which the kernel neither does so nor says whether the caller keeps them.

        Only root is taken for one who does: a user with CAP_FSETID alone loses them.
        """
        if self._kills and request.uid != 0:
            self._overlay.strip_set_id(node)
            self._session.connection.forget_attributes(nodeid)

    def lseek(self, request: Request) -> Reply:
        """Find data or a hole."""
        handle, offset, whence, _ = _LSEEK.unpack_from(request.body)
        if not handle:
            handle = self._unopened.handle(request.nodeid, self._session.node(request.nodeid))
        return self._session.done(request, LAYOUTS["lseek_out"].pack(self._overlay.space.seek(handle, offset, whence)))

    def copy_file_range(self, request: Request) -> Reply:
        """Copy between two open files; the length of what was copied is a 32-bit number here."""
        return self._copy(request, most=1 << 30, wide=False)

    def copy_file_range_64(self, request: Request) -> Reply:
        """Copy between two open files."""
        return self._copy(request, most=1 << 40, wide=True)

    def _copy(self, request: Request, most: int, wide: bool) -> Reply:
        source, offset, nodeid, target, target_offset, length, _ = _COPY.unpack_from(request.body)
        node, length = self._node_of(target), min(length, most)

        def wanted() -> tuple[tuple[Node, Requirement]]:
            return ((node, Requirement.DATA),)

        def reply(copied: int) -> Reply:
            self._strip_for(request, node, nodeid)
            return self._session.done(request, _LONG.pack(copied) if wide else _WRITTEN.pack(copied, 0))

        def prepare() -> Callable[[], int]:
            return self._overlay.space.prepare_copy(source, offset, target, target_offset, length)

        if length <= _QUICK:
            return self._session.change(request, wanted, lambda: reply(prepare()()))
        self._session.change_in_thread(request, wanted, prepare, reply)
        return None


class _Unopened:
    """Files of a read-only mount that are read without having been opened; the least recently read are closed."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._handles: OrderedDict[int, int] = OrderedDict()

    def handle(self, nodeid: int, node: Node) -> int:
        """Return a handle for a node."""
        handle = self._handles.pop(nodeid, None)
        if handle is None:
            handle = self._overlay.open(node, os.O_RDONLY, Caller(0, 0))
        self._handles[nodeid] = handle
        if len(self._handles) > _UNOPENED:
            self._overlay.release(self._handles.popitem(last=False)[1])
        return handle

    def forget(self, nodeid: int) -> None:
        """Close a file that the kernel has forgotten."""
        handle = self._handles.pop(nodeid, None)
        if handle is not None:
            self._overlay.release(handle)


def _has_own_data(node: Node) -> bool:
    """Return whether the data of a node lies in the upper."""
    return node.in_upper and not (isinstance(node, File) and node.data is not None)
