"""Changes of names: create, link, remove, rename. Facts from look-up, a plan from `union.plans`, carried out by `tree`.

Each verb lifts what it needs, asks for a plan, lets the upper carry it out, and then settles nodes and listings.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import acl, redirect, whiteout, xattrs
from overlayfs.fs.copyup import CopyUp, Requirement
from overlayfs.fs.lookup import LONGEST_NAME, Lookup
from overlayfs.fs.metadata import Metadata, after_change
from overlayfs.fs.nodes import Dir, File, Node, NodeTable
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import join
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Maker, Upper
from overlayfs.union import plans
from overlayfs.union.plans import Create, Mark, Move, NameState
from overlayfs.union.resolve import Kind

_DOT_NAME = LONGEST_NAME - len(whiteout.PREFIX)


class Caller(NamedTuple):
    """Who asks: file system uid and gid, and the umask, which is applied to `mode` already where a kernel asks.

    groups: the other groups of the caller, None where a kernel has looked at them already.
    """

    uid: int
    gid: int
    umask: int = 0
    groups: tuple[int, ...] | None = None

    def may_set_group_bit(self, group: int) -> bool:
        """Return whether S_ISGID may be set on a file of this group (the kernel's in_group_or_capable)."""
        return self.groups is None or self.uid == 0 or group == self.gid or group in self.groups


class Moving(NamedTuple):
    """One side of a rename: where, and what is there."""

    parent: Dir
    name: bytes
    node: Node
    name_state: NameState


class Names:
    """The verbs that change which names exist."""

    def __init__(self, stack: Stack, nodes: NodeTable, lookup: Lookup, attributes: Metadata, copyup: CopyUp) -> None:
        self._stack = stack
        self._nodes = nodes
        self._lookup = lookup
        self._attributes = attributes
        self._copyup = copyup
        self._umask_is_zero = _umask_is_zero()

    @property
    def _upper(self) -> Upper:
        return self._attributes.upper

    # --- creating --------------------------------------------------------------------------------------

    def mkdir(self, parent: Dir, name: bytes, mode: int, caller: Caller) -> Dir:
        """Make a directory."""
        made = self._make(
            parent, name, stat.S_IFDIR | mode, caller, lambda dirfd, child: sysio.mkdir_at(dirfd, child, mode)
        )
        assert isinstance(made, Dir)
        return made

    def mknod(self, parent: Dir, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
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

    def symlink(self, parent: Dir, name: bytes, target: bytes, caller: Caller) -> Node:
        """Make a symbolic link."""
        return self._make(
            parent, name, stat.S_IFLNK | 0o777, caller, lambda dirfd, child: sysio.symlink_at(target, dirfd, child)
        )

    def create(self, parent: Dir, name: bytes, mode: int, caller: Caller) -> tuple[File, int]:
        """Make a regular file; return it with a descriptor open for reading and writing."""
        opened: list[int] = []

        def make(dirfd: int, child: bytes) -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK
            opened.append(self._stack.dirfds.retry(lambda: sysio.open_child(dirfd, child, flags, stat.S_IMODE(mode))))

        try:
            node = self._make(parent, name, stat.S_IFREG | mode, caller, make)
        except BaseException:
            for fd in opened:
                sysio.close(fd)
            raise
        assert isinstance(node, File)
        return node, opened[0]

    def make_unnamed(self, parent: Dir, mode: int, caller: Caller) -> tuple[File, int]:
        """Make a regular file without a name (O_TMPFILE); return it with a descriptor open for reading and writing.

        It has the owner and the ACL that a file in `parent` would get; `link` gives it a name. EOPNOTSUPP where the
        upper's file system knows no such files.
        """
        apply_attributes = self._apply_attributes(parent, stat.S_IFREG | mode, caller, opaque=False, in_place=False)
        assert apply_attributes is not None
        opener = self._stack.dirfds.retry
        fd = opener(lambda: sysio.open_child(self._upper.work.fd, b"", os.O_RDWR | os.O_TMPFILE, 0o600))
        try:
            apply_attributes(fd, b"")
            found = sysio.stat_at(fd, b"")
            node = File(self._nodes.free_number(self._number_of(found)), stat.S_IFREG, True, None)
            node.orphan = opener(lambda: sysio.open_child(fd, b"", os.O_PATH))
        except BaseException:
            sysio.close(fd)
            raise
        self._nodes.add_key(node, (found.st_dev, found.st_ino))
        self._nodes.add_unnamed(node)
        return node, fd

    def _number_of(self, found: AnyStat) -> int:
        return self._stack.number(self._upper.filesystem, found.st_ino)

    def _make(self, parent: Dir, name: bytes, mode: int, caller: Caller, make: Maker) -> Node:
        self._check_new_name(name)
        if self._lookup.lookup(parent, name) is not None:
            raise oserror(errno.EEXIST, name)
        self._copyup.copy_up(parent)
        name_state = self._lookup.name_state(parent, name, None)
        is_dir = stat.S_ISDIR(mode)
        how = plans.create(name_state, is_dir)
        apply_attributes = self._apply_attributes(
            parent, mode, caller, is_dir and name_state.below, how is Create.IN_PLACE
        )
        self._lookup.forget_missed()
        self._upper.create((self._lookup.path(parent), name), how, make, apply_attributes)
        return self._appeared(parent, name, opaque=is_dir and name_state.below)

    def _check_new_name(self, name: bytes) -> None:
        if whiteout.is_reserved(name):
            raise oserror(errno.EINVAL, name)
        longest = LONGEST_NAME if self._upper.features.devices else _DOT_NAME
        if len(name) > longest:
            raise oserror(errno.ENAMETOOLONG, name)

    def _appeared(self, parent: Dir, name: bytes, opaque: bool) -> Node:
        upper, path = self._upper, self._lookup.path(parent)
        found = after_change(lambda: upper.stat(path, name))
        node: Node
        if stat.S_ISDIR(found.st_mode):
            number = self._nodes.free_number(self._number_of(found))
            node = made = Dir(number, parent, name, True, (), opaque)
            made.upper_names = {}
        else:
            number = self._nodes.free_number(self._number_of(found))
            node = fresh = File(number, stat.S_IFMT(found.st_mode), True, None)
            self._nodes.add_key(fresh, (found.st_dev, found.st_ino))
        self._nodes.attach(node, parent, name, True)
        self._nodes.add(node)
        parent.gain(name, Kind.DIR if isinstance(node, Dir) else Kind.FILE, node)
        self._lookup.fresh = (node, found)
        return node

    # --- what a new object gets before its name appears ---------------------------------------------------

    def _apply_attributes(self, parent: Dir, mode: int, caller: Caller, opaque: bool, in_place: bool) -> Maker | None:
        """Return what gives a new object owner, mode and ACL; None where making it in place gives them by itself."""
        uid, gid, set_group = self._attributes.owner_for(parent, caller.uid, caller.gid)
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
        return self._attributes.inherited(parent).acl

    def has_default_acl(self, parent: Dir) -> bool:
        """Return whether what is made in a directory gets its permissions from an ACL there, not from a umask."""
        return not self._stack.config.noacl and self._default_acl(parent) is not None

    def _would_inherit_unseen(self, parent: Dir) -> bool:
        # A mount without ACLs may still lie over a directory that has one: made in place, its children would get it.
        return self._stack.config.noacl and self._default_acl(parent) is not None

    # --- linking ---------------------------------------------------------------------------------------

    def link(self, node: Node, parent: Dir, name: bytes) -> None:
        """Give a file one more name; EPERM for a directory."""
        if not isinstance(node, File):
            raise oserror(errno.EPERM, name)
        self._check_new_name(name)
        if self._lookup.lookup(parent, name) is not None:
            raise oserror(errno.EEXIST, name)
        self._copyup.copy_up(parent)
        self._copyup.copy_up(node)
        self._redirect_file(node)
        self._copyup.persist_nlink(node)
        name_state = self._lookup.name_state(parent, name, None)
        _, dirfd, child = self._attributes.locate(node)
        self._lookup.forget_missed()
        self._upper.link(dirfd, child, (self._lookup.path(parent), name), plans.create(name_state, False))
        if node.orphan is not None:
            sysio.close(node.orphan)
            node.orphan = None
        self._nodes.attach(node, parent, name, True)
        parent.gain(name, Kind.FILE, node)
        for other, _ in node.names:
            parent.owe(*other.debts())
        self._lookup.fresh = (node, after_change(lambda: self._attributes.stat(node)))

    def _redirect_file(self, node: File) -> None:
        # Metadata only under another name than below: the copy must say where its data lies.
        if node.data is None or not node.data.name:
            return
        known = next(iter(node.names), None)  # any name will do: those below are twins, those in the upper share a mark
        path = self._path_below(*known) if known is not None else None
        if path is None or len(path) > redirect.MAX:
            self._copyup.copy_up(node, Requirement.DATA)
            return
        _, dirfd, name = self._attributes.locate(node)
        self._upper.set_mark(dirfd, name, xattrs.REDIRECT, redirect.encode(path))

    def _path_below(self, parent: Dir | None, name: bytes) -> bytes:
        """Return the path by which the lower layers, seen from their top, know what the upper shows under a name.

        It is not the path in the layer that holds it: a layer above may have redirected a directory on the way
        (ovl_get_redirect in fs/overlayfs/dir.c goes up the same way).
        """
        path = b""
        while parent is not None and not path.startswith(b"/"):
            path = join(self._redirect_at(parent, name) or name, path)
            name, parent = parent.name, parent.parent
        return path if path.startswith(b"/") else b"/" + path

    def _redirect_at(self, parent: Dir, name: bytes) -> bytes | None:
        entry = self._lookup.upper_entry(parent, name)
        if entry.stat is None:
            return None
        return self._upper.marks(self._lookup.path(parent), name, entry.stat).redirect

    # --- removing --------------------------------------------------------------------------------------

    def unlink(self, parent: Dir, name: bytes) -> None:
        """Remove a name of anything but a directory."""
        self._require_upper()
        node = self._existing(parent, name)
        if not isinstance(node, File):
            raise oserror(errno.EISDIR, name)
        self._copyup.copy_up(parent)
        self.copy_up_counted(node)
        self._pin(node)
        name_state = self._lookup.name_state(parent, name, node)
        with self._counted_out(node, parent, name):
            self._upper.remove((self._lookup.path(parent), name), plans.remove(name_state), is_dir=False)
        self._gone(node, parent, name, name_state)

    def rmdir(self, parent: Dir, name: bytes) -> None:
        """Remove a directory that shows nothing."""
        self._require_upper()
        node = self._existing(parent, name)
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR, name)
        if not self._lookup.is_empty(node):
            raise oserror(errno.ENOTEMPTY, name)
        self._copyup.copy_up(parent)
        self._pin(node)
        name_state = self._lookup.name_state(parent, name, node)
        self._upper.forget((self._lookup.path(parent), name))
        self._upper.remove((self._lookup.path(parent), name), plans.remove(name_state), is_dir=True)
        self._gone(node, parent, name, name_state)

    def _require_upper(self) -> None:
        """Raise EROFS where nothing can change: it goes before what is wrong with the names (mnt_want_write)."""
        _ = self._upper

    def _existing(self, parent: Dir, name: bytes) -> Node:
        node = self._lookup.lookup(parent, name)
        if node is None:
            raise oserror(errno.ENOENT, name)
        return node

    def copy_up_counted(self, node: Node) -> None:
        """Lift a lower file with several names before one goes: only the index can keep the count.

        Without metadata-only copies that would copy data to remove a name, so the count lives with the node then.
        """
        if self.must_copy_up_counted(node):
            self._copyup.copy_up(node)

    def must_copy_up_counted(self, node: Node) -> bool:
        """Return whether removing a name of this node lifts it first."""
        if not isinstance(node, File) or node.in_upper or node.single_link:
            return False
        if not (self._stack.index and self._stack.metacopy):
            return False
        return self._attributes.stat(node).st_nlink > 1

    def _pin(self, node: Node) -> None:
        # The kernel may still hold an unlinked object by number: it must be found, and its number not be given away.
        if node.in_upper and node.orphan is None and (not isinstance(node, File) or len(node.names) <= 1):
            _, dirfd, name = self._attributes.locate(node)
            node.orphan = self._stack.dirfds.retry(lambda: sysio.open_child(dirfd, name, os.O_PATH))

    def _counted_out(self, node: Node | None, parent: Dir, name: bytes) -> AbstractContextManager[None]:
        """Return the context in which a name goes: one that the upper does not have must be counted by hand.

        For one that it has the mark must be relative to the upper's count before that falls (ovl_nlink_start).
        """
        if isinstance(node, File):
            if not node.names.get((parent, name), True):
                return self._copyup.one_name_less(node)
            self._copyup.persist_nlink(node)
        return nullcontext()

    def _gone(self, node: Node, parent: Dir, name: bytes, name_state: NameState) -> None:
        parent.note(name, self._left_behind(name_state))
        if isinstance(node, Dir):
            node.removed = True
        self._nodes.detach(node, parent, name)
        self._lookup.fresh = None
        if isinstance(node, File):
            self._forget_index(node)
        self._nodes.released(node)

    @staticmethod
    def _left_behind(name_state: NameState) -> Kind:
        return Kind.WHITEOUT if name_state.below else Kind.ABSENT

    def _forget_index(self, node: File) -> None:
        if node.index is not None and not node.names:
            with suppress(OSError):  # an entry that stands for no name: the kernel drops it at its next mount
                if self._attributes.attributes(node).nlink == 0:
                    self._copyup.drop_index(node)
        elif node.orphan is not None and node.names:
            sysio.close(node.orphan)
            node.orphan = None

    # --- renaming --------------------------------------------------------------------------------------

    def rename(self, parent: Dir, name: bytes, new_parent: Dir, new_name: bytes, flags: int) -> None:
        """Move a name, replacing what is there (flags 0), only onto a free one (NOREPLACE), or swapping (EXCHANGE)."""
        if flags not in (0, sysio.RENAME_NOREPLACE, sysio.RENAME_EXCHANGE):
            raise oserror(errno.EINVAL, name)
        self._require_upper()
        source = self._existing(parent, name)
        self._check_new_name(new_name)
        target = self._lookup.lookup(new_parent, new_name)
        self._check_rename(source, new_parent, target, new_name, flags)
        if target is source:
            return  # two names of one file, or one name onto itself: POSIX wants nothing done
        self._lookup.forget_missed()
        if flags == sysio.RENAME_EXCHANGE and target is not None:
            self._exchange(parent, name, source, new_parent, new_name, target)
        else:
            self._move(parent, name, source, new_parent, new_name, target)

    def _check_rename(self, source: Node, new_parent: Dir, target: Node | None, name: bytes, flags: int) -> None:
        if flags == sysio.RENAME_NOREPLACE and target is not None:
            raise oserror(errno.EEXIST, name)
        if flags == sysio.RENAME_EXCHANGE and target is None:
            raise oserror(errno.ENOENT, name)
        if isinstance(source, Dir) and new_parent.is_below(source):
            raise oserror(errno.EINVAL, name)
        if flags == 0 and target is not None and target is not source:
            self._check_replaceable(source, target, name)

    def _check_replaceable(self, source: Node, target: Node, name: bytes) -> None:
        if isinstance(source, Dir) and not isinstance(target, Dir):
            raise oserror(errno.ENOTDIR, name)
        if isinstance(target, Dir):
            if not isinstance(source, Dir):
                raise oserror(errno.EISDIR, name)
            if not self._lookup.is_empty(target):
                raise oserror(errno.ENOTEMPTY, name)

    def _move(
        self, parent: Dir, name: bytes, source: Node, new_parent: Dir, new_name: bytes, target: Node | None
    ) -> None:
        self._copy_up_moving(parent, name, source, new_parent)
        if isinstance(target, File):
            self.copy_up_counted(target)
        if target is not None:
            self._pin(target)
        old = Moving(parent, name, source, self._lookup.name_state(parent, name, source))
        replaced = self._lookup.name_state(new_parent, new_name, target)
        plan = plans.rename(old.name_state, replaced, bool(new_parent.lower), redirects=True)
        self._redirect_moved_file(source)
        self._copyup.mark_impure(new_parent)
        redirects = self._redirect_for(source, plan.source_mark), None
        with self._counted_out(target, new_parent, new_name):
            self._upper.rename(
                (self._lookup.path(parent), name), (self._lookup.path(new_parent), new_name), plan, redirects
            )
        if isinstance(source, Dir):
            self._upper.forget_moved((self._lookup.path(parent), name), (self._lookup.path(new_parent), new_name))
        self._settle_move(old, new_parent, new_name, target, plan)

    def _copy_up_moving(self, parent: Dir, name: bytes, node: Node, new_parent: Dir) -> None:
        self._copyup.copy_up(new_parent)
        self._copyup.copy_up_name(parent, name, node)
        if isinstance(node, Dir) and self.must_copy_tree(node):
            for each, requirement in self.tree_to_copy_up(node):
                self._copyup.copy_up(each, requirement)
            self._cut_off(node)

    def must_copy_tree(self, node: Node) -> bool:
        """Return whether a directory can move only when all that is in it lies in the upper (design, D2)."""
        if not isinstance(node, Dir) or not node.lower:
            return False
        return not self._stack.redirects or len(self._path_below(node.parent, node.name)) > redirect.MAX

    def tree_to_copy_up(self, node: Dir) -> Iterator[tuple[Node, Requirement]]:
        """Yield every node of a tree with what it needs, parents first, as long as the tree has lower parts."""
        pending = [node]
        while pending:
            directory = pending.pop()
            yield directory, Requirement.METADATA
            for _, child in self._children(directory):
                if isinstance(child, Dir):
                    pending.append(child)
                else:
                    yield child, Requirement.DATA

    def _children(self, node: Dir) -> Iterator[tuple[bytes, Node]]:
        for name in self._lookup.listing(node):
            child = self._lookup.lookup(node, name)
            if child is not None:
                yield name, child

    def _cut_off(self, node: Dir) -> None:
        """Make a tree that lies in the upper completely independent of what is below, the deepest directory first."""
        found, pending = [], [node]
        while pending:
            directory = pending.pop()
            found.append(directory)
            for name, child in self._children(directory):
                if isinstance(child, Dir):
                    pending.append(child)
                elif isinstance(child, File):
                    self._copyup.copy_up_name(directory, name, child)
        for directory in reversed(found):
            if directory.lower:
                self._upper.set_opaque(self._upper.dirfd(self._lookup.path(directory)), b"")
                directory.lower, directory.below, directory.opaque = (), None, True

    def _exchange(self, parent: Dir, name: bytes, source: Node, new_parent: Dir, new_name: bytes, target: Node) -> None:
        if isinstance(target, Dir) and parent.is_below(target):
            raise oserror(errno.EINVAL, name)
        self._copy_up_moving(parent, name, source, new_parent)
        self._copy_up_moving(new_parent, new_name, target, parent)
        old = Moving(parent, name, source, self._lookup.name_state(parent, name, source))
        new = Moving(new_parent, new_name, target, self._lookup.name_state(new_parent, new_name, target))
        plan = plans.exchange(
            old.name_state, new.name_state, bool(new_parent.lower), bool(parent.lower), redirects=True
        )
        for moved in (source, target):
            self._redirect_moved_file(moved)
        for changed in (parent, new_parent):
            self._copyup.mark_impure(changed)
        redirects = self._redirect_for(source, plan.source_mark), self._redirect_for(target, plan.target_mark)
        self._upper.rename(
            (self._lookup.path(parent), name), (self._lookup.path(new_parent), new_name), plan, redirects
        )
        self._upper.forget_moved((self._lookup.path(parent), name), (self._lookup.path(new_parent), new_name))
        self._settle_exchange(old, new, plan)

    def _redirect_moved_file(self, node: Node) -> None:
        if isinstance(node, File):
            self._redirect_file(node)

    def _redirect_for(self, node: Node, mark: Mark) -> bytes | None:
        return self._redirect_to(node) if mark is Mark.REDIRECT and isinstance(node, Dir) else None

    def _redirect_to(self, node: Dir) -> bytes:
        return redirect.encode(self._path_below(node.parent, node.name))

    def _settle_move(
        self, old: Moving, new_parent: Dir, new_name: bytes, target: Node | None, plan: plans.Rename
    ) -> None:
        if target is not None:
            if isinstance(target, Dir):
                target.removed = True
            self._nodes.detach(target, new_parent, new_name)
        self._nodes.detach(old.node, old.parent, old.name)
        self._nodes.attach(old.node, new_parent, new_name, True)
        old.parent.note(old.name, Kind.WHITEOUT if old.name_state.below else Kind.ABSENT)
        self._moved(old.node, new_parent, new_name, plan.source_mark)
        if old.name_state.below or old.parent is not new_parent:
            new_parent.owe(old.parent)
        if isinstance(target, File):
            self._forget_index(target)
        if target is not None:
            self._nodes.released(target)

    def _settle_exchange(self, old: Moving, new: Moving, plan: plans.Rename) -> None:
        assert plan.move is Move.EXCHANGE
        self._nodes.detach(old.node, old.parent, old.name)
        self._nodes.detach(new.node, new.parent, new.name)
        self._nodes.attach(old.node, new.parent, new.name, True)
        self._nodes.attach(new.node, old.parent, old.name, True)
        self._moved(old.node, new.parent, new.name, plan.source_mark)
        self._moved(new.node, old.parent, old.name, plan.target_mark)
        new.parent.owe(old.parent)
        old.parent.owe(new.parent)

    def _moved(self, node: Node, parent: Dir, name: bytes, mark: Mark) -> None:
        parent.gain(name, Kind.DIR if isinstance(node, Dir) else Kind.FILE, node)
        if isinstance(node, Dir) and mark is Mark.OPAQUE:
            node.opaque = True
        self._lookup.fresh = None


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
