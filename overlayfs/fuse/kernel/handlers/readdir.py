"""Requests about directories: reading their entries, making their names durable."""

import errno
import stat

from overlayfs.errors import oserror
from overlayfs.fs.lookup import Child
from overlayfs.fs.nodes import Dir, Node
from overlayfs.fuse.engine import UNKNOWN_NUMBER
from overlayfs.fuse.kernel.protocol import LAYOUTS, Init, Op, file_type, padded
from overlayfs.fuse.kernel.request import Handler, Reply, Request
from overlayfs.fuse.kernel.session import Session

_READ = LAYOUTS["read_in"]
_ENTRY = LAYOUTS["direntplus"]
_NO_NODE = bytes(LAYOUTS["entry_out"].size)
_DIRENT = LAYOUTS["dirent"]

DOTS = 2  # offsets up to here are those of "." and ".."


class DirectoryHandlers:
    """Handles requests about directories, which the kernel opens and closes without any effect here."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self.handlers: dict[int, Handler] = {
            Op.OPENDIR: self.opendir,
            Op.READDIRPLUS: self.readdirplus,
            Op.RELEASEDIR: self.releasedir,
            Op.FSYNCDIR: self.fsyncdir,
        }

    def opendir(self, request: Request) -> Reply:
        """Decline for good (ENOSYS) where listings may be cached: the kernel keeps them, and reads by node id."""
        if self._session.policy.keep_cache and self._session.features & Init.NO_OPENDIR_SUPPORT:
            return self._session.error(request, errno.ENOSYS)
        files = self._overlay.files
        files.release(files.open_dir(self._session.node(request.nodeid)))
        return self._session.ok(request, LAYOUTS["open_out"].encode())

    def releasedir(self, request: Request) -> Reply:
        """Nothing was allocated."""
        return self._session.ok(request)

    def readdirplus(self, request: Request) -> Reply:
        """Fill one reply with entries and their attributes; each entry counts as a look-up."""
        _, position, size, *_ = _READ.unpack_from(request.body)
        node = self._session.node(request.nodeid)
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR)
        reply = bytearray()
        if position < DOTS:
            self._add_dots(reply, node, position)
        for child in self._overlay.dir_offsets.read(node, max(position - DOTS, 0)):
            shown, record = self._record(child)
            if len(reply) + len(record) > size:
                break
            reply += record
            if shown is not None:
                self._session.node_ids.remember(shown)
        return self._session.ok(request, bytes(reply))

    def _record(self, child: Child) -> tuple[Node | None, bytes]:
        """Return the node that counts as looked up, None for one whose attributes cannot be read, and the record."""
        name, node, onward = child.name, child.node, child.offset + DOTS
        try:
            found = None if node is None else self._overlay.metadata.attributes(node, child.stat)
        except OSError:
            found = None
        if node is None or found is None:
            return None, _NO_NODE + _DIRENT.pack(UNKNOWN_NUMBER, onward, len(name), 0) + padded(name)
        fields = self._session.entry_fields(self._session.node_ids.nodeid(node), node, found)
        return node, _ENTRY.pack(*fields, found.ino, onward, len(name), file_type(found.mode)) + padded(name)

    def _add_dots(self, reply: bytearray, node: Dir, position: int) -> None:
        """Add "." and ".."; the kernel uses only their inode numbers and counts no look-up."""
        above = node.parent if node.parent is not None else node
        for onward, (name, number) in enumerate(((b".", node.number), (b"..", above.number)), 1):
            if onward > position:
                entry = _DIRENT.pack(number, onward, len(name), file_type(stat.S_IFDIR))
                reply += _NO_NODE + entry + padded(name)

    def fsyncdir(self, request: Request) -> Reply:
        """Answer when the names in the directory, and those that lead to it, are durable."""
        return self._session.sync(request, self._overlay.prepare_fsync_dir(self._session.node(request.nodeid)))
