"""Extended attributes: GETXATTR, LISTXATTR, SETXATTR and REMOVEXATTR."""

import errno
import stat

from overlayfs.errors import oserror
from overlayfs.fs.copyup import Requirements
from overlayfs.fs.metadata import Changes
from overlayfs.fs.nodes import Node
from overlayfs.fuse.kernel.protocol import LAYOUTS, SETXATTR_ACL_KILL_SGID, Init, Op
from overlayfs.fuse.kernel.request import Handler, Reply, Request
from overlayfs.fuse.kernel.session import Session

_SETXATTR = LAYOUTS["setxattr_in"]
_OLD_SETXATTR = LAYOUTS["getxattr_in"]  # before FUSE_SETXATTR_EXT: only size and flags
_GETXATTR = LAYOUTS["getxattr_in"]
_SIZE = LAYOUTS["getxattr_out"]

_CAPABILITY = b"security.capability"
_ASKED_FOR_CAPABILITY = _CAPABILITY + b"\0"


class XattrHandlers:
    """Handles requests about extended attributes. On a mount without them the kernel sends each kind once (ENOSYS)."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self._no_caps = session.no_caps
        extended = bool(session.features & Init.SETXATTR_EXT)
        self._setxattr_in = _SETXATTR if extended else _OLD_SETXATTR
        self.handlers: dict[int, Handler] = {
            Op.GETXATTR: self.getxattr,
            Op.LISTXATTR: self.listxattr,
            Op.SETXATTR: self.setxattr,
            Op.REMOVEXATTR: self.removexattr,
        }

    def getxattr(self, request: Request) -> Reply:
        """Answer with a value, or with its length if the size offered is 0; ENODATA for none."""
        if not self._session.settings.xattrs:
            return self._session.error(request, errno.ENOSYS)  # from now on the kernel itself answers EOPNOTSUPP
        if request.nodeid in self._no_caps and request.body[_GETXATTR.size :] == _ASKED_FOR_CAPABILITY:
            return self._session.error(request, errno.ENODATA)
        size, _ = _GETXATTR.unpack_from(request.body)
        node, name = self._session.node(request.nodeid), request.name(_GETXATTR.size)
        if name == _CAPABILITY and self._overlay.metadata.find_xattr(node, name) is None:
            self._no_caps.add(request.nodeid)
            return self._session.error(request, errno.ENODATA)
        return self._sized(request, size, self._overlay.metadata.getxattr(node, name))

    def forget(self, nodeid: int) -> None:
        """Note that the kernel has forgotten a node id."""
        self._no_caps.discard(nodeid)

    def listxattr(self, request: Request) -> Reply:
        """Answer with the visible names, each with its NUL, or with their length if the size offered is 0."""
        if not self._session.settings.xattrs:
            return self._session.error(request, errno.ENOSYS)
        size, _ = _GETXATTR.unpack_from(request.body)
        names = self._overlay.metadata.listxattr(self._session.node(request.nodeid))
        return self._sized(request, size, b"".join(name + b"\0" for name in names))

    def _sized(self, request: Request, size: int, value: bytes) -> Reply:
        if not size:
            return self._session.ok(request, _SIZE.pack(len(value), 0))
        if len(value) > size:
            raise oserror(errno.ERANGE)
        return self._session.ok(request, value)

    def setxattr(self, request: Request) -> Reply:
        """Set a value; an ACL set by a user outside the file's group clears S_ISGID (posix_acl_update_mode)."""
        if not self._session.settings.xattrs:
            return self._session.error(request, errno.ENOSYS)
        size, flags, *more = self._setxattr_in.unpack_from(request.body)
        name, _, value = bytes(request.body[self._setxattr_in.size :]).partition(b"\0")
        node, kill = self._session.node(request.nodeid), bool(more and more[0] & SETXATTR_ACL_KILL_SGID)
        self._no_caps.discard(request.nodeid)

        def act(_: Requirements) -> Reply:
            self._overlay.setxattr(node, name, value[:size], flags)
            if kill:
                self._clear_set_gid(node)
            return self._session.ok(request)

        return self._session.change(request, lambda: self._overlay.requirements.setxattr(node, name), act)

    def _clear_set_gid(self, node: Node) -> None:
        mode = self._overlay.attributes(node).mode & 0o7777
        if mode & stat.S_ISGID:
            self._overlay.set_attributes(node, Changes(mode=mode & ~stat.S_ISGID))

    def removexattr(self, request: Request) -> Reply:
        """Remove a value; ENODATA for none, before anything is copied up."""
        if not self._session.settings.xattrs:
            return self._session.error(request, errno.ENOSYS)
        node, name = self._session.node(request.nodeid), request.name()

        def act(_: Requirements) -> Reply:
            self._overlay.removexattr(node, name)
            return self._session.ok(request)

        return self._session.change(request, lambda: self._overlay.requirements.removexattr(node, name), act)
