"""Requests about names: LOOKUP, READLINK and FORGET, and every change of which names exist."""

from collections.abc import Callable

from overlayfs.fs.copyup import Requirements
from overlayfs.fs.names import Made
from overlayfs.fs.nodes import Node
from overlayfs.fs.rename import RenamePlan
from overlayfs.fuse.kernel.protocol import LAYOUTS, Op, decode_device
from overlayfs.fuse.kernel.request import Handler, Reply, Request
from overlayfs.fuse.kernel.session import Session

_FORGET = LAYOUTS["forget_in"]
_BATCH_FORGET = LAYOUTS["batch_forget_in"]
_FORGET_ONE = LAYOUTS["forget_one"]
_MKNOD = LAYOUTS["mknod_in"]
_MKDIR = LAYOUTS["mkdir_in"]
_RENAME = LAYOUTS["rename_in"]
_RENAME2 = LAYOUTS["rename2_in"]
_LINK = LAYOUTS["link_in"]


class NameHandlers:
    """Handles requests about names. Each of `forgotten` is called with each node id that the kernel has forgotten."""

    def __init__(self, session: Session, forgotten: tuple[Callable[[int], None], ...]) -> None:
        self._session = session
        self._overlay = session.overlay
        self._names = session.overlay.names
        self._requirements = session.overlay.requirements
        self._forgotten = forgotten
        self.handlers: dict[int, Handler] = {
            Op.LOOKUP: self.lookup,
            Op.READLINK: self.readlink,
            Op.FORGET: self.forget,
            Op.BATCH_FORGET: self.batch_forget,
            Op.MKDIR: self.mkdir,
            Op.MKNOD: self.mknod,
            Op.SYMLINK: self.symlink,
            Op.LINK: self.link,
            Op.UNLINK: self.unlink,
            Op.RMDIR: self.rmdir,
            Op.RENAME: self.rename,
            Op.RENAME2: self.rename2,
        }

    def lookup(self, request: Request) -> Reply:
        """Answer with the node under a name, or with its absence, which the kernel caches."""
        if self._session.sent_back:
            self._session.sent_back.pop(request.pid, None)
        found = self._overlay.find(self._session.node(request.nodeid), request.name())
        return self._session.absent(request) if found is None else self._session.entry(request, *found)

    def readlink(self, request: Request) -> Reply:
        """Answer with the target of a symbolic link."""
        return self._session.ok(request, self._overlay.metadata.readlink(self._session.node(request.nodeid)))

    def forget(self, request: Request) -> Reply:
        """Take back look-ups of one node."""
        (count,) = _FORGET.unpack_from(request.body)
        self._forget(request.nodeid, count)
        return None

    def batch_forget(self, request: Request) -> Reply:
        """Take back look-ups of several nodes."""
        count, _ = _BATCH_FORGET.unpack_from(request.body)
        entries = request.body[_BATCH_FORGET.size : _BATCH_FORGET.size + count * _FORGET_ONE.size]
        for nodeid, lookups in _FORGET_ONE.iter_unpack(entries):
            self._forget(nodeid, lookups)
        return None

    def _forget(self, nodeid: int, count: int) -> None:
        if self._session.node_ids.forget(nodeid, count):
            for forget in self._forgotten:
                forget(nodeid)

    # --- creating --------------------------------------------------------------------------------------

    def mkdir(self, request: Request) -> Reply:
        """Create a directory."""
        mode, umask = _MKDIR.unpack_from(request.body)
        name, caller = request.name(_MKDIR.size), request.caller(umask)
        parent, masked = self._session.node(request.nodeid), self._session.masked
        return self._make(request, parent, lambda: self._names.mkdir(parent, name, masked(parent, mode, umask), caller))

    def mknod(self, request: Request) -> Reply:
        """Create a device, FIFO, socket or regular file."""
        mode, rdev, umask, _ = _MKNOD.unpack_from(request.body)
        name, caller = request.name(_MKNOD.size), request.caller(umask)
        parent, masked, device = self._session.node(request.nodeid), self._session.masked, decode_device(rdev)
        return self._make(
            request, parent, lambda: self._names.mknod(parent, name, masked(parent, mode, umask), device, caller)
        )

    def symlink(self, request: Request) -> Reply:
        """Create a symbolic link."""
        name, target = request.two_names()
        parent, caller = self._session.node(request.nodeid), request.caller()
        return self._make(request, parent, lambda: self._names.symlink(parent, name, target, caller))

    def _make(self, request: Request, parent: Node, make: Callable[[], Made]) -> Reply:
        return self._session.change(
            request, lambda: self._requirements.make(parent), lambda _: self._session.entry(request, *make())
        )

    def link(self, request: Request) -> Reply:
        """Create a hard link."""
        (old,) = _LINK.unpack_from(request.body)
        node, parent, name = self._session.node(old), self._session.node(request.nodeid), request.name(_LINK.size)
        return self._session.change(
            request,
            lambda: self._requirements.link(node, parent),
            lambda _: self._session.entry(request, *self._names.link(node, parent, name)),
        )

    # --- removing and renaming -------------------------------------------------------------------------

    def unlink(self, request: Request) -> Reply:
        """Remove a name of a non-directory."""
        parent, name = self._session.node(request.nodeid), request.name()

        def act(_: Requirements) -> Reply:
            self._names.unlink(parent, name)
            return self._session.ok(request)

        return self._session.change(request, lambda: self._requirements.unlink(parent, name), act)

    def rmdir(self, request: Request) -> Reply:
        """Remove an empty directory."""
        parent, name = self._session.node(request.nodeid), request.name()

        def act(_: Requirements) -> Reply:
            self._names.rmdir(parent, name)
            return self._session.ok(request)

        return self._session.change(request, lambda: self._requirements.rmdir(parent), act)

    def rename(self, request: Request) -> Reply:
        """Rename, replacing the target."""
        (new,) = _RENAME.unpack_from(request.body)
        return self._rename(request, new, 0, _RENAME.size)

    def rename2(self, request: Request) -> Reply:
        """Rename with flags of renameat2(2); EINVAL for flags that are not supported."""
        new, flags, _ = _RENAME2.unpack_from(request.body)
        return self._rename(request, new, flags, _RENAME2.size)

    def _rename(self, request: Request, new: int, flags: int, start: int) -> Reply:
        name, new_name = request.two_names(start)
        parent, new_parent = self._session.node(request.nodeid), self._session.node(new)

        def act(plan: RenamePlan) -> Reply:
            self._names.move(plan)
            return self._session.ok(request)

        return self._session.change(
            request, lambda: self._requirements.rename(parent, name, new_parent, new_name, flags), act
        )
