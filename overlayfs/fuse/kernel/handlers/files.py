"""Requests about open files: opening and closing, data, durability, space."""

import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable

from overlayfs.errors import oserror
from overlayfs.fs.copyup import Requirements, is_met
from overlayfs.fs.files import FileHandle, Files
from overlayfs.fs.nodes import File, Node
from overlayfs.fs.real_objects import after_change
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
from overlayfs.tree.stats import AnyStat

_OPEN = LAYOUTS["open_in"]
_OPEN_REPLY = LAYOUTS["open_reply"]
_CREATE = LAYOUTS["create_in"]
_CREATE_REPLY = LAYOUTS["create_reply"]
_READ = LAYOUTS["read_in"]
_WRITE = LAYOUTS["write_in"]
_WRITE_REPLY = LAYOUTS["write_reply"]
_RELEASE = LAYOUTS["release_in"]
_FSYNC = LAYOUTS["fsync_in"]
_FALLOCATE = LAYOUTS["fallocate_in"]
_LSEEK = LAYOUTS["lseek_in"]
_COPY = LAYOUTS["copy_file_range_in"]
_COPIED = LAYOUTS["write_out"]
_COPIED_64 = LAYOUTS["copy_file_range_out"]
_OUT = LAYOUTS["out_header"]

_QUICK = 1 << 20  # bytes; longer copies are left to a thread
_UNOPENED = 512  # files that a read-only mount keeps open for reads without an open


class FileHandlers:
    """Handles requests about open files, which the kernel names by the number (`fh`) in the reply to their open."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self._files = session.overlay.files
        self._gate = session.gate
        self._open_files = session.open_files
        self._no_open = session.overlay.read_only and bool(session.features & Init.NO_OPEN_SUPPORT)
        self._kills = bool(session.features & Init.HANDLE_KILLPRIV_V2)  # clearing set-id bits is left to us
        self._handles = session.handles
        self._numbers = itertools.count(1)
        self._unopened = _Unopened(session.overlay.files)
        self._buffer = memoryview(bytearray(MAX_WRITE))  # of reads answered at once: sent before the next one is read
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
        """Note that the kernel has forgotten a node id."""
        self._open_files.forget(nodeid)
        self._unopened.forget(nodeid)

    def open_to_write(self) -> set[int]:
        """Return the node ids of the files that may be written to through the page cache."""
        return {each.nodeid for each in self._handles.values() if each.writes and not each.passthrough}

    def nodes_written_in_passthrough(self) -> set[Node]:
        """Return the nodes in the upper that are open in passthrough."""
        return {each.node for each in self._handles.values() if each.passthrough and each.node.in_upper}

    def _handle(self, number: int) -> FileHandle:
        """Return an open file; EBADF for none."""
        handle = self._handles.get(number)
        if handle is None:
            raise oserror(errno.EBADF)
        return handle

    def _readable(self, request: Request, number: int) -> FileHandle:
        """Return an open file, or one of a read-only mount that the kernel reads without opening it (number 0)."""
        if number:
            return self._handle(number)
        return self._unopened.handle(request.nodeid, self._session.node(request.nodeid))

    # --- opening ---------------------------------------------------------------------------------------

    def open(self, request: Request) -> Reply:
        """Open a file; O_TRUNC arrives here and no SETATTR follows. On a read-only mount the kernel need not open."""
        if self._no_open:
            return self._session.error(request, errno.ENOSYS)
        flags, open_flags = _OPEN.unpack_from(request.body)
        node = self._session.node(request.nodeid)
        required = self._overlay.requirements.open(node, flags)
        if not required:
            return self._open_complete(request, node) or self._open(request, node, flags, False)
        strip = bool(open_flags & OPEN_KILL_SUIDGID) if self._kills else request.uid != 0
        changed = bool(flags & os.O_TRUNC) or not is_met(*required[0])
        return self._session.change(
            request, lambda: required, lambda _: self._open(request, node, flags, strip, changed)
        )

    def _open_complete(self, request: Request, node: Node) -> Reply:
        """Answer for a reader of a file of which the kernel has all pages: it will hardly send a READ. Else None."""
        if not isinstance(node, File) or not self._open_files.open_complete(request.nodeid):
            return None
        number = self._add(self._files.open_later(node), request.nodeid, False)
        return _OPEN_REPLY.pack(_OPEN_REPLY.size, 0, request.unique, number, KEEP_CACHE, 0)

    def _open(self, request: Request, node: Node, flags: int, strip: bool, changed: bool = False) -> Reply:
        nodeid = request.nodeid
        if self._is_stale(nodeid, node):
            raise self._stale_error(request, node)
        handle = self._files.open(node, self._session.policy.backing_flags(flags), strip)
        number, reply_flags, backing_id = self._choose_mode(handle, nodeid, flags)
        if changed:
            self._session.connection.forget_attributes(nodeid)
        return _OPEN_REPLY.pack(_OPEN_REPLY.size, 0, request.unique, number, reply_flags, backing_id)

    def _choose_mode(self, handle: FileHandle, nodeid: int, flags: int) -> tuple[int, int, int]:
        """Decide between the page cache and passthrough; return number, flags and backing id for the reply.

        If that fails the handle is closed.
        """
        writes = flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)  # a fourth value, 3, only allows ioctls (open(2))
        try:
            fd = self._files.writable(handle) if writes else self._files.readable(handle)
            found = after_change(lambda: os.fstat(fd))
            in_upper, direct = _has_data(handle.node), bool(flags & os.O_DIRECT)
            maps = flags & os.O_ACCMODE == os.O_RDWR
            reply_flags, backing_id = self._open_files.open(
                Target(nodeid, fd, in_upper, writes, found.st_size, found.st_mode, direct, maps)
            )
        except BaseException:
            self._files.release(handle)
            raise
        return self._add(handle, nodeid, backing_id != 0), reply_flags, backing_id

    def _add(self, handle: FileHandle, nodeid: int, passthrough: bool) -> int:
        handle.nodeid, handle.passthrough = nodeid, passthrough
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def _is_stale(self, nodeid: int, node: Node) -> bool:
        """Return whether a file cannot be opened by this node id: its inode reads a file of a layer in passthrough."""
        return self._session.node_ids.is_stale(nodeid, node) or self._open_files.is_stale(nodeid, _has_data(node))

    def _stale_error(self, request: Request, node: Node) -> OSError:
        """Return the error that makes the kernel look the name up again; callers never see it.

        An open of /proc/self/fd/N has no name to look up and is repeated at once: that one gets EBUSY.
        """
        session, nodeid = self._session, request.nodeid
        if session.sent_back.pop(request.pid, None) == nodeid:
            return oserror(errno.EBUSY)
        session.sent_back[request.pid] = nodeid
        if not session.node_ids.is_stale(nodeid, node):
            session.node_ids.renew(node)
            session.connection.forget_attributes(nodeid)
        return oserror(errno.ESTALE)

    def create(self, request: Request) -> Reply:
        """Make and open a file."""
        flags, mode, umask, _ = _CREATE.unpack_from(request.body)
        name, parent = request.name(_CREATE.size), self._session.node(request.nodeid)

        def act(_: Requirements) -> Reply:
            masked = self._session.masked(parent, mode, umask)
            is_new = self._overlay.find(parent, name) is None
            found, handle = self._overlay.create(
                parent, name, masked, self._session.policy.backing_flags(flags), request.caller(umask)
            )
            reply = self._created(request, *found, handle, flags)
            if is_new:
                self._session.no_caps.add(handle.nodeid)
            return reply

        return self._session.change(request, lambda: self._overlay.requirements.create(parent, name, flags), act)

    def tmpfile(self, request: Request) -> Reply:
        """Make and open a file without a name."""
        flags, mode, umask, _ = _CREATE.unpack_from(request.body)
        parent = self._session.node(request.nodeid)

        def act(_: Requirements) -> Reply:
            masked = self._session.masked(parent, mode, umask)
            found, handle = self._overlay.create_unnamed(parent, masked, request.caller(umask))
            return self._created(request, *found, handle, flags)

        return self._session.change(request, lambda: self._overlay.requirements.make(parent), act)

    def _created(self, request: Request, node: Node, stat: AnyStat | None, handle: FileHandle, flags: int) -> Reply:
        session = self._session
        if self._is_stale(session.node_ids.nodeid(node), node):
            session.node_ids.renew(node)  # the file existed; the reply names the node id that is to be used
        number, reply_flags, backing_id = self._choose_mode(handle, session.node_ids.nodeid(node), flags)
        try:
            found = self._overlay.metadata.attributes(node, stat)
        except BaseException:
            self._close(number)
            raise
        entry = session.entry_fields(session.node_ids.remember(node), node, found)
        return _CREATE_REPLY.pack(_CREATE_REPLY.size, 0, request.unique, *entry, number, reply_flags, backing_id)

    def release(self, request: Request) -> Reply:
        """Close an open file."""
        number, *_ = _RELEASE.unpack_from(request.body)
        self._close(number)
        return self._session.ok(request)

    def _close(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:  # a read-only mount has nothing open
            self._open_files.close(handle.nodeid, handle.passthrough)
            self._files.release(handle)

    def flush(self, request: Request) -> Reply:
        """Decline for good: writes have gone through when they are answered, so close has nothing to add.

        The kernel takes this one ENOSYS as an answer for the life of the mount and still writes dirty
        mapped pages at close, which saves a round trip for each close.
        """
        return self._session.error(request, errno.ENOSYS)

    # --- data ------------------------------------------------------------------------------------------

    def read(self, request: Request) -> Reply:
        """Read what is in memory at once, the rest in a thread."""
        number, offset, size, *_ = _READ.unpack_from(request.body)
        handle = self._handles.get(number) or self._readable(request, number)
        data = self._buffer[:size]
        try:
            data = data[: self._files.fill(handle, offset, data)]
        except BlockingIOError:
            call = self._files.prepare_read(handle, offset, min(size, MAX_WRITE))
            self._session.in_thread(
                request, call, lambda data: (_OUT.pack(_OUT.size + len(data), 0, request.unique), data)
            )
            return None
        return _OUT.pack(_OUT.size + len(data), 0, request.unique), data

    def write(self, request: Request) -> Reply:
        """Write to a file, which its open has copied up; after a commit it may have to be copied up again."""
        number, offset, size, flags, *_ = _WRITE.unpack_from(request.body)
        data = request.body[_WRITE.size : _WRITE.size + size]
        handle = self._handles.get(number) or self._handle(number)
        node, strip = handle.node, self._kills and bool(flags & WRITE_KILL_SUIDGID)
        if node.in_upper and node.data is None and not self._gate.closed:
            return self._write(request, handle, offset, data, strip)
        kept = bytes(data)  # the next request overwrites the buffer
        return self._session.change(
            request,
            lambda: self._overlay.requirements.write(node),
            lambda _: self._write(request, handle, offset, kept, strip),
        )

    def _write(self, request: Request, handle: FileHandle, offset: int, data: bytes | memoryview, strip: bool) -> Reply:
        written = self._files.write(handle, offset, data)
        if strip:
            self._overlay.metadata.strip_set_id(handle.node)
            self._session.connection.forget_attributes(request.nodeid)
        return _WRITE_REPLY.pack(_WRITE_REPLY.size, 0, request.unique, written, 0)

    def fsync(self, request: Request) -> Reply:
        """Answer when the file is durable, its name included."""
        number, flags, _ = _FSYNC.unpack_from(request.body)
        if not number:
            return self._session.ok(request)  # a read-only mount has nothing to make durable
        call = self._overlay.prepare_fsync(self._handle(number), bool(flags & FSYNC_FDATASYNC))
        return self._session.sync(request, call)

    # --- space -----------------------------------------------------------------------------------------

    def fallocate(self, request: Request) -> Reply:
        """Allocate, punch, zero, collapse or insert, as the upper's file system can."""
        number, offset, length, mode, _ = _FALLOCATE.unpack_from(request.body)
        handle = self._handle(number)

        def act(_: Requirements) -> Reply:
            self._overlay.space.allocate(handle, mode, offset, length)
            self._strip_for(request, handle.node, request.nodeid)
            return self._session.ok(request)

        return self._session.change(request, lambda: self._overlay.requirements.write(handle.node), act)

    def _strip_for(self, request: Request, node: Node, nodeid: int) -> None:
        """Clear set-id bits after a change for which the kernel neither does so nor says whether the caller keeps them.

        Only root is assumed to keep them: a user who has CAP_FSETID and is not root loses them.
        """
        if self._kills and request.uid != 0:
            self._overlay.metadata.strip_set_id(node)
            self._session.connection.forget_attributes(nodeid)

    def lseek(self, request: Request) -> Reply:
        """Find data or a hole."""
        number, offset, whence, _ = _LSEEK.unpack_from(request.body)
        found = self._overlay.space.seek(self._readable(request, number), offset, whence)
        return self._session.ok(request, LAYOUTS["lseek_out"].pack(found))

    def copy_file_range(self, request: Request) -> Reply:
        """Copy between two open files; the reply has a length of 32 bits."""
        return self._copy(request, 1 << 30, lambda copied: _COPIED.pack(copied, 0))

    def copy_file_range_64(self, request: Request) -> Reply:
        """Copy between two open files."""
        return self._copy(request, 1 << 40, _COPIED_64.pack)

    def _copy(self, request: Request, most: int, body: Callable[[int], bytes]) -> Reply:
        number, offset, nodeid, target_number, target_offset, length, _ = _COPY.unpack_from(request.body)
        source, target = self._handle(number), self._handle(target_number)
        length = min(length, most)

        def requirements() -> Requirements:
            return self._overlay.requirements.write(target.node)

        def prepare() -> Callable[[], int]:
            return self._overlay.space.prepare_copy(source, offset, target, target_offset, length)

        def reply(copied: int) -> Reply:
            self._strip_for(request, target.node, nodeid)
            return self._session.ok(request, body(copied))

        if length <= _QUICK:
            return self._session.change(request, requirements, lambda _: reply(prepare()()))
        self._session.change_in_thread(request, requirements, prepare, reply)
        return None


class _Unopened:
    """Files of a read-only mount that are read without having been opened; the least recently read are closed."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._handles: OrderedDict[int, FileHandle] = OrderedDict()

    def handle(self, nodeid: int, node: Node) -> FileHandle:
        """Return a handle for a node."""
        handle = self._handles.pop(nodeid, None) or self._files.open(node, os.O_RDONLY, strip=False)
        self._handles[nodeid] = handle
        if len(self._handles) > _UNOPENED:
            self._files.release(self._handles.popitem(last=False)[1])
        return handle

    def forget(self, nodeid: int) -> None:
        """Close the file of a node id that the kernel has forgotten."""
        handle = self._handles.pop(nodeid, None)
        if handle is not None:
            self._files.release(handle)


def _has_data(node: Node) -> bool:
    """Return whether the data of a node is in the upper."""
    return node.in_upper and not (isinstance(node, File) and node.data is not None)
