"""How a name is removed: by unlink, by rmdir, and by a rename that replaces it. The node lives on while it is used."""

import os
from contextlib import AbstractContextManager, nullcontext, suppress

from overlayfs import sysio
from overlayfs.fs.copyup import CopyUp
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.nodes import Dir, File, Node
from overlayfs.union import plans
from overlayfs.union.resolve import Kind


class Removal(Verbs):
    """Removes names of nodes whose requirements are met."""

    def __init__(self, core: Core, copyup: CopyUp) -> None:
        super().__init__(core)
        self._links = copyup.links

    def remove(self, parent: Dir, name: bytes, node: Node) -> None:
        """Remove the name of a node, in the upper or by a whiteout."""
        self.pin(node)
        state = self._lookup.name_state(parent, name, node)
        place = self._nodes.path(parent), name
        if isinstance(node, Dir):
            self._upper.forget(place)
            self._upper.remove(place, plans.remove(state), is_dir=True)
        else:
            with self.counting_out(node, parent, name):
                self._upper.remove(place, plans.remove(state), is_dir=False)
        parent.record(name, Kind.WHITEOUT if state.in_lower else Kind.ABSENT)
        self.detach(node, parent, name)

    def pin(self, node: Node) -> None:
        """Keep hold of an object that is about to lose its last name.

        The kernel may still know it by number: it must be found, and its inode number not be given away.
        """
        if node.in_upper and node.orphan is None and (not isinstance(node, File) or len(node.names) <= 1):
            _, dirfd, name = self._objects.locate(node)
            node.orphan = self._stack.dirfds.open_child(dirfd, name, os.O_PATH)

    def counting_out(self, node: Node | None, parent: Dir, name: bytes) -> AbstractContextManager[None]:
        """Return the context in which a name goes: a name that the upper does not have must be counted by hand.

        For one that it has, the mark must be relative to the upper's count before that falls (ovl_nlink_start).
        """
        if isinstance(node, File):
            if not node.names.get((parent, name), True):
                return self._links.one_name_less(node)
            self._links.persist_nlink(node)
        return nullcontext()

    def detach(self, node: Node, parent: Dir, name: bytes) -> None:
        """Update a node that has lost a name."""
        if isinstance(node, Dir):
            node.removed = True
        self._nodes.detach(node, parent, name)
        if isinstance(node, File):
            self._forget_index(node)
        self._nodes.released(node)

    def _forget_index(self, node: File) -> None:
        if node.index is not None and not node.names:
            with suppress(OSError):  # an entry that stands for no name: the kernel drops it at its next mount
                if self._objects.stat(node).st_nlink + node.nlink_delta <= 0:
                    self._links.drop_index(node)
        elif node.orphan is not None and node.names:
            sysio.close(node.orphan)
            node.orphan = None
