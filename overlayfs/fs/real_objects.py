"""Where the real object behind a node is now: the layer, and a directory descriptor and name to reach it by."""

import errno
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from overlayfs.errors import oserror
from overlayfs.fs.nodes import Dir, File, Node, NodeTable
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import Layer
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Upper

T = TypeVar("T")

Located: TypeAlias = tuple[Layer, int, bytes]
"""Layer, borrowed directory descriptor, and name in it; the name b"" means the object behind the descriptor."""


class RealObjects:
    """Finds the topmost real object of a node."""

    def __init__(self, stack: Stack, nodes: NodeTable) -> None:
        self._stack = stack
        self._nodes = nodes

    @property
    def upper(self) -> Upper:
        """The upper; EROFS without one."""
        if self._stack.upper is None:
            raise oserror(errno.EROFS)
        return self._stack.upper

    def locate(self, node: Node) -> Located:
        """Return where the topmost real object of a node is; ESTALE when its last known name has gone."""
        upper = self._stack.upper
        if upper is not None and node.orphan is not None:
            return upper, node.orphan, b""
        if isinstance(node, Dir):
            if upper is not None and node.in_upper:
                return upper, upper.dirfd(self._nodes.path(node)), b""
            layer, path = node.lower[0]
            return layer, layer.dirfd(path), b""
        assert isinstance(node, File)
        if upper is None or not node.in_upper:
            if node.lower is None:
                raise oserror(errno.ESTALE)
            layer, path, name = node.lower
            return layer, layer.dirfd(path), name
        for (parent, name), in_upper in node.names.items():
            if in_upper:
                return upper, upper.dirfd(self._nodes.path(parent)), name
        if node.index is not None and upper.work.index is not None:
            return upper, upper.work.index, node.index
        raise oserror(errno.ESTALE)

    def stat(self, node: Node) -> AnyStat:
        """Return the attributes of the topmost real object."""
        layer, dirfd, name = self.locate(node)
        return layer.stat_at(dirfd, name)

    def size(self, node: Node, found: AnyStat) -> int:
        """Return the size of a node whose real object has this stat: metadata-only copies have the size of their data.

        The copy's own size may be too small after a crash: btrfs makes a name durable without the size of a new inode,
        and a truncation that was interrupted has cut the copy and not removed its mark.
        """
        data = self.data_stat(node)
        return found.st_size if data is None else data.st_size

    @staticmethod
    def data_stat(node: Node) -> AnyStat | None:
        """Return the attributes of the lower file with the data of a metadata-only copy; None for all other nodes."""
        if not isinstance(node, File) or node.data is None or not node.data.name:
            return None
        layer, path, name = node.data
        return after_change(lambda: layer.stat(path, name))  # the copy may just have got a name by link(2)


def after_change(look: Callable[[], T]) -> T:
    """Return what `look` finds after a change. Looks twice: an error would say that nothing was changed."""
    try:
        return look()
    except OSError:
        return look()
