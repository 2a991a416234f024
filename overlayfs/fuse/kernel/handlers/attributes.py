"""Requests about nodes: attributes, links, extended attributes, flags; and about the file system as a whole."""

import errno
import os
import stat

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.fs.attributes import Attributes, Changes
from overlayfs.fs.copyup import Requirement
from overlayfs.fs.nodes import Node
from overlayfs.fs.space import CHANGING_REQUESTS
from overlayfs.fuse.kernel.protocol import LAYOUTS, SETXATTR_ACL_KILL_SGID, Attr, Init, Op
from overlayfs.fuse.kernel.session import Handler, Reply, Request, Session

_SETATTR = LAYOUTS["setattr_in"]
_SETXATTR = LAYOUTS["setxattr_in"]
_OLD_SETXATTR = LAYOUTS["getxattr_in"]  # before FUSE_SETXATTR_EXT: size and flags alone
_GETXATTR = LAYOUTS["getxattr_in"]
_SIZE = LAYOUTS["getxattr_out"]
_STATX = LAYOUTS["statx_in"]
_IOCTL = LAYOUTS["ioctl_in"]
_IOCTL_OUT = LAYOUTS["ioctl_out"]
_INTERRUPT = LAYOUTS["interrupt_in"]

# Plain numbers: a flag of the enum module costs half a microsecond each time it is looked at.
_MODE, _UID, _GID, _FH = int(Attr.MODE), int(Attr.UID), int(Attr.GID), int(Attr.FH)
_SIZE_SET, _KILL = int(Attr.SIZE), int(Attr.KILL_SUIDGID)
_ATIME, _ATIME_NOW = int(Attr.ATIME), int(Attr.ATIME_NOW)
_MTIME, _MTIME_NOW = int(Attr.MTIME), int(Attr.MTIME_NOW)

_NOTHING = Changes()
_CAPABILITY = b"security.capability"
_ASKED_FOR_CAPABILITY = _CAPABILITY + b"\0"
_LARGEST_IOCTL = 1 << 14  # as the number of a request encodes its size
_BILLION = 1_000_000_000
_BASIC_STATS = 0x7FF  # STATX_BASIC_STATS of statx(2)
_BTIME = 0x800


class AttributeHandlers:
    """The handlers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self._no_caps = session.no_caps
        extended = bool(session.features & Init.SETXATTR_EXT)
        self._setxattr_in = _SETXATTR if extended else _OLD_SETXATTR
        self._kills = bool(session.features & Init.HANDLE_KILLPRIV_V2)
        self.handlers: dict[int, Handler] = {
            Op.GETATTR: self.getattr,
            Op.SETATTR: self.setattr,
            Op.STATX: self.statx,
            Op.READLINK: self.readlink,
            Op.STATFS: self.statfs,
            Op.GETXATTR: self.getxattr,
            Op.LISTXATTR: self.listxattr,
            Op.SETXATTR: self.setxattr,
            Op.REMOVEXATTR: self.removexattr,
            Op.IOCTL: self.ioctl,
            Op.SYNCFS: self.syncfs,
            Op.INTERRUPT: self.interrupt,
            Op.DESTROY: self.destroy,
        }

    # --- attributes ------------------------------------------------------------------------------------

    def getattr(self, request: Request) -> Reply:
        """Answer with fresh attributes."""
        node = self._session.node(request.nodeid)
        return self._session.attributes(request, node, self._overlay.attributes(node))

    def statx(self, request: Request) -> Reply:
        """Answer with fresh attributes and the time of birth, which nothing else asks for."""
        node = self._session.node(request.nodeid)
        born = self._overlay.space.birth(node)
        return self._session.done(request, self._statx(self._overlay.attributes(node), born))

    def _statx(self, found: Attributes, born: int | None) -> bytes:
        seconds, nanoseconds = divmod(int(self._session.policy.attributes * _BILLION), _BILLION)
        times = {"atime": found.atime_ns, "btime": born or 0, "ctime": found.ctime_ns, "mtime": found.mtime_ns}
        return LAYOUTS["statx_out"].encode(
            attr_valid=seconds,
            attr_valid_nsec=nanoseconds,
            mask=_BASIC_STATS | (0 if born is None else _BTIME),
            blksize=found.blksize,
            nlink=found.nlink,
            uid=found.uid,
            gid=found.gid,
            mode=found.mode,
            ino=found.ino,
            size=found.size,
            blocks=found.blocks,
            rdev_major=os.major(found.rdev),
            rdev_minor=os.minor(found.rdev),
            **{f"{name}_sec": time // _BILLION for name, time in times.items()},
            **{f"{name}_nsec": time % _BILLION for name, time in times.items()},
        )

    def setattr(self, request: Request) -> Reply:
        """Change what the request names, all in one call: the kernel sends new modes together with owner or size."""
        fields = _SETATTR.unpack_from(request.body)
        node, changes = self._session.node(request.nodeid), self._changes(fields)
        if changes == _NOTHING:
            return self.getattr(request)
        handle = fields[2] if fields[0] & _FH else None
        caller = request.caller()
        return self._session.change(
            request,
            lambda: ((node, self._overlay.requirement_of_change(changes)),),
            lambda: self._session.attributes(
                request, node, self._overlay.set_attributes(node, changes, caller, handle)
            ),
        )

    def _changes(self, fields: tuple[int, ...]) -> Changes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = fields
        return Changes(
            mode=mode & 0o7777 if valid & _MODE else None,
            uid=uid if valid & _UID else None,
            gid=gid if valid & _GID else None,
            size=size if valid & _SIZE_SET else None,
            atime_ns=_time(valid, _ATIME, _ATIME_NOW, atime, atime_ns),
            mtime_ns=_time(valid, _MTIME, _MTIME_NOW, mtime, mtime_ns),
            strip=self._kills and bool(valid & _SIZE_SET and valid & _KILL),
        )

    def readlink(self, request: Request) -> Reply:
        """Answer with the target of a symbolic link."""
        return self._session.done(request, self._overlay.readlink(self._session.node(request.nodeid)))

    # --- extended attributes ---------------------------------------------------------------------------

    def getxattr(self, request: Request) -> Reply:
        """Answer with a value, or with its length when no room is offered; ENODATA without one."""
        if not self._session.settings.xattrs:
            return self._session.refused(request, errno.ENOSYS)  # the kernel answers EOPNOTSUPP for us from now on
        if request.nodeid in self._no_caps and request.body[_GETXATTR.size :] == _ASKED_FOR_CAPABILITY:
            return self._session.refused(request, errno.ENODATA)
        size, _ = _GETXATTR.unpack_from(request.body)
        node, name = self._session.node(request.nodeid), request.name(_GETXATTR.size)
        if name == _CAPABILITY and self._overlay.find_xattr(node, name) is None:
            self._no_caps.add(request.nodeid)
            return self._session.refused(request, errno.ENODATA)
        return self._sized(request, size, self._overlay.getxattr(node, name))

    def forget(self, nodeid: int) -> None:
        """The kernel has let a number go."""
        self._no_caps.discard(nodeid)

    def listxattr(self, request: Request) -> Reply:
        """Answer with the visible names, or with their length."""
        if not self._session.settings.xattrs:
            return self._session.refused(request, errno.ENOSYS)
        size, _ = _GETXATTR.unpack_from(request.body)
        names = self._overlay.listxattr(self._session.node(request.nodeid))
        return self._sized(request, size, b"".join(name + b"\0" for name in names))

    def _sized(self, request: Request, size: int, value: bytes) -> Reply:
        if not size:
            return self._session.done(request, _SIZE.pack(len(value), 0))
        if len(value) > size:
            raise oserror(errno.ERANGE)
        return self._session.done(request, value)

    def setxattr(self, request: Request) -> Reply:
        """Set a value; an ACL set from outside the file's group takes S_ISGID away (posix_acl_update_mode)."""
        if not self._session.settings.xattrs:
            return self._session.refused(request, errno.ENOSYS)
        size, flags, *more = self._setxattr_in.unpack_from(request.body)
        name, _, value = bytes(request.body[self._setxattr_in.size :]).partition(b"\0")
        node, kill = self._session.node(request.nodeid), bool(more and more[0] & SETXATTR_ACL_KILL_SGID)
        self._no_caps.discard(request.nodeid)

        def act() -> Reply:
            self._overlay.setxattr(node, name, value[:size], flags)
            if kill:
                self._drop_set_gid(request, node)
            return self._session.done(request)

        return self._session.change(request, lambda: self._requirements_of_xattr(node, name), act)

    def _requirements_of_xattr(self, node: Node, name: bytes) -> tuple[tuple[Node, Requirement]]:
        self._overlay.check_xattr(name)
        return ((node, Requirement.META),)

    def _drop_set_gid(self, request: Request, node: Node) -> None:
        mode = self._overlay.attributes(node).mode & 0o7777
        if mode & stat.S_ISGID:
            self._overlay.set_attributes(node, Changes(mode=mode & ~stat.S_ISGID), request.caller())

    def removexattr(self, request: Request) -> Reply:
        """Remove a value; one that is not there is refused before anything is lifted."""
        if not self._session.settings.xattrs:
            return self._session.refused(request, errno.ENOSYS)
        node, name = self._session.node(request.nodeid), request.name()
        self._overlay.getxattr(node, name)

        def act() -> Reply:
            self._overlay.removexattr(node, name)
            return self._session.done(request)

        return self._session.change(request, lambda: self._requirements_of_xattr(node, name), act)

    # --- flags -----------------------------------------------------------------------------------------

    def ioctl(self, request: Request) -> Reply:
        """Read or change the flags of a file; ENOTTY for every other request."""
        _, _, command, _, in_size, out_size = _IOCTL.unpack_from(request.body)
        node = self._session.node(request.nodeid)
        if command not in CHANGING_REQUESTS:
            found = self._overlay.space.read_flags(node, command).ljust(min(out_size, _LARGEST_IOCTL), b"\0")
            return self._session.done(request, _IOCTL_OUT.encode() + found[:out_size])
        value = bytes(request.body[_IOCTL.size : _IOCTL.size + in_size])

        def act() -> Reply:
            self._overlay.space.change_flags(node, command, value)
            return self._session.done(request, _IOCTL_OUT.encode())

        return self._session.change(request, lambda: ((node, Requirement.META),), act)

    # --- the whole -------------------------------------------------------------------------------------

    def statfs(self, request: Request) -> Reply:
        """Answer with the figures of the file system that takes the writes."""
        found = self._overlay.statfs()
        body = LAYOUTS["statfs_out"].encode(
            blocks=found.f_blocks,
            bfree=found.f_bfree,
            bavail=found.f_bavail,
            files=found.f_files,
            ffree=found.f_ffree,
            bsize=found.f_bsize,
            namelen=min(found.f_namemax, self._overlay.longest_name),
            frsize=found.f_frsize,
        )
        return self._session.done(request, body)

    def syncfs(self, request: Request) -> Reply:
        """Answer when all of the upper is durable."""
        self._session.in_thread(request, self._overlay.sync, lambda _: self._session.done(request))
        return None

    def interrupt(self, request: Request) -> Reply:
        """Let a request that waits end with EINTR; one that is being carried out ends by itself."""
        (unique,) = _INTERRUPT.unpack_from(request.body)
        scope = self._session.waiting.get(unique)
        if scope is not None:
            scope.cancel()
        return None

    def destroy(self, request: Request) -> Reply:
        """The mount has gone."""
        return self._session.done(request)


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    if valid & now:
        return sysio.NOW
    if not valid & given:
        return None
    return seconds * _BILLION + nanoseconds
