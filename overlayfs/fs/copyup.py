"""Copy-up: bringing a node to the upper, ancestors first, one step per node.

Whether a node is in the upper as required is a cheap question (`is_met`), and which node is copied up next, too
(`next_node`). The step itself (overlayfs/fs/copyup_steps.py) is made once, where it is carried out: it begins on the
loop, is staged with descriptors and values, in a thread if data is copied, and is published on the loop. Between these
the node may have been renamed or unlinked, so publishing looks at where it is then.
"""

import errno
import os
import stat
from collections.abc import Iterable
from enum import Enum, auto
from typing import TypeAlias

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import origin, xattrs
from overlayfs.fs.copyup_steps import Build, CopyUpStep, Fill, StepContext, Truncate
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.durability import Durability
from overlayfs.fs.hardlinks import HardLinks
from overlayfs.fs.nodes import Dir, File, Node
from overlayfs.tree.staging import Content, Source


class Requirement(Enum):
    """How much of a node a verb requires in the upper."""

    METADATA = auto()  # the object with its attributes; its data may stay in a lower layer
    DATA = auto()  # the data as well
    TRUNCATED = auto()  # the object, whose data is about to be cut off: none is copied


Requirements: TypeAlias = Iterable[tuple[Node, Requirement]]
"""Nodes with what is required of each; their ancestors follow from that."""


def is_met(node: Node, requirement: Requirement) -> bool:
    """Return whether a node is in the upper as required, and no copy of it is being staged."""
    if not node.in_upper or node.copying_up:
        return False
    return requirement is Requirement.METADATA or not isinstance(node, File) or node.data is None


class CopyUp(Verbs):
    """Decides what is copied up next, and how."""

    def __init__(self, core: Core, durability: Durability) -> None:
        super().__init__(core)
        self.links = HardLinks(core)
        self._context = StepContext(core, self.links, durability, self.copy_up)

    @property
    def running(self) -> bool:
        """Whether a copy is being staged."""
        return bool(self._context.running)

    def next_node(self, node: Node) -> Node:
        """Return what to copy up next for a node whose requirement is not met: its topmost missing ancestor, or it.

        That node may be staged by another task: then there is nothing to do but to wait for its lock.
        """
        if node.in_upper:
            return node
        highest = node
        if isinstance(node, Dir):
            parent = node.parent
        else:
            assert isinstance(node, File)
            parent = next(iter(node.names))[0] if node.names else None
        while parent is not None and not parent.in_upper:
            highest, parent = parent, parent.parent
        return highest

    def copies_data(self, node: Node, requirement: Requirement) -> bool:
        """Return whether the next step of a node may take long. Cheap, so it takes an empty file for a large one."""
        if node.kind != stat.S_IFREG or requirement is Requirement.TRUNCATED:
            return False
        return requirement is Requirement.DATA or not (node.in_upper or self._stack.metacopy)

    def step(self, node: Node, requirement: Requirement) -> CopyUpStep:
        """Return the step that meets the requirement of a node whose ancestors are in the upper."""
        upper = self._stack.upper
        if upper is None:
            raise oserror(errno.EROFS)
        if not isinstance(node, File):
            return Build(self._context, upper, node, Content.NONE)
        if node.in_upper:
            assert node.data is not None
            if requirement is Requirement.DATA:
                return Fill(self._context, upper, node, node.data)
            return Truncate(self._context, upper, node)
        content = {
            Requirement.METADATA: Content.METACOPY if self._stack.metacopy else Content.COPY,
            Requirement.DATA: Content.COPY,
            Requirement.TRUNCATED: Content.NONE,
        }[requirement]
        return Build(self._context, upper, node, content)

    def copy_up(self, node: Node, requirement: Requirement = Requirement.METADATA) -> None:
        """Meet a requirement without waiting; EBUSY when another task is staging a copy, EROFS without an upper."""
        while not is_met(node, requirement):
            following = self.next_node(node)
            if following.copying_up:
                raise oserror(errno.EBUSY)
            self.step(following, requirement if following is node else Requirement.METADATA).perform()

    def copy_up_at_once(self, requirements: Requirements) -> bool:
        """Copy up what takes no data along, without waiting; return whether all of these requirements are met."""
        for node, requirement in requirements:
            while not is_met(node, requirement):
                following = self.next_node(node)
                required = requirement if following is node else Requirement.METADATA
                if following.copying_up or self.copies_data(following, required):
                    return False
                self.step(following, required).perform()
        return True

    def copy_up_all(self, requirements: Requirements) -> None:
        """Meet all of these requirements without waiting."""
        for node, requirement in requirements:
            if not is_met(node, requirement):
                self.copy_up(node, requirement)

    def copy_up_name(self, parent: Dir, name: bytes, node: Node) -> None:
        """Copy up a name, not only its node: a further name of a file that was copied up under another one."""
        self.copy_up(parent)
        self.copy_up(node)
        if isinstance(node, File) and node.names.get((parent, name)) is False:
            self.links.add_lower_name(node, parent, name)

    def mark_impure(self, parent: Dir) -> None:
        """Mark an upper directory with entries that have an origin, for the kernel's readdir."""
        upper = self._upper
        self._context.mark_impure(upper, parent, upper.dirfd(self._nodes.path(parent)))

    def directory_source(self, node: Dir) -> Source:
        """Return what copying a directory without its entries takes; the caller closes it. No upper is needed."""
        layer, dirfd, name = self._objects.locate(node)
        pin = self._stack.dirfds.open_child(dirfd, name, os.O_PATH)
        try:
            own = layer.filesystem.origin(sysio.file_handle(pin, b""))
            first = self._lookup.origins.lasting(layer.marks_at(pin, b"")) or own
            marks = {} if first is None else {xattrs.ORIGIN: origin.encode(first)}
            return Source(pin, layer.stat_at(pin, b""), marks=marks, override=layer.override is not None)
        except BaseException:
            sysio.close(pin)
            raise
