"""Names of hard-linked files that show an upper file only because the index says so.

When one of several names of a lower file is changed, the others follow through the index of the work directory,
whether or not they were ever looked up. A layer has no index, so a commit must find those names.
"""

from collections.abc import Iterator, Mapping

from overlayfs.fs.nodes import Dir, File
from overlayfs.fs.overlay import Overlay
from overlayfs.tree.layer import join


class Twins:
    """Finds such names in a read-only view of the same stack, whose top layer is the upper."""

    def __init__(self, overlay: Overlay, view: Overlay) -> None:
        self._overlay = overlay
        self._view = view

    def missing(self, linked: Mapping[tuple[int, int], list[bytes]]) -> Iterator[tuple[bytes, File]]:
        """Yield path and view node of each name that the upper lacks; `linked` are those it has, by inode."""
        if self._overlay.has_unlinked_twins({key: len(paths) for key, paths in linked.items()}):
            yield from self._walk(self._view.root, b"")

    def _walk(self, root: Dir, start: bytes) -> Iterator[tuple[bytes, File]]:
        pending = [(root, start)]
        while pending:
            directory, path = pending.pop()
            for name in self._view.list_names(directory):
                node = self._view.lookup(directory, name)
                if isinstance(node, Dir):
                    pending.append((node, join(path, name)))
                elif isinstance(node, File) and self._is_twin(node):
                    yield join(path, name), node

    def _is_twin(self, node: File) -> bool:
        in_upper = node.lower is None or node.lower.layer.index == 0
        return not in_upper and self._overlay.index_name_of(node) is not None
