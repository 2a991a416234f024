"""Rename: planned once, from lookups, before anything is copied up; carried out when what the plan requires is met.

A directory that is merged with lower ones moves with a redirect, which says where those are. Where none may be
written, or the path is too long for one, all that is in the directory is copied up first, and it moves as an upper one.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import redirect, whiteout, xattrs
from overlayfs.fs.copyup import CopyUp, Requirement
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.hardlinks import HardLinks
from overlayfs.fs.lookup import LONGEST_NAME, Lookup
from overlayfs.fs.nodes import Dir, File, Node, as_dir
from overlayfs.fs.remove import Removal
from overlayfs.tree.upper import Upper
from overlayfs.union import plans
from overlayfs.union.plans import Mark, NameState
from overlayfs.union.resolve import Kind


@dataclass(frozen=True, slots=True)
class Side:
    """A node that moves: where it is, the path for its redirect if it gets one, and whether its tree is copied up."""

    parent: Dir
    name: bytes
    node: Node
    lower_path: bytes | None = None
    copies_tree: bool = False

    def required(self, lookup: Lookup) -> Iterator[tuple[Node, Requirement]]:
        """Yield what must be in the upper, parents first; a tree that is copied is walked meanwhile."""
        yield self.parent, Requirement.METADATA
        yield self.node, Requirement.METADATA
        pending = [self.node] if self.copies_tree else []
        while pending:
            directory = pending.pop()
            assert isinstance(directory, Dir)
            yield directory, Requirement.METADATA
            for _, child in _children(lookup, directory):
                if isinstance(child, Dir):
                    pending.append(child)
                else:
                    yield child, Requirement.DATA


@dataclass(frozen=True, slots=True)
class RenamePlan:
    """A rename. Iterating yields what must be in the upper first.

    target: what has the new name, None for nothing. other: the side that moves back, for RENAME_EXCHANGE.
    is_noop: both names are the same file's, and POSIX wants nothing done.
    """

    source: Side
    new_parent: Dir
    new_name: bytes
    target: Node | None
    other: Side | None
    is_noop: bool
    _lookup: Lookup
    _unlinked: tuple[tuple[Node, Requirement], ...] = ()

    def __iter__(self) -> Iterator[tuple[Node, Requirement]]:
        if self.is_noop:
            return
        yield self.new_parent, Requirement.METADATA
        yield from self.source.required(self._lookup)
        if self.other is not None:
            yield from self.other.required(self._lookup)
        yield from self._unlinked


class RenamePlanner(Verbs):
    """Plans renames; changes nothing."""

    def __init__(self, core: Core, links: HardLinks) -> None:
        super().__init__(core)
        self._links = links

    def plan(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> RenamePlan:
        """Look up both names, once, and check all that renameat2(2) is refused for."""
        old, new = as_dir(parent), as_dir(new_parent)
        if flags not in (0, sysio.RENAME_NOREPLACE, sysio.RENAME_EXCHANGE):
            raise oserror(errno.EINVAL, name)
        upper = self._upper  # EROFS goes before what is wrong with the names (mnt_want_write in the kernel)
        source = self._lookup.lookup(old, name)
        if source is None:
            raise oserror(errno.ENOENT, name)
        check_new_name(upper, new_name)
        target = self._lookup.lookup(new, new_name)
        self._check(source, new, target, new_name, flags)
        if target is source:
            return RenamePlan(Side(old, name, source), new, new_name, target, None, True, self._lookup)
        if flags == sysio.RENAME_EXCHANGE and target is not None:
            if isinstance(target, Dir) and old.is_within(target):
                raise oserror(errno.EINVAL, name)
            other = self._side(new, new_name, target)
            return RenamePlan(self._side(old, name, source), new, new_name, target, other, False, self._lookup)
        counted = target is not None and self._links.must_copy_up(target)
        unlinked = ((target, Requirement.METADATA),) if target is not None and counted else ()
        side = self._side(old, name, source)
        return RenamePlan(side, new, new_name, target, None, False, self._lookup, unlinked)

    def _check(self, source: Node, new_parent: Dir, target: Node | None, name: bytes, flags: int) -> None:
        if flags == sysio.RENAME_NOREPLACE and target is not None:
            raise oserror(errno.EEXIST, name)
        if flags == sysio.RENAME_EXCHANGE and target is None:
            raise oserror(errno.ENOENT, name)
        if isinstance(source, Dir) and new_parent.is_within(source):
            raise oserror(errno.EINVAL, name)
        if flags or target is None or target is source:
            return
        if isinstance(source, Dir) and not isinstance(target, Dir):
            raise oserror(errno.ENOTDIR, name)
        if isinstance(target, Dir):
            if not isinstance(source, Dir):
                raise oserror(errno.EISDIR, name)
            if not self._lookup.is_empty(target):
                raise oserror(errno.ENOTEMPTY, name)

    def _side(self, parent: Dir, name: bytes, node: Node) -> Side:
        if not isinstance(node, Dir) or not node.lower:
            return Side(parent, name, node)
        if not self._stack.redirects:
            return Side(parent, name, node, None, True)
        path = self._lookup.lower_path(parent, name)
        return Side(parent, name, node, path, len(path) > redirect.MAX)


class Renames(Verbs):
    """Carries out rename plans whose requirements are met."""

    def __init__(self, core: Core, copyup: CopyUp, removal: Removal) -> None:
        super().__init__(core)
        self._copyup = copyup
        self._removal = removal

    def carry_out(self, plan: RenamePlan) -> None:
        """Move what the plan says; nothing may have changed since it was made."""
        if plan.is_noop:
            return
        self._lookup.forget_missed()
        if plan.other is not None:
            self._exchange(plan.source, plan.other)
        else:
            self._move(plan.source, plan.new_parent, plan.new_name, plan.target)

    def _move(self, source: Side, new_parent: Dir, new_name: bytes, target: Node | None) -> None:
        self._complete(source)
        if target is not None:
            self._removal.pin(target)
        state = self._state(source)
        replaced = self._lookup.name_state(new_parent, new_name, target)
        plan = plans.rename(state, replaced, bool(new_parent.lower))
        self._prepare(source.node, new_parent)
        old, new = (self._nodes.path(source.parent), source.name), (self._nodes.path(new_parent), new_name)
        with self._removal.counting_out(target, new_parent, new_name):
            self._upper.rename(old, new, plan, (_redirect(source, plan.source_mark), None))
        if isinstance(source.node, Dir):
            self._upper.forget_moved(old, new)
        if target is not None:
            self._removal.detach(target, new_parent, new_name)
        self._nodes.detach(source.node, source.parent, source.name)
        source.parent.record(source.name, Kind.WHITEOUT if state.in_lower else Kind.ABSENT)
        self._arrive(source.node, new_parent, new_name, plan.source_mark)
        if state.in_lower or source.parent is not new_parent:
            new_parent.sync_after(source.parent)

    def _exchange(self, one: Side, other: Side) -> None:
        for side in (one, other):
            self._complete(side)
        plan = plans.exchange(self._state(one), self._state(other), bool(other.parent.lower), bool(one.parent.lower))
        self._prepare(one.node, other.parent)
        self._prepare(other.node, one.parent)
        places = (self._nodes.path(one.parent), one.name), (self._nodes.path(other.parent), other.name)
        redirects = _redirect(one, plan.source_mark), _redirect(other, plan.target_mark)
        self._upper.rename(*places, plan, redirects)
        self._upper.forget_moved(*places)
        for side in (one, other):
            self._nodes.detach(side.node, side.parent, side.name)
        self._arrive(one.node, other.parent, other.name, plan.source_mark)
        self._arrive(other.node, one.parent, one.name, plan.target_mark)
        other.parent.sync_after(one.parent)
        one.parent.sync_after(other.parent)

    def _state(self, side: Side) -> NameState:
        return self._lookup.name_state(side.parent, side.name, side.node)

    def _complete(self, side: Side) -> None:
        """Do what the copy-up of nodes has left to do: add the name itself, and separate a copied tree."""
        if isinstance(side.node, File) and side.node.names.get((side.parent, side.name)) is False:
            self._copyup.links.add_lower_name(side.node, side.parent, side.name)
        if side.copies_tree and isinstance(side.node, Dir):
            self._separate(side.node)

    def _separate(self, node: Dir) -> None:
        """Make a tree in the upper independent of all lower layers, the deepest directory first."""
        found, pending = [], [node]
        while pending:
            directory = pending.pop()
            found.append(directory)
            for name, child in _children(self._lookup, directory):
                if isinstance(child, Dir):
                    pending.append(child)
                else:
                    self._copyup.copy_up_name(directory, name, child)
        for directory in reversed(found):
            if directory.lower:
                self._upper.set_opaque(self._upper.dirfd(self._nodes.path(directory)), b"")
                directory.lower, directory.lower_names, directory.opaque = (), None, True

    def _prepare(self, node: Node, new_parent: Dir) -> None:
        """Mark what the kernel needs marked before a node comes to a directory."""
        if isinstance(node, File):
            self.redirect_file(node)
        self._copyup.mark_impure(new_parent)

    def redirect_file(self, node: File) -> None:
        """Let a metadata-only copy say where its data is, before it gets another name than the lower file has."""
        if node.data is None or not node.data.name:
            return
        # Any name will do: those in lower layers are hard links of one file, those in the upper share a mark.
        known = next(iter(node.names), None)
        path = self._lookup.lower_path(*known) if known is not None else None
        if path is None or len(path) > redirect.MAX:
            self._copyup.copy_up(node, Requirement.DATA)
            return
        _, dirfd, name = self._objects.locate(node)
        self._upper.set_mark(dirfd, name, xattrs.REDIRECT, redirect.encode(path))

    def _arrive(self, node: Node, parent: Dir, name: bytes, mark: Mark) -> None:
        self._nodes.attach(node, parent, name, True)
        parent.record_node(name, Kind.DIR if isinstance(node, Dir) else Kind.FILE, node)
        if isinstance(node, Dir) and mark is Mark.OPAQUE:
            node.opaque = True


def _redirect(side: Side, mark: Mark) -> bytes | None:
    if mark is not Mark.REDIRECT:
        return None
    assert side.lower_path is not None, "a merged directory whose tree was copied up is not merged any more"
    return redirect.encode(side.lower_path)


def _children(lookup: Lookup, node: Dir) -> Iterator[tuple[bytes, Node]]:
    for name in lookup.listing(node):
        child = lookup.lookup(node, name)
        if child is not None:
            yield name, child


def check_new_name(upper: Upper, name: bytes) -> None:
    """Raise what a new name is refused for: EINVAL for one of the format's, ENAMETOOLONG."""
    if whiteout.is_reserved(name):
        raise oserror(errno.EINVAL, name)
    longest = LONGEST_NAME if upper.features.devices else LONGEST_NAME - len(whiteout.PREFIX)
    if len(name) > longest:
        raise oserror(errno.ENAMETOOLONG, name)
