"""What a node's attributes are and how they are changed: owner, mode, size, times, extended attributes."""

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import acl, xattrs
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, File, InheritedAttributes, Node
from overlayfs.fs.ownership import Ownership
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import Layer
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Upper

T = TypeVar("T")

_ACL_PREFIX = b"system.posix_acl_"
_CAPABILITY = b"security.capability"


class Attributes(NamedTuple):
    """The attributes of a node; times in nanoseconds since 1970, blocks of 512 bytes, mode with the type bits."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Changes(NamedTuple):
    """What a setattr changes; None keeps. `mode` is permission bits, times may be `sysio.NOW`.

    strip: a new size takes set-id bits and capabilities away, for the caller is not privileged to keep them.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    strip: bool = False


class Located(NamedTuple):
    """Where the real object behind a node can be reached now; `dirfd` is borrowed."""

    layer: Layer
    dirfd: int
    name: bytes


def after_change(look: Callable[[], T]) -> T:
    """Return what is seen after a change. Looks twice: an error would say that nothing was changed."""
    try:
        return look()
    except OSError:
        return look()


class Metadata:
    """Reading and changing attributes of nodes; changing needs the node in the upper already."""

    def __init__(self, stack: Stack, lookup: Lookup) -> None:
        self._stack = stack
        self._lookup = lookup
        self._owners = Ownership(stack.config)
        layers = (*stack.lower, stack.upper) if stack.upper is not None else stack.lower
        self.overrides = any(layer.override is not None for layer in layers)

    # --- where -----------------------------------------------------------------------------------------

    def locate(self, node: Node) -> Located:
        """Return where the topmost real object of a node lies; ESTALE when its last name has gone unseen."""
        if node.orphan is not None:
            return Located(self.upper, node.orphan, b"")
        if isinstance(node, Dir):
            return self._locate_dir(node)
        if isinstance(node, File):
            return self._locate_file(node)
        raise oserror(errno.ESTALE)

    def _locate_dir(self, node: Dir) -> Located:
        if node.in_upper:
            return Located(self.upper, self.upper.dirfd(self._lookup.path(node)), b"")
        layer, path = node.lower[0]
        return Located(layer, layer.dirfd(path), b"")

    def _locate_file(self, node: File) -> Located:
        if not node.in_upper:
            if node.lower is None:
                raise oserror(errno.ESTALE)
            layer, path, name = node.lower
            return Located(layer, layer.dirfd(path), name)
        for (parent, name), in_upper in node.names.items():
            if in_upper:
                return Located(self.upper, self.upper.dirfd(self._lookup.path(parent)), name)
        if node.index is not None and self.upper.work.index is not None:
            return Located(self.upper, self.upper.work.index, node.index)
        raise oserror(errno.ESTALE)

    @property
    def upper(self) -> Upper:
        """The upper; EROFS without one."""
        if self._stack.upper is None:
            raise oserror(errno.EROFS)
        return self._stack.upper

    # --- reading ---------------------------------------------------------------------------------------

    def stat(self, node: Node) -> AnyStat:
        """Return the attributes of the topmost real object."""
        layer, dirfd, name = self.locate(node)
        return layer.stat_at(dirfd, name)

    def attributes(self, node: Node) -> Attributes:
        """Return the attributes that the mount shows."""
        fresh, self._lookup.fresh = self._lookup.fresh, None
        found = fresh[1] if fresh is not None and fresh[0] is node else self.stat(node)
        size, blocks = self._extent(node, found)
        uid, gid = found.st_uid, found.st_gid
        if not self._owners.plain:
            uid, gid = self._owners.shown(uid, gid)
        return Attributes(
            node.number,
            found.st_mode,
            self._nlink(node, found),
            uid,
            gid,
            found.st_rdev,
            size,
            found.st_blksize,
            blocks,
            found.st_atime_ns,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )

    def _nlink(self, node: Node, found: AnyStat) -> int:
        if isinstance(node, File):
            return max(found.st_nlink + node.nlink_delta, 0)
        if isinstance(node, Dir) and node.removed:
            return 0
        merged = isinstance(node, Dir) and len(node.lower) + node.in_upper > 1
        return 1 if merged or self._stack.config.static_nlink else found.st_nlink

    @staticmethod
    def _extent(node: Node, found: AnyStat) -> tuple[int, int]:
        """Return size and blocks. A copy of metadata only has the size of its data, whatever it says itself.

        After a crash it may say too little: btrfs makes a name durable without the size of a new inode, and a
        truncation that was stopped has cut the copy and not unmarked it.
        """
        if isinstance(node, File) and node.data is not None and node.data.name:
            layer, path, name = node.data.layer, node.data.path, node.data.name
            below = after_change(lambda: layer.stat(path, name))  # a link has been made, perhaps
            return below.st_size, found.st_blocks + below.st_blocks
        return found.st_size, found.st_blocks

    def size(self, node: Node, found: AnyStat) -> int:
        """Return the size of a node that a stat of its real object found."""
        return self._extent(node, found)[0]

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symbolic link; EINVAL for anything else."""
        if node.kind != stat.S_IFLNK:
            raise oserror(errno.EINVAL)
        _, dirfd, name = self.locate(node)
        return sysio.readlink_at(dirfd, name)

    # --- changing --------------------------------------------------------------------------------------

    def change(self, node: Node, changes: Changes, writer: int | None) -> None:
        """Apply changes to a node in the upper: size, owner, mode, times, in this order.

        Owner before mode, for chown clears set-id bits; `writer` is a descriptor open for writing, if there is one.
        """
        self._changed(node)
        if changes.size is not None:
            self.truncate(node, changes.size, writer)
            if changes.strip:
                self.strip_set_id(node)
        _, dirfd, name = self.locate(node)
        if changes.uid is not None or changes.gid is not None:
            self._chown(dirfd, name, changes)
        if changes.mode is not None:
            self.upper.set_mode(dirfd, name, stat.S_IMODE(changes.mode))
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            sysio.utimens_at(dirfd, name, changes.atime_ns, changes.mtime_ns)
        self._lookup.fresh = None

    def _chown(self, dirfd: int, name: bytes, changes: Changes) -> None:
        keep = -1
        uid = keep if changes.uid is None else changes.uid
        gid = keep if changes.gid is None else changes.gid
        self.upper.set_owner(dirfd, name, *self._owners.stored(uid, gid))

    def truncate(self, node: Node, size: int, writer: int | None) -> None:
        """Set the size of a regular file in the upper; EISDIR, EINVAL for anything else."""
        if node.kind == stat.S_IFDIR:
            raise oserror(errno.EISDIR)
        if node.kind != stat.S_IFREG:
            raise oserror(errno.EINVAL)
        if writer is None and isinstance(node, File):
            writer = node.writer
        _, dirfd, name = self.locate(node)
        fd = sysio.open_child(dirfd, name, os.O_WRONLY | os.O_NONBLOCK) if writer is None else writer
        try:
            sysio.truncate_fd(fd, size)
        except OSError:
            # Lifting for a truncation has cut it already, and moved the time: nothing is left to fail.
            if size != 0 or sysio.stat_at(fd, b"").st_size != 0:
                raise
        finally:
            if writer is None:
                sysio.close(fd)

    def strip_set_id(self, node: Node) -> None:
        """Clear set-id bits and capabilities, as a write by anybody but root does (semantics, section 10)."""
        _, dirfd, name = self.locate(node)
        mode = stat.S_IMODE(self.upper.stat_at(dirfd, name).st_mode)
        kept = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if kept != mode:
            self.upper.set_mode(dirfd, name, kept)
        if sysio.find_xattr(dirfd, name, _CAPABILITY) is not None:
            sysio.removexattr_at(dirfd, name, _CAPABILITY)

    def inherited(self, parent: Dir) -> InheritedAttributes:
        """Return what objects made in a directory get from it; kept until its attributes change."""
        if parent.inherited is None:
            layer, dirfd, name = self.locate(parent)
            above = layer.stat_at(dirfd, name)
            default = sysio.find_xattr(dirfd, name, acl.DEFAULT) if self.upper.features.acl else None
            parent.inherited = InheritedAttributes(bool(above.st_mode & stat.S_ISGID), above.st_gid, default)
        return parent.inherited

    def owner_for(self, parent: Dir, uid: int, gid: int) -> tuple[int, int, bool]:
        """Return owner, group and whether S_ISGID is inherited, on disk, for an object that a caller makes."""
        own_uid, own_gid = self._owners.stored(uid, gid)
        set_group, group, _ = self.inherited(parent)
        return (own_uid, group, True) if set_group else (own_uid, own_gid, False)

    @staticmethod
    def _changed(node: Node) -> None:
        if isinstance(node, Dir):
            node.inherited = None

    # --- extended attributes ---------------------------------------------------------------------------

    def find_xattr(self, node: Node, name: bytes) -> bytes | None:
        """Return the value of an attribute; None for none, for hidden ones, and where there are no such attributes."""
        self._require_acl(name)
        layer, dirfd, child = self.locate(node)
        try:
            stored = xattrs.stored_name(name, layer.override is not None)
        except PermissionError:
            return None
        return sysio.find_xattr(dirfd, child, stored)

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Return the value of an attribute; ENODATA for none and for hidden ones, EOPNOTSUPP where none can be."""
        value = self.find_xattr(node, name)
        if value is not None:
            return value
        layer, dirfd, child = self.locate(node)
        try:
            stored = xattrs.stored_name(name, layer.override is not None)
        except PermissionError:
            raise oserror(errno.ENODATA) from None
        return sysio.getxattr_at(dirfd, child, stored)

    def listxattr(self, node: Node) -> list[bytes]:
        """Return the names of the attributes that users of the mount may know of."""
        layer, dirfd, child = self.locate(node)
        shown = (xattrs.shown_name(a, layer.override is not None) for a in sysio.listxattr_at(dirfd, child))
        return [a for a in shown if a is not None and not (self._stack.config.noacl and a.startswith(_ACL_PREFIX))]

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        """Set an attribute of a node in the upper; EPERM for private ones."""
        self._require_acl(name)
        self._changed(node)
        _, dirfd, child = self.locate(node)
        sysio.setxattr_at(dirfd, child, self._writable(name), value, flags)
        self._lookup.fresh = None

    def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an attribute of a node in the upper; ENODATA for none."""
        self._require_acl(name)
        self._changed(node)
        _, dirfd, child = self.locate(node)
        sysio.removexattr_at(dirfd, child, self._writable(name))
        self._lookup.fresh = None

    def check_xattr(self, name: bytes) -> None:
        """Raise what a change of this attribute would raise before anything is copied up."""
        self._require_acl(name)
        self._writable(name)

    def _writable(self, name: bytes) -> bytes:
        _ = self.upper
        return xattrs.stored_name(name, self.overrides)

    def _require_acl(self, name: bytes) -> None:
        if self._stack.config.noacl and name.startswith(_ACL_PREFIX):
            raise oserror(errno.EOPNOTSUPP)

    # --- all of it -------------------------------------------------------------------------------------

    def filesystem(self) -> os.statvfs_result:
        """Return capacity and limits: of the upper, or of the top layer without one."""
        layer = self._stack.upper or self._stack.lower[0]
        return sysio.statvfs_fd(layer.root)
