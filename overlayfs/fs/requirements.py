"""What must be in the upper before a verb may run: one function for each verb, used by the verbs and by both engines.

Each returns nodes with what is required of them; ancestors follow from these and are left to copy-up. An engine copies
up what is missing, which may take long, and asks again after every wait, for nodes may have moved meanwhile. A verb
does the same without waiting. Each raises EROFS where there is no upper.
"""

import errno
import os
import stat
from typing import TypeAlias

from overlayfs.errors import oserror
from overlayfs.fs.copyup import Requirement
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.hardlinks import HardLinks
from overlayfs.fs.metadata import Changes, Metadata
from overlayfs.fs.nodes import Node
from overlayfs.fs.rename import RenamePlan, RenamePlanner

Required: TypeAlias = tuple[tuple[Node, Requirement], ...]

_WRITES = (os.O_WRONLY, os.O_RDWR)


class VerbRequirements(Verbs):
    """The requirements of each verb, by its name."""

    def __init__(self, core: Core, metadata: Metadata, links: HardLinks) -> None:
        super().__init__(core)
        self._metadata = metadata
        self._links = links
        self._planner = RenamePlanner(core, links)

    def _one(self, node: Node, requirement: Requirement = Requirement.METADATA) -> Required:
        if self._stack.upper is None:
            raise oserror(errno.EROFS)
        return ((node, requirement),)

    # --- files -----------------------------------------------------------------------------------------

    def open(self, node: Node, flags: int) -> Required:
        """Opening for reading requires nothing. `flags` as in open(2)."""
        writes = flags & os.O_ACCMODE in _WRITES
        if node.kind != stat.S_IFREG or not (writes or flags & os.O_TRUNC):
            return ()
        if self._stack.upper is None:
            raise oserror(errno.EROFS)
        return ((node, Requirement.TRUNCATED if flags & os.O_TRUNC else Requirement.DATA),)

    def create(self, parent: Node, name: bytes, flags: int) -> Required:
        """A name that exists by now is opened, unless `flags` have O_EXCL."""
        existing = None if flags & os.O_EXCL else self._lookup.lookup(parent, name)
        return self._one(parent) if existing is None else self.open(existing, flags)

    def write(self, node: Node) -> Required:
        """Writing, allocating and copying into an open file: a commit may have come after it was opened."""
        return self._one(node, Requirement.DATA)

    # --- attributes ------------------------------------------------------------------------------------

    def set_attributes(self, node: Node, changes: Changes) -> Required:
        """A new size requires the data only when some of it stays."""
        if changes.size is None:
            return self._one(node)
        return self._one(node, Requirement.DATA if changes.size > 0 else Requirement.TRUNCATED)

    def set_flags(self, node: Node) -> Required:
        """The flags of chattr(1)."""
        return self._one(node)

    def setxattr(self, node: Node, name: bytes) -> Required:
        """Raises what an attribute of this name is refused for: nothing is copied up for that."""
        self._metadata.check_xattr(name)
        return self._one(node)

    def removexattr(self, node: Node, name: bytes) -> Required:
        """Raises ENODATA for an attribute that is not there, too."""
        self._metadata.check_xattr(name)
        self._metadata.getxattr(node, name)
        return self._one(node)

    # --- names -----------------------------------------------------------------------------------------

    def make(self, parent: Node) -> Required:
        """A directory, a node of any other kind, a symbolic link, or a file without a name."""
        return self._one(parent)

    def link(self, node: Node, parent: Node) -> Required:
        """Both the file and the directory of the new name."""
        return *self._one(node), *self._one(parent)

    def unlink(self, parent: Node, name: bytes) -> Required:
        """A file with other names may have to be copied up, to count the links that stay."""
        node = self._lookup.lookup(parent, name)
        counted = node is not None and self._links.must_copy_up(node)
        return (*self._one(parent), (node, Requirement.METADATA)) if node is not None and counted else self._one(parent)

    def rmdir(self, parent: Node) -> Required:
        """Only the directory above."""
        return self._one(parent)

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> RenamePlan:
        """Plan the rename; raises what renameat2(2) is refused for. The plan is good until nodes change again."""
        return self._planner.plan(parent, name, new_parent, new_name, flags)
