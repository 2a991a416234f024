"""The handlers of libfuse's requests.

Three rules of pyfuse3 shape the code: an exception that is not a FUSEError ends its main loop, so each handler is
wrapped by `_request`; st_ino of a reply is the node id; and every entry of a listing that the reply took counts as one
look-up.
"""

import contextlib
import errno
import functools
import inspect
import itertools
import os
import stat
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from overlayfs.errors import oserror
from overlayfs.fs.files import DirHandle, FileHandle
from overlayfs.fs.lookup import Child
from overlayfs.fs.metadata import Attributes, Changes
from overlayfs.fs.names import Caller
from overlayfs.fs.nodes import Dir, Node
from overlayfs.fuse import request_log
from overlayfs.fuse.engine import UNKNOWN_NUMBER, Engine, MountSettings, reply_errno
from overlayfs.tree.stats import AnyStat

P = ParamSpec("P")
R = TypeVar("R")
Handler: TypeAlias = Callable[Concatenate["Handlers", P], Coroutine[Any, Any, R]]

ACL_ACCESS = b"system.posix_acl_access"
DOTS = 2  # offsets up to here are those of "." and ".."


_NAMES = ("name", "name_old", "new_name", "target", "name_new")  # parameters of handlers, in the order of the kernel
_KINDS = {"forget": "FORGET", "flush": "FLUSH"}  # name of a handler -> kind of request; others add themselves


def _request(kind: str) -> Callable[[Handler[P, R]], Handler[P, R]]:
    """Count requests of `kind` and turn every exception of the handler into an errno for the caller."""

    def decorate(handler: Handler[P, R]) -> Handler[P, R]:
        _KINDS[handler.__name__] = kind

        @functools.wraps(handler)
        async def guarded(self: "Handlers", /, *args: P.args, **keywords: P.kwargs) -> R:
            self.counters[kind] += 1
            try:
                return await handler(self, *args, **keywords)
            except FUSEError:
                raise
            except Exception as error:
                raise FUSEError(reply_errno(error, kind)) from None

        return guarded

    return decorate


class Handlers(pyfuse3.Operations):
    """Each handler finds the node, copies it up if it will change, calls the overlay and returns attributes."""

    supports_dot_lookup = False  # a forgotten node id cannot be looked up again

    def __init__(self, engine: Engine, settings: MountSettings) -> None:
        super().__init__()
        self.enable_acl = settings.acl
        self.enable_writeback_cache = engine.policy.writeback
        self.counters = engine.counters
        self.ready: Callable[[], None] = lambda: None
        self._overlay = engine.overlay
        self._files = engine.overlay.files
        self._names = engine.overlay.names
        self._requirements = engine.overlay.requirements
        self._policy = engine.policy
        self._gate = engine.gate
        self._threads = engine.threads
        self._copy_up_all = engine.copyup_runner.copy_up_all
        self._xattrs = settings.xattrs
        self._handles: dict[int, FileHandle] = {}  # open files by their number, `fh`
        self._dir_handles: dict[int, DirHandle] = {}
        self._numbers = itertools.count(1)

        if request_log.is_enabled():
            for name, kind in _KINDS.items():
                setattr(self, name, self._logged(kind, getattr(self, name)))

    def _logged(
        self, kind: str, handler: Callable[..., Coroutine[Any, Any, R]]
    ) -> Callable[..., Coroutine[Any, Any, R]]:
        """Return the handler with a debug line for each request, written when it is answered."""
        signature = inspect.signature(handler)

        async def logged(*args: Any, **keywords: Any) -> R:
            began = request_log.clock()
            given = signature.bind(*args, **keywords).arguments
            nodeid, code = self._nodeid(given), 0
            try:
                reply = await handler(*args, **keywords)
                if kind == "LOOKUP" and isinstance(reply, EntryAttributes) and not reply.st_ino:
                    code = errno.ENOENT
                return reply
            except FUSEError as error:
                code = error.errno
                raise
            finally:
                names = [given[each] for each in _NAMES if each in given]
                request_log.write(kind, nodeid, names, code, began)

        return logged

    def _nodeid(self, given: Mapping[str, Any]) -> int:
        """Return the node id that a request is about, 0 for none: of its node, its directory or its open file."""
        for name in ("new_parent_inode", "inode", "parent_inode", "parent_inode_old"):
            if name in given:
                return int(given[name])
        handle = self._handles.get(given.get("fh", 0)) or self._dir_handles.get(given.get("fh", 0))
        return handle.node.number if handle is not None else 0

    def init(self) -> None:
        """Report the handshake. libfuse calls this before the first request; it must not raise."""
        self.ready()

    # nodes and attributes

    def _node(self, number: int) -> Node:
        node = self._overlay.nodes.find(number)
        if node is None:
            raise oserror(errno.ESTALE)
        return node

    def _entry(self, node: Node, stat: AnyStat | None) -> EntryAttributes:
        """Return the reply that makes the kernel know `node`, and count the look-up."""
        entry = self._attributes(node, self._overlay.metadata.attributes(node, stat))
        self._overlay.nodes.remember(node)
        return entry

    def _attributes(self, node: Node, found: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.number
        entry.entry_timeout = self._policy.entry
        entry.attr_timeout = self._policy.attributes
        entry.st_mode = found.mode
        entry.st_nlink = found.nlink
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_rdev = found.rdev
        entry.st_size = found.size
        entry.st_blksize = found.blksize
        entry.st_blocks = found.blocks
        entry.st_atime_ns = found.atime_ns
        entry.st_mtime_ns = found.mtime_ns
        entry.st_ctime_ns = found.ctime_ns
        return entry

    def _absent(self) -> EntryAttributes:
        """Return the reply that makes the kernel cache the absence of a name."""
        entry = EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = self._policy.negative
        return entry

    @_request("LOOKUP")
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Answer with the node under `name`, or with its absence, which the kernel caches."""
        found = self._overlay.find(self._node(parent_inode), name)
        return self._absent() if found is None else self._entry(*found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take back look-ups. There is no reply, so errors are only logged."""
        self.counters["FORGET"] += 1
        for number, count in inode_list:
            try:
                self._overlay.nodes.forget(number, count)
            except Exception as error:
                reply_errno(error, "FORGET")

    @_request("GETATTR")
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Answer with the attributes of the real object."""
        node = self._node(inode)
        return self._attributes(node, self._overlay.attributes(node))

    @_request("SETATTR")
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change all of `fields` in one call: the kernel sends new modes together with owner or size."""
        node = self._node(inode)
        changes = _changes(attr, fields)
        if changes == Changes():
            return self._attributes(node, self._overlay.attributes(node))
        async with self._gate.change():
            await self._copy_up_all(lambda: self._requirements.set_attributes(node, changes))
            found = self._overlay.set_attributes(node, changes)
        return self._attributes(node, found)

    @_request("READLINK")
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Answer with the target of a symbolic link."""
        return self._overlay.metadata.readlink(self._node(inode))

    # names

    @_request("MKDIR")
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Create a directory."""
        async with self._gate.change():
            parent = await self._parent(parent_inode)
            return self._entry(*self._names.mkdir(parent, name, mode, _caller(ctx)))

    @_request("MKNOD")
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Create a device, FIFO, socket or regular file."""
        async with self._gate.change():
            parent = await self._parent(parent_inode)
            return self._entry(*self._names.mknod(parent, name, mode, rdev, _caller(ctx)))

    @_request("SYMLINK")
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Create a symbolic link."""
        async with self._gate.change():
            parent = await self._parent(parent_inode)
            return self._entry(*self._names.symlink(parent, name, target, _caller(ctx)))

    @_request("LINK")
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Create a hard link."""
        async with self._gate.change():
            node, parent = self._node(inode), self._node(new_parent_inode)
            await self._copy_up_all(lambda: self._requirements.link(node, parent))
            return self._entry(*self._names.link(node, parent, new_name))

    @_request("UNLINK")
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name of a non-directory."""
        async with self._gate.change():
            parent = self._node(parent_inode)
            await self._copy_up_all(lambda: self._requirements.unlink(parent, name))
            self._names.unlink(parent, name)

    @_request("RMDIR")
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        async with self._gate.change():
            parent = self._node(parent_inode)
            await self._copy_up_all(lambda: self._requirements.rmdir(parent))
            self._names.rmdir(parent, name)

    @_request("RENAME")
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename; the overlay refuses flags other than NOREPLACE and EXCHANGE."""
        async with self._gate.change():
            old, new = self._node(parent_inode_old), self._node(parent_inode_new)
            plan = await self._copy_up_all(lambda: self._requirements.rename(old, name_old, new, name_new, flags))
            self._names.move(plan)

    async def _parent(self, number: int) -> Node:
        """Return the directory `number`, ready for a new entry."""
        parent = self._node(number)
        await self._copy_up_all(lambda: self._requirements.make(parent))
        return parent

    # open files

    @_request("CREATE")
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Create and open a file."""
        flags = self._policy.backing_flags(flags)
        async with self._gate.change():
            parent = self._node(parent_inode)
            await self._copy_up_all(lambda: self._requirements.create(parent, name, flags))
            found, handle = self._overlay.create(parent, name, mode, flags, _caller(ctx))
        try:
            entry = self._entry(*found)
        except OSError:
            self._files.release(handle)
            raise
        return self._file_info(handle), entry

    @_request("OPEN")
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; O_TRUNC arrives here and no SETATTR follows."""
        node = self._node(inode)
        flags = self._policy.backing_flags(flags)
        if not self._requirements.open(node, flags):
            return self._file_info(self._files.open(node, flags))
        async with self._gate.change():
            await self._copy_up_all(lambda: self._requirements.open(node, flags))
            handle = self._files.open(node, flags, strip=ctx.uid != 0)
        if flags & os.O_TRUNC and ctx.uid:
            self._mode_changed(inode)
        return self._file_info(handle)

    def _file_info(self, handle: FileHandle) -> FileInfo:
        """Give an open file a number and return the reply to its open."""
        number = next(self._numbers)
        self._handles[number] = handle
        return FileInfo(fh=number, keep_cache=self._policy.keep_cache)

    def _file(self, number: int) -> FileHandle:
        handle = self._handles.get(number)
        if handle is None:
            raise oserror(errno.EBADF)
        return handle

    def open_to_write(self) -> set[int]:
        """Return the node ids of the files that are open for writing."""
        return {handle.node.number for handle in self._handles.values() if handle.writes}

    def _mode_changed(self, inode: int) -> None:
        """Make the kernel ask for the mode again: truncating may have cleared set-id bits.

        On the loop only attributes may be invalidated; invalidating entries or pages would deadlock.
        """
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_inode(inode, attr_only=True)

    @_request("READ")
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read what is in memory at once, the rest in a thread."""
        handle = self._file(fh)
        try:
            return self._files.read(handle, off, size, nowait=True)
        except BlockingIOError:
            return await self._threads.run(self._files.prepare_read(handle, off, size))

    @_request("WRITE")
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to a file, which its open has copied up; after a commit it may have to be copied up again."""
        handle = self._file(fh)
        async with self._gate.change():
            await self._copy_up_all(lambda: self._requirements.write(handle.node))
            return self._files.write(handle, off, buf)

    async def flush(self, fh: int) -> None:
        """Decline for good: writes have gone through when they are answered, so close has nothing to add.

        The kernel takes this one ENOSYS as an answer for the life of the mount and still writes dirty
        mapped pages at close, which saves a round trip for each close.
        """
        raise FUSEError(errno.ENOSYS)

    @_request("FSYNC")
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Return when the file is durable, its name included."""
        await self._threads.run(self._overlay.prepare_fsync(self._file(fh), datasync))

    @_request("RELEASE")
    async def release(self, fh: int) -> None:
        """Close an open file."""
        self._files.release(self._handles.pop(fh))

    # directories

    @_request("OPENDIR")
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory for reading."""
        number = next(self._numbers)
        self._dir_handles[number] = self._files.open_dir(self._node(inode))
        return number

    @_request("READDIRPLUS")
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Fill one reply with entries from `start_id` on."""
        handle = self._dir_handles[fh]
        if start_id < DOTS and not self._reply_dots(handle.node, start_id, token):
            return
        for child in self._files.read_dir(handle, max(start_id - DOTS, 0)):
            if not self._reply_entry(token, child):
                return

    def _reply_dots(self, node: Dir, start: int, token: pyfuse3.ReaddirToken) -> bool:
        """Add "." and ".."; the kernel uses only their inode numbers and counts no look-up."""
        for offset, (name, number) in enumerate(self._dots(node), 1):
            entry = EntryAttributes()
            entry.st_ino = number
            entry.st_mode = stat.S_IFDIR
            if offset > start and not pyfuse3.readdir_reply(token, name, entry, offset):
                return False
        return True

    def _dots(self, node: Dir) -> Iterator[tuple[bytes, int]]:
        yield b".", node.number
        yield b"..", (node.parent or node).number

    def _reply_entry(self, token: pyfuse3.ReaddirToken, child: Child) -> bool:
        name, node, offset = child.name, child.node, child.offset + DOTS
        try:
            entry = None
            if node is not None:
                entry = self._attributes(node, self._overlay.metadata.attributes(node, child.stat))
        except OSError:
            entry = None
        if node is None or entry is None:
            return bool(pyfuse3.readdir_reply(token, name, _unreadable(), offset))
        taken = pyfuse3.readdir_reply(token, name, entry, offset)
        if taken:
            self._overlay.nodes.remember(node)
        return bool(taken)

    @_request("RELEASEDIR")
    async def releasedir(self, fh: int) -> None:
        """Close an open directory."""
        self._files.release(self._dir_handles.pop(fh))

    @_request("FSYNCDIR")
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Return when the names in the directory, and those that lead to it, are durable."""
        await self._threads.run(self._overlay.prepare_fsync_dir(self._dir_handles[fh].node))

    # extended attributes

    @_request("GETXATTR")
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Answer with a value, ENODATA without one."""
        self._check_xattrs()
        return self._overlay.metadata.getxattr(self._node(inode), name)

    @_request("LISTXATTR")
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Answer with the visible names."""
        self._check_xattrs()
        return self._overlay.metadata.listxattr(self._node(inode))

    def _check_xattrs(self) -> None:
        if not self._xattrs:
            raise oserror(errno.EOPNOTSUPP)

    @_request("SETXATTR")
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set a value; pyfuse3 has compared XATTR_CREATE and XATTR_REPLACE with a getxattr before.

        Nothing comes between the two: the kernel holds the inode's lock over setxattr.
        """
        self._check_xattrs()
        node = self._node(inode)
        async with self._gate.change():
            await self._copy_up_all(lambda: self._requirements.setxattr(node, name))
            self._overlay.setxattr(node, name, value)
            if name == ACL_ACCESS:
                self._clear_foreign_set_gid(node, ctx)

    def _clear_foreign_set_gid(self, node: Node, ctx: RequestContext) -> None:
        """Clear S_ISGID, as chmod would, when an ACL is set by a user outside the file's group.

        pyfuse3 does not pass on the flag by which the kernel asks for it (FUSE_SETXATTR_ACL_KILL_SGID).
        """
        found = self._overlay.attributes(node)
        if found.mode & stat.S_ISGID and ctx.uid and not _in_group(ctx, found.gid):
            mode = stat.S_IMODE(found.mode) & ~stat.S_ISGID
            self._overlay.set_attributes(node, Changes(mode=mode))

    @_request("REMOVEXATTR")
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a value; ENODATA for none, before anything is copied up."""
        self._check_xattrs()
        node = self._node(inode)
        async with self._gate.change():
            await self._copy_up_all(lambda: self._requirements.removexattr(node, name))
            self._overlay.removexattr(node, name)

    @_request("STATFS")
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Answer with the capacity of the file system of the upper, or of the top layer."""
        found = self._overlay.metadata.statfs()
        reply = StatvfsData()
        reply.f_bsize, reply.f_frsize = found.f_bsize, found.f_frsize
        reply.f_blocks, reply.f_bfree, reply.f_bavail = found.f_blocks, found.f_bfree, found.f_bavail
        reply.f_files, reply.f_ffree, reply.f_favail = found.f_files, found.f_ffree, found.f_favail
        reply.f_namemax = min(found.f_namemax, self._overlay.metadata.longest_name)
        return reply


def _unreadable() -> EntryAttributes:
    """Return the entry for a name whose attributes cannot be read: the kernel shows the name and ignores the rest.

    It forgets the inode number at once, since the entry has no type (fuse_direntplus_link in fs/fuse/readdir.c).
    """
    entry = EntryAttributes()
    entry.st_ino = UNKNOWN_NUMBER
    entry.st_mode = 0
    return entry


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.umask)


def _in_group(ctx: RequestContext, gid: int) -> bool:
    """Return whether a client is in a group; only the primary one if its process is gone or in another namespace."""
    try:
        return gid == ctx.gid or gid in pyfuse3.get_sup_groups(ctx.pid)
    except (OSError, RuntimeError):
        return False


def _changes(attr: EntryAttributes, fields: SetattrFields) -> Changes:
    return Changes(
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )
