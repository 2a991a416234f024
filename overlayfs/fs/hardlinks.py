"""Hard links over copy-up: one node for all names of a file, and a link count that counts those in every layer.

A lower file with several names is copied up into the index (overlayfs.rst, "Index"), which keeps its names together:
names in lower layers lead to the indexed copy, and its `nlink` mark says how many there are beyond those in the upper.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from overlayfs import sysio
from overlayfs.format import nlink, xattrs
from overlayfs.fs.core import Verbs
from overlayfs.fs.nodes import Dir, File, Node
from overlayfs.fs.real_objects import Located
from overlayfs.tree.upper import Upper
from overlayfs.union.plans import Create
from overlayfs.union.resolve import Kind


class HardLinks(Verbs):
    """Keeps link counts right while names are copied up and removed."""

    def must_copy_up(self, node: Node) -> bool:
        """Return whether removing a name of a node copies it up first: only the index can keep the count of its links.

        Without metadata-only copies that would copy data to remove a name, so the count lives with the node then.
        """
        if not isinstance(node, File) or node.in_upper or node.single_link:
            return False
        return self._stack.index and self._stack.metacopy and self._objects.stat(node).st_nlink > 1

    def add_lower_name(self, node: File, parent: Dir, name: bytes) -> None:
        """Give an upper file, in the upper, a name that it has in a lower layer: the union's link count stays."""
        upper = self._upper
        with keeping_times(upper, upper.dirfd(self._nodes.path(parent))):
            located = self._objects.locate(node)
            self._count_from_lower(node, located)
            upper.link(located[1], located[2], (self._nodes.path(parent), name), Create.IN_PLACE)
        node.nlink_delta -= 1
        node.names[parent, name] = True
        parent.record_node(name, Kind.FILE, node)
        with suppress(OSError):  # relative to the lower count it is as true
            self.persist_nlink(node)

    def _count_from_lower(self, node: File, located: Located) -> None:
        """Write the union's link count relative to the lower file's, so that the upper's may change (ovl_link_up)."""
        if node.index is None or node.lower is None:
            return
        layer, path, name = node.lower
        at, dirfd, child = located
        union = at.stat_at(dirfd, child).st_nlink + node.nlink_delta
        value = nlink.encode("L", union - layer.stat(path, name).st_nlink)
        self._upper.set_mark(dirfd, child, xattrs.NLINK, value)

    @contextmanager
    def one_name_less(self, node: File) -> Iterator[None]:
        """Within this context the union gets one name less, relative to the upper; not if it ends with an error."""
        node.nlink_delta -= 1
        try:
            self.persist_nlink(node)
            yield
        except BaseException:
            node.nlink_delta += 1
            with suppress(OSError):
                self.persist_nlink(node)
            raise

    def persist_nlink(self, node: File) -> None:
        """Write the union's link count, relative to the upper's, on an indexed file (ovl_set_nlink_upper)."""
        if node.index is not None:
            _, dirfd, name = self._objects.locate(node)
            self._upper.set_mark(dirfd, name, xattrs.NLINK, nlink.encode("U", node.nlink_delta))

    def drop_index(self, node: File) -> None:
        """Remove the entry of a file in the index: its last name has gone."""
        index = self._upper.work.index
        if node.index is not None and index is not None:
            with suppress(OSError):  # it stands for no name: the kernel drops such an entry at its next mount
                sysio.unlink_at(index, node.index)
                node.nlink_delta += 1
            node.index = None


@contextmanager
def keeping_times(upper: Upper, dirfd: int) -> Iterator[None]:
    """Within this context changes of names do not change the times of an upper directory: copy-up is invisible."""
    before = upper.stat_at(dirfd, b"")
    try:
        yield
    finally:
        with suppress(OSError):  # what was published stays published
            sysio.utimens_at(dirfd, b"", before.st_atime_ns, before.st_mtime_ns)
