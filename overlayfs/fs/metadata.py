"""What a node's attributes are and how they are changed: owner, mode, size, times, extended attributes."""

import errno
import os
import stat
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import acl, whiteout, xattrs
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.lookup import LONGEST_NAME
from overlayfs.fs.nodes import Dir, File, InheritedAttributes, Node
from overlayfs.fs.ownership import Ownership
from overlayfs.tree.stats import AnyStat

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


class Metadata(Verbs):
    """Reading and changing attributes of nodes; a node that is changed must be in the upper already."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._owners = Ownership(self._stack.config)
        self.overrides = any(layer.override is not None for layer in self._stack.layers)

    # --- reading ---------------------------------------------------------------------------------------

    def attributes(self, node: Node, found: AnyStat | None = None) -> Attributes:
        """Return the attributes that the mount shows; `found`: the stat that a lookup has just taken, if any."""
        if found is None:
            layer, dirfd, name = self._objects.locate(node)
            found = layer.stat_at(dirfd, name)
        size, blocks, nlink, uid, gid = found.st_size, found.st_blocks, found.st_nlink, found.st_uid, found.st_gid
        if isinstance(node, File):
            nlink = max(nlink + node.nlink_delta, 0)
            if node.data is not None and (data := self._objects.data_stat(node)) is not None:
                size, blocks = data.st_size, blocks + data.st_blocks
        elif isinstance(node, Dir) and node.removed:
            nlink = 0
        elif self._stack.config.static_nlink or (isinstance(node, Dir) and len(node.lower) + node.in_upper > 1):
            nlink = 1
        if not self._owners.plain:
            uid, gid = self._owners.shown(uid, gid)
        return Attributes(
            node.number,
            found.st_mode,
            nlink,
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

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symbolic link; EINVAL for anything else."""
        if node.kind != stat.S_IFLNK:
            raise oserror(errno.EINVAL)
        _, dirfd, name = self._objects.locate(node)
        return sysio.readlink_at(dirfd, name)

    # --- changing --------------------------------------------------------------------------------------

    def change(self, node: Node, changes: Changes) -> None:
        """Apply changes to a node in the upper: size, owner, mode, times, in this order.

        Owner before mode, because chown(2) clears set-id bits.
        """
        self._changed(node)
        if changes.size is not None:
            self.truncate(node, changes.size)
            if changes.strip:
                self.strip_set_id(node)
        _, dirfd, name = self._objects.locate(node)
        if changes.uid is not None or changes.gid is not None:
            self._chown(dirfd, name, changes)
        if changes.mode is not None:
            self._upper.set_mode(dirfd, name, stat.S_IMODE(changes.mode))
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            sysio.utimens_at(dirfd, name, changes.atime_ns, changes.mtime_ns)

    def _chown(self, dirfd: int, name: bytes, changes: Changes) -> None:
        keep = -1
        uid = keep if changes.uid is None else changes.uid
        gid = keep if changes.gid is None else changes.gid
        self._upper.set_owner(dirfd, name, *self._owners.stored(uid, gid))

    def truncate(self, node: Node, size: int) -> None:
        """Set the size of a regular file in the upper; EISDIR, EINVAL for anything else."""
        if node.kind == stat.S_IFDIR:
            raise oserror(errno.EISDIR)
        if node.kind != stat.S_IFREG:
            raise oserror(errno.EINVAL)
        writer = node.writer if isinstance(node, File) else None
        _, dirfd, name = self._objects.locate(node)
        fd = sysio.open_child(dirfd, name, os.O_WRONLY | os.O_NONBLOCK) if writer is None else writer
        try:
            sysio.truncate_fd(fd, size)
        except OSError:
            # Copy-up for a truncation has truncated it already, and set the time: nothing is left to do.
            if size != 0 or sysio.stat_at(fd, b"").st_size != 0:
                raise
        finally:
            if writer is None:
                sysio.close(fd)

    def strip_set_id(self, node: Node) -> None:
        """Clear set-id bits and capabilities, as a write by a user does (file_remove_privs in fs/inode.c)."""
        _, dirfd, name = self._objects.locate(node)
        mode = stat.S_IMODE(self._upper.stat_at(dirfd, name).st_mode)
        kept = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if kept != mode:
            self._upper.set_mode(dirfd, name, kept)
        if sysio.find_xattr(dirfd, name, _CAPABILITY) is not None:
            sysio.removexattr_at(dirfd, name, _CAPABILITY)

    def inherited(self, parent: Dir) -> InheritedAttributes:
        """Return what objects made in a directory get from it; kept until its attributes change."""
        if parent.inherited is None:
            layer, dirfd, name = self._objects.locate(parent)
            directory = layer.stat_at(dirfd, name)
            default = sysio.find_xattr(dirfd, name, acl.DEFAULT) if self._upper.features.acl else None
            parent.inherited = InheritedAttributes(bool(directory.st_mode & stat.S_ISGID), directory.st_gid, default)
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
        layer, dirfd, child = self._objects.locate(node)
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
        layer, dirfd, child = self._objects.locate(node)
        try:
            stored = xattrs.stored_name(name, layer.override is not None)
        except PermissionError:
            raise oserror(errno.ENODATA) from None
        return sysio.getxattr_at(dirfd, child, stored)

    def listxattr(self, node: Node) -> list[bytes]:
        """Return the names of the attributes that users of the mount may know of."""
        layer, dirfd, child = self._objects.locate(node)
        shown = (xattrs.shown_name(a, layer.override is not None) for a in sysio.listxattr_at(dirfd, child))
        return [a for a in shown if a is not None and not (self._stack.config.noacl and a.startswith(_ACL_PREFIX))]

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> None:
        """Set an attribute of a node in the upper; EPERM for private ones."""
        self._require_acl(name)
        self._changed(node)
        _, dirfd, child = self._objects.locate(node)
        sysio.setxattr_at(dirfd, child, self._writable(name), value, flags)

    def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an attribute of a node in the upper; ENODATA for none."""
        self._require_acl(name)
        self._changed(node)
        _, dirfd, child = self._objects.locate(node)
        sysio.removexattr_at(dirfd, child, self._writable(name))

    def check_xattr(self, name: bytes) -> None:
        """Raise what a change of this attribute would raise before anything is copied up."""
        self._require_acl(name)
        self._writable(name)

    def _writable(self, name: bytes) -> bytes:
        _ = self._upper
        return xattrs.stored_name(name, self.overrides)

    def _require_acl(self, name: bytes) -> None:
        if self._stack.config.noacl and name.startswith(_ACL_PREFIX):
            raise oserror(errno.EOPNOTSUPP)

    # --- the file system -------------------------------------------------------------------------------

    def statfs(self) -> os.statvfs_result:
        """Return capacity and limits: of the upper, or of the top layer without one."""
        layer = self._stack.upper or self._stack.lower[0]
        return sysio.statvfs_fd(layer.root)

    @property
    def longest_name(self) -> int:
        """The length in bytes of the longest name that can be made and removed: `.wh.` whiteouts take four."""
        upper = self._stack.upper
        return LONGEST_NAME if upper is None or upper.features.devices else LONGEST_NAME - len(whiteout.PREFIX)
