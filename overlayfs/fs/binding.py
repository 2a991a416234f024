"""From what the layers hold under a name to a node: found again by its real object, or made with its number."""

import stat

from overlayfs import sysio
from overlayfs.format import origin
from overlayfs.fs.nodes import Dir, File, Key, LowerFile, Node, NodeTable
from overlayfs.fs.origins import Origins
from overlayfs.fs.search import NOTHING, LowerObject, Search
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import NO_MARKS, Entry, Marks
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Upper
from overlayfs.union.resolve import Kind


class Binding:
    """Binds names to nodes. What is returned beside a node is the stat of its real object that was taken on the way."""

    def __init__(self, stack: Stack, nodes: NodeTable, search: Search, origins: Origins) -> None:
        self._stack = stack
        self._nodes = nodes
        self._search = search
        self._origins = origins

    # --- what the upper holds --------------------------------------------------------------------------

    def bind_upper(self, upper: Upper, parent: Dir, name: bytes, entry: Entry) -> tuple[Node, AnyStat | None]:
        """Bind a name to what the upper holds under it, merged with what is below a directory."""
        found = entry.stat
        assert found is not None
        marks = upper.marks(self._nodes.path(parent), name, found)
        if not stat.S_ISDIR(found.st_mode):
            return self._bind_upper_file(upper, parent, name, found, marks), found
        lower = NOTHING
        if not marks.opaque and entry.kind is not Kind.OPAQUE and (parent.lower or marks.redirect):
            lower = self._search.find(parent, marks.redirect or name)
        return self._new_dir(parent, name, found, marks, lower), found

    def _bind_upper_file(self, upper: Upper, parent: Dir, name: bytes, found: AnyStat, marks: Marks) -> File:
        key = (found.st_dev, found.st_ino)
        node = self._nodes.by_key(key)
        if node is None:
            number = self._nodes.free_number(*self._origins.numbers(upper, found, marks))
            node = File(number, stat.S_IFMT(found.st_mode), True, None)
            self._find_index(upper, node, found, marks)
            if marks.metacopy:
                node.data = self._search.find(parent, marks.redirect or name, data_only=True).data or self._no_data()
            self._nodes.add_key(node, key)  # last: a node that an error left half made must not be found again
        self._nodes.add(node, parent, name, True)
        return node

    def _no_data(self) -> LowerFile:
        # A metadata-only file whose data is missing stays visible, and opening it is EIO: a directory cannot be read.
        return LowerFile(self._stack.lower[-1], b"", b"")

    def _find_index(self, upper: Upper, node: File, found: AnyStat, marks: Marks) -> None:
        # An upper file with an entry in the index carries a link count; without one its own count is right.
        if upper.work.index is None or marks.origin is None or marks.nlink is None:
            return
        name = origin.index_name(marks.origin)
        try:
            entry = sysio.stat_at(upper.work.index, name)
        except FileNotFoundError:
            return
        if (entry.st_dev, entry.st_ino) == (found.st_dev, found.st_ino):
            node.index = name
            node.nlink_delta = self._origins.nlink_delta(marks, found)

    # --- directories -----------------------------------------------------------------------------------

    def _new_dir(self, parent: Dir, name: bytes, found: AnyStat | None, marks: Marks, lower: LowerObject) -> Dir:
        """Make the node of a directory; `found` and `marks` are those in the upper, None and no marks without one."""
        numbers = []
        if lower.dirs and lower.stat is not None:
            numbers.append(self._origins.number(lower.dirs[0].layer, lower.stat, lower.marks))
        if found is not None and self._stack.upper is not None:
            numbers.append(self._origins.number(self._stack.upper, found, marks))
        in_upper = found is not None
        opaque = in_upper and not lower.dirs and marks.opaque
        node = Dir(self._nodes.free_number(*numbers), parent, name, in_upper, lower.dirs, opaque)
        node.redirect_denied = marks.redirect_denied or lower.redirect_denied
        self._nodes.add(node, parent, name, in_upper)
        return node

    # --- what only lower layers hold -------------------------------------------------------------------

    def bind_plain(self, parent: Dir, name: bytes) -> tuple[Node, AnyStat] | None:
        """Bind a file of one name and no marks that a kept listing knows of; None for all else.

        Most lookups end here, at half the cost. It finds what `bind_lower` would.
        """
        if parent.lower_names is None or parent.pending_uppers:
            return None
        indexes = parent.lower_names.get(name)
        if not indexes:
            return None
        layer, path = parent.lower[indexes[0]]
        found = layer.plain_file(path, name)
        if found is None or found.st_nlink > 1:
            return None
        key: Key = (found.st_dev, found.st_ino)
        if self._nodes.by_key(key) is not None:
            return None
        number = self._nodes.free_number(self._stack.number(layer.filesystem, found.st_ino))
        node = File(number, stat.S_IFREG, False, LowerFile(layer, path, name))
        node.single_link = True
        self._nodes.add_key(node, key)
        self._nodes.add(node, parent, name, False)
        return node, found

    def bind_lower(self, parent: Dir, name: bytes) -> tuple[Node, AnyStat | None] | None:
        """Bind a name to what the lower layers hold under it; None for nothing."""
        lower = self._search.find(parent, name)
        if lower.stat is None:
            return None
        if lower.dirs:
            return self._new_dir(parent, name, None, NO_MARKS, lower), lower.stat
        node = self._bind_lower_file(parent, name, lower, lower.stat)
        return node, None if node.in_upper else lower.stat

    def _bind_lower_file(self, parent: Dir, name: bytes, lower: LowerObject, found: AnyStat) -> File:
        place = lower.file
        assert place is not None
        key = (found.st_dev, found.st_ino)
        node = self._nodes.by_key(key) or self._bind_indexed(place, found, lower)
        if node is None:
            number = self._nodes.free_number(*self._origins.numbers(place.layer, found, lower.marks))
            node = File(number, stat.S_IFMT(found.st_mode), False, place)
            node.single_link = found.st_nlink == 1
            node.data = (lower.data or self._no_data()) if lower.marks.metacopy else None
            self._nodes.add_key(node, key)
        elif node.lower is None:
            node.lower = place
        self._nodes.add(node, parent, name, False)
        return node

    def _bind_indexed(self, place: LowerFile, found: AnyStat, lower: LowerObject) -> File | None:
        """Return the node of an upper file that has taken the place of a lower one with several names."""
        upper = self._stack.upper
        if found.st_nlink < 2 or upper is None or upper.work.index is None:
            return None
        came_from = place.layer.filesystem.origin(sysio.file_handle(place.layer.dirfd(place.path), place.name))
        if came_from is None:
            return None
        name = origin.index_name(came_from)
        try:
            entry = sysio.stat_at(upper.work.index, name)
        except FileNotFoundError:
            return None
        wanted = self._origins.number(place.layer, found, lower.marks)
        node = self._index_node(upper, place, name, entry, wanted)
        if node.data is not None:
            node.data = lower.data or self._no_data()
        self._nodes.add_key(node, (found.st_dev, found.st_ino))
        return node

    def _index_node(self, upper: Upper, place: LowerFile, name: bytes, entry: AnyStat, wanted: int) -> File:
        key = (entry.st_dev, entry.st_ino)
        node = self._nodes.by_key(key)
        if node is None:
            node = File(self._nodes.free_number(wanted), stat.S_IFMT(entry.st_mode), True, place)
            marks = upper.index_marks(name)
            node.index = name
            node.nlink_delta = self._origins.nlink_delta(marks, entry)
            if marks.metacopy:
                node.data = place
            self._nodes.add_key(node, key)
        return node
