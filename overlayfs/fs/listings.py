"""The names of merged directories: listed at most once, then kept and updated by our own changes.

Lookups, hits and misses alike, are answered from a kept listing, so that the depth of a stack costs nothing. A huge
directory is probed name by name until it is listed for a reader.
"""

from collections import OrderedDict

from overlayfs.fs.nodes import Dir, NodeTable
from overlayfs.fs.stack import Stack
from overlayfs.union.merge import fold, merge
from overlayfs.union.resolve import Kind

_HUGE = 2 << 20  # bytes of directory data above which names are probed one by one until the directory is read
_KEPT_NAMES = 500_000


class Listings:
    """The kept listings of one overlay, least recently built first."""

    def __init__(self, stack: Stack, nodes: NodeTable) -> None:
        self._stack = stack
        self._nodes = nodes
        self._kept: OrderedDict[int, tuple[Dir, int]] = OrderedDict()
        self._kept_names = 0

    def names(self, node: Dir) -> list[bytes]:
        """Return the visible names in a merged directory, upper names first."""
        upper = self.upper(node)
        lower = self.lower(node) or {}
        names = [name for name, kind in upper.items() if kind is not Kind.WHITEOUT]
        names += [name for name in lower if name not in upper]
        return names

    def upper(self, node: Dir) -> dict[bytes, Kind]:
        """Return what the upper holds in a directory."""
        if self._stack.upper is None or not node.in_upper or node.removed:
            return {}
        if node.upper_names is None:
            node.upper_names = self._stack.upper.names(self._nodes.path(node))
            self._keep(node)
        return node.upper_names

    def lower(self, node: Dir, only_if_cheap: bool = False) -> dict[bytes, tuple[int, ...]] | None:
        """Return the merged names of the lower directories, each with the indexes of those that make it up.

        With `only_if_cheap`, None where probing a single name costs less than listing.
        """
        if node.pending_uppers:
            self._merge_pending(node)
        if node.lower_names is None and (not only_if_cheap or self._is_worth_listing(node)):
            node.lower_names = merge(part.layer.names(part.path) for part in node.lower)
            self._keep(node)
        return node.lower_names

    def _merge_pending(self, node: Dir) -> None:
        for listing in reversed(node.pending_uppers):
            if node.lower_names is not None:
                node.lower_names = fold(listing, node.lower_names)
        node.pending_uppers = ()
        self._keep(node)

    @staticmethod
    def _is_worth_listing(node: Dir) -> bool:
        # One directory: a probe costs one stat, as an entry of the listing would. Huge: see _HUGE.
        if len(node.lower) < 2:
            return False
        return sum(part.layer.stat(part.path, b"").st_size for part in node.lower) < _HUGE

    def drop(self, node: Dir) -> None:
        """Stop counting the names of a directory whose node has left the table."""
        kept, size = self._kept.get(node.number, (None, 0))
        if kept is node:
            del self._kept[node.number]
            self._kept_names -= size

    def _keep(self, node: Dir) -> None:
        size = len(node.lower_names or ()) + len(node.upper_names or ())
        _, before = self._kept.pop(node.number, (node, 0))
        self._kept[node.number] = (node, size)
        self._kept_names += size - before
        while self._kept_names > _KEPT_NAMES and len(self._kept) > 1:
            _, (oldest, count) = self._kept.popitem(last=False)
            oldest.lower_names = oldest.upper_names = None
            oldest.pending_uppers = ()
            self._kept_names -= count
