"""The verbs that change names: create, link, remove, rename.

Each copies up what it requires, collects the state of its names by lookup, gets a plan from `union.plans`, has the
upper carry it out, and then updates nodes and listings.
"""

import errno
import os
import stat
from typing import NamedTuple, TypeAlias

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import acl, whiteout
from overlayfs.fs.copyup import CopyUp
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.metadata import Metadata
from overlayfs.fs.nodes import Dir, File, Node, as_dir
from overlayfs.fs.real_objects import after_change
from overlayfs.fs.remove import Removal
from overlayfs.fs.rename import RenamePlan, Renames, check_new_name
from overlayfs.fs.requirements import VerbRequirements
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Maker, Upper
from overlayfs.union import plans
from overlayfs.union.plans import Create
from overlayfs.union.resolve import Kind

Made: TypeAlias = tuple[Node, AnyStat]
"""A node that has just got a name, and its stat."""


class Caller(NamedTuple):
    """The user of a request: file system uid and gid, and the umask, which a kernel has applied to `mode` already.

    groups: the other groups of the caller, None where a kernel has checked them already.
    """

    uid: int
    gid: int
    umask: int = 0
    groups: tuple[int, ...] | None = None

    def may_set_group_bit(self, group: int) -> bool:
        """Return whether S_ISGID may be set on a file of this group (the kernel's in_group_or_capable)."""
        return self.groups is None or self.uid == 0 or group == self.gid or group in self.groups


class Names(Verbs):
    """The verbs that change which names exist. Those that make something return its node and stat."""

    def __init__(self, core: Core, metadata: Metadata, copyup: CopyUp, requirements: VerbRequirements) -> None:
        super().__init__(core)
        self._metadata = metadata
        self._copyup = copyup
        self._requirements = requirements
        self._removal = Removal(core, copyup)
        self._renames = Renames(core, copyup, self._removal)
        self._umask_is_zero = _umask_is_zero()

    # --- creating --------------------------------------------------------------------------------------

    def masked(self, parent: Node, mode: int, umask: int) -> int:
        """Return the mode of an object to be made: a default ACL in the parent goes before the umask (acl(5))."""
        if not mode & umask or (not self._stack.config.noacl and self._default_acl(as_dir(parent)) is not None):
            return mode
        return mode & ~umask

    def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> Made:
        """Make a directory; `mode` is permission bits, the umask already applied."""
        return self._make(
            parent, name, stat.S_IFDIR | mode, caller, lambda dirfd, child: sysio.mkdir_at(dirfd, child, mode)
        )

    def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Made:
        """Make a file, FIFO, socket or device; EPERM for a 0:0 device, which would be a whiteout."""
        if whiteout.is_device_whiteout(mode, rdev):
            raise oserror(errno.EPERM, name)
        kind = stat.S_IFMT(mode) or stat.S_IFREG

        def make(dirfd: int, child: bytes) -> None:
            if kind == stat.S_IFREG:
                sysio.mknod_at(dirfd, child, kind | stat.S_IMODE(mode), 0)
            else:
                self._upper.make_special(dirfd, child, kind | stat.S_IMODE(mode), rdev)

        return self._make(parent, name, kind | stat.S_IMODE(mode), caller, make)

    def symlink(self, parent: Node, name: bytes, target: bytes, caller: Caller) -> Made:
        """Make a symbolic link."""
        return self._make(
            parent, name, stat.S_IFLNK | 0o777, caller, lambda dirfd, child: sysio.symlink_at(target, dirfd, child)
        )

    def create(self, parent: Node, name: bytes, mode: int, caller: Caller) -> tuple[Made, int]:
        """Make a regular file; return it with a descriptor open for reading and writing."""
        opened: list[int] = []

        def make(dirfd: int, child: bytes) -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK
            opened.append(self._stack.dirfds.open_child(dirfd, child, flags, stat.S_IMODE(mode)))

        try:
            return self._make(parent, name, stat.S_IFREG | mode, caller, make), opened[0]
        except BaseException:
            for fd in opened:
                sysio.close(fd)
            raise

    def make_unnamed(self, parent: Node, mode: int, caller: Caller) -> tuple[Made, int]:
        """Make a regular file without a name (O_TMPFILE); return it with a descriptor open for reading and writing.

        It has the owner and the ACL that a file in `parent` would get; `link` gives it a name. EOPNOTSUPP where the
        upper's file system knows no such files.
        """
        regular = stat.S_IFREG | mode
        apply_attributes = self._apply_attributes(as_dir(parent), regular, caller, opaque=False, in_place=False)
        assert apply_attributes is not None
        fd = self._stack.dirfds.open_child(self._upper.work.fd, b"", os.O_RDWR | os.O_TMPFILE, 0o600)
        try:
            apply_attributes(fd, b"")
            found = sysio.stat_at(fd, b"")
            node = File(self._nodes.free_number(self._number_of(found)), stat.S_IFREG, True, None)
            node.orphan = self._stack.dirfds.open_child(fd, b"", os.O_PATH)
        except BaseException:
            sysio.close(fd)
            raise
        self._nodes.add_key(node, (found.st_dev, found.st_ino))
        self._nodes.add_unnamed(node)
        return (node, found), fd

    def _number_of(self, found: AnyStat) -> int:
        return self._stack.number(self._upper.filesystem, found.st_ino)

    def _make(self, parent: Node, name: bytes, mode: int, caller: Caller, make: Maker) -> Made:
        directory = as_dir(parent)
        check_new_name(self._upper, name)
        if self._lookup.lookup(directory, name) is not None:
            raise oserror(errno.EEXIST, name)
        self._copyup.copy_up_all(self._requirements.make(directory))
        state = self._lookup.name_state(directory, name, None)
        how = plans.create(state, stat.S_ISDIR(mode))
        opaque = stat.S_ISDIR(mode) and state.in_lower
        apply_attributes = self._apply_attributes(directory, mode, caller, opaque, how is Create.IN_PLACE)
        self._lookup.forget_missed()
        self._upper.create((self._nodes.path(directory), name), how, make, apply_attributes)
        return self._appeared(directory, name, opaque)

    def _appeared(self, parent: Dir, name: bytes, opaque: bool) -> Made:
        upper, path = self._upper, self._nodes.path(parent)
        found = after_change(lambda: upper.stat(path, name))
        number = self._nodes.free_number(self._number_of(found))
        node: Node
        if stat.S_ISDIR(found.st_mode):
            node = directory = Dir(number, parent, name, True, (), opaque)
            directory.upper_names = {}
        else:
            node = file = File(number, stat.S_IFMT(found.st_mode), True, None)
            self._nodes.add_key(file, (found.st_dev, found.st_ino))
        self._nodes.add(node, parent, name, True)
        parent.record_node(name, Kind.DIR if isinstance(node, Dir) else Kind.FILE, node)
        return node, found

    # --- what a new object gets before its name appears ---------------------------------------------------

    def _apply_attributes(self, parent: Dir, mode: int, caller: Caller, opaque: bool, in_place: bool) -> Maker | None:
        """Return what gives a new object owner, mode and ACL; None where making it in place gives them by itself."""
        uid, gid, set_group = self._metadata.owner_for(parent, caller.uid, caller.gid)
        if set_group and _is_group_executed(mode) and not caller.may_set_group_bit(gid):
            mode &= ~stat.S_ISGID
            in_place = False
        in_place = in_place and not self._would_inherit_unseen(parent)
        special = stat.S_ISDIR(mode) and mode & (stat.S_ISUID | stat.S_ISGID)
        plain = in_place and self._umask_is_zero and not opaque and not special and self._upper.override is None
        if plain and uid == os.geteuid() and (set_group or gid == os.getegid()):
            return None
        if set_group and stat.S_ISDIR(mode):
            mode |= stat.S_ISGID
        unwanted = stat.S_ISLNK(mode) or self._stack.config.noacl
        default = None if unwanted else self._default_acl(parent)
        return _ApplyAttributes(self._upper, uid, gid, mode, default, opaque)

    def _default_acl(self, parent: Dir) -> bytes | None:
        return self._metadata.inherited(parent).acl

    def _would_inherit_unseen(self, parent: Dir) -> bool:
        # On a mount without ACLs a directory may have one in the upper, and objects made in place would inherit it.
        return self._stack.config.noacl and self._default_acl(parent) is not None

    # --- linking ---------------------------------------------------------------------------------------

    def link(self, node: Node, parent: Node, name: bytes) -> Made:
        """Give a file one more name; EPERM for a directory."""
        if not isinstance(node, File):
            raise oserror(errno.EPERM, name)
        directory = as_dir(parent)
        check_new_name(self._upper, name)
        if self._lookup.lookup(directory, name) is not None:
            raise oserror(errno.EEXIST, name)
        self._copyup.copy_up_all(self._requirements.link(node, directory))
        self._renames.redirect_file(node)
        self._copyup.links.persist_nlink(node)
        state = self._lookup.name_state(directory, name, None)
        _, dirfd, child = self._objects.locate(node)
        self._lookup.forget_missed()
        self._upper.link(dirfd, child, (self._nodes.path(directory), name), plans.create(state, False))
        if node.orphan is not None:
            sysio.close(node.orphan)
            node.orphan = None
        self._nodes.attach(node, directory, name, True)
        directory.record_node(name, Kind.FILE, node)
        for other, _ in node.names:
            directory.sync_after(*other.unsynced_before())
        return node, after_change(lambda: self._objects.stat(node))

    # --- removing and moving ---------------------------------------------------------------------------

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name of anything but a directory."""
        _ = self._upper  # EROFS goes before what is wrong with the name (mnt_want_write in the kernel)
        node = self._existing(parent, name)
        if not isinstance(node, File):
            raise oserror(errno.EISDIR, name)
        self._copyup.copy_up_all(self._requirements.unlink(parent, name))
        self._removal.remove(as_dir(parent), name, node)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove a directory that shows nothing."""
        _ = self._upper
        node = self._existing(parent, name)
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR, name)
        if not self._lookup.is_empty(node):
            raise oserror(errno.ENOTEMPTY, name)
        self._copyup.copy_up_all(self._requirements.rmdir(parent))
        self._removal.remove(as_dir(parent), name, node)

    def _existing(self, parent: Node, name: bytes) -> Node:
        node = self._lookup.lookup(parent, name)
        if node is None:
            raise oserror(errno.ENOENT, name)
        return node

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int = 0) -> None:
        """Move a name; `flags` are 0, RENAME_NOREPLACE or RENAME_EXCHANGE of renameat2(2), else EINVAL."""
        plan = self._requirements.rename(parent, name, new_parent, new_name, flags)
        self._copyup.copy_up_all(plan)
        self._renames.carry_out(plan)

    def move(self, plan: RenamePlan) -> None:
        """Carry out a rename whose requirements are met: those of the plan, since when nothing has changed."""
        self._renames.carry_out(plan)


class _ApplyAttributes:
    """Gives a staged object its owner, ACL, mode and opaque mark."""

    def __init__(self, upper: Upper, uid: int, gid: int, mode: int, default: bytes | None, opaque: bool) -> None:
        self._upper = upper
        self._uid, self._gid = uid, gid
        self._mode = mode
        self._default = default
        self._opaque = opaque

    def __call__(self, dirfd: int, name: bytes) -> None:
        self._upper.set_owner(dirfd, name, self._uid, self._gid)
        if self._opaque:
            self._upper.set_opaque(dirfd, name)
        if not stat.S_ISLNK(self._mode):
            self._upper.set_mode(dirfd, name, self._inherit(dirfd, name))

    def _inherit(self, dirfd: int, name: bytes) -> int:
        mode = stat.S_IMODE(self._mode)
        if self._default is None:
            return mode
        inherited = acl.inherit(self._default, mode)
        if inherited.access is not None:
            sysio.setxattr_at(dirfd, name, acl.ACCESS, inherited.access)
        if stat.S_ISDIR(self._mode):
            sysio.setxattr_at(dirfd, name, acl.DEFAULT, self._default)
        return inherited.mode


def _is_group_executed(mode: int) -> bool:
    wanted = stat.S_ISGID | stat.S_IXGRP
    return not stat.S_ISDIR(mode) and mode & wanted == wanted


def _umask_is_zero() -> bool:
    mask = os.umask(0)
    os.umask(mask)
    return mask == 0
