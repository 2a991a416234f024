"""From a name to a node: what the layers hold under it, merged, and bound to a number."""

import errno
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from overlayfs.errors import oserror
from overlayfs.format import whiteout
from overlayfs.fs.binding import Binding
from overlayfs.fs.listings import Listings
from overlayfs.fs.nodes import ROOT_NUMBER, Dir, LowerDir, Node, NodeTable
from overlayfs.fs.origins import Origins
from overlayfs.fs.search import Search
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import Entry, join
from overlayfs.tree.stats import AnyStat
from overlayfs.union.merge import merge
from overlayfs.union.plans import NameState
from overlayfs.union.resolve import Kind

LONGEST_NAME = 255

_ABSENT = Entry(Kind.ABSENT)
_DIRS = (Kind.DIR, Kind.OPAQUE)

Found = tuple[Node, AnyStat | None]
"""A node, and the stat of its real object where the lookup has taken one: for a reply that follows at once."""


class Child(NamedTuple):
    """One entry of a directory that is being read; `offset` is where reading goes on after it.

    node: None for an entry that cannot be looked up; its name is listed, and a lookup of it gets the error. stat: as
    in `Found`.
    """

    name: bytes
    node: Node | None
    offset: int
    stat: AnyStat | None = None


class Lookup:
    """Lookups in one overlay."""

    def __init__(self, stack: Stack, nodes: NodeTable) -> None:
        self._stack = stack
        self._nodes = nodes
        self.listings = Listings(stack, nodes)
        self.origins = Origins(stack)
        self.root = self._make_root()
        self._search = Search(self.listings, self.root)
        self._binding = Binding(stack, nodes, self._search, self.origins)
        self._absent: tuple[Dir, bytes, int] | None = None  # the name last missed, and when its directory had changed

    def _make_root(self) -> Dir:
        dirs = []
        for layer in self._stack.lower:
            dirs.append(LowerDir(layer, b""))
            if layer.marks(b"", b"", layer.stat(b"", b"")).opaque:
                break
        upper = self._stack.upper
        opaque = upper is not None and upper.marks(b"", b"", upper.stat(b"", b"")).opaque
        root = Dir(ROOT_NUMBER, None, b"", upper is not None, () if opaque else tuple(dirs), opaque)
        self._nodes.add_root(root)
        return root

    # --- lookup ----------------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes) -> Node | None:
        """Return the node under a name, None for none; errors as `find`."""
        found = self.find(parent, name)
        return None if found is None else found[0]

    def find(self, parent: Node, name: bytes) -> Found | None:
        """Return the node under a name and perhaps its stat, None for none; OSError where a layer cannot be read.

        ENOTDIR where `parent` is no directory, ENAMETOOLONG for more than 255 bytes, EPERM where a redirect must not
        be followed.
        """
        if not isinstance(parent, Dir):
            raise oserror(errno.ENOTDIR)
        node = parent.children.get(name)
        if node is not None:
            return node, None
        # A name that is about to be made is looked up several times, first by the kernel; a listing answers till then.
        missed = (parent, name, parent.changed)
        if self._absent == missed:
            return None
        if len(name) > LONGEST_NAME:
            raise oserror(errno.ENAMETOOLONG, name)
        if parent.removed or name.startswith(whiteout.PREFIX):
            return None
        found = self._find(parent, name)
        listed = parent.lower_names is not None or not parent.lower
        self._absent = missed if found is None and listed else None
        return found

    def _find(self, parent: Dir, name: bytes) -> Found | None:
        if parent.redirect_denied:
            raise oserror(errno.EPERM, parent.name)
        upper = self._stack.upper
        if upper is not None and parent.in_upper and (parent.upper_names is None or name in parent.upper_names):
            entry = upper.probe(self._nodes.path(parent), name)
            if entry.kind is Kind.WHITEOUT:
                return None
            if entry.kind is not Kind.ABSENT:
                return self._binding.bind_upper(upper, parent, name, entry)
        return self._binding.bind_plain(parent, name) or self._binding.bind_lower(parent, name)

    def forget_missed(self) -> None:
        """Look up the name last missed again: it is about to be made, and may be there even if that fails."""
        self._absent = None

    # --- facts -----------------------------------------------------------------------------------------

    def upper_entry(self, parent: Dir, name: bytes) -> Entry:
        """Return what the upper holds under a name."""
        if self._stack.upper is None or not parent.in_upper:
            return _ABSENT
        if parent.upper_names is not None and name not in parent.upper_names:
            return _ABSENT
        return self._stack.upper.probe(self._nodes.path(parent), name)

    def is_in_lower(self, parent: Dir, name: bytes) -> bool:
        """Return whether a name would be visible if the upper held nothing there."""
        return bool(parent.lower) and self._search.find(parent, name).found

    def lower_names(self, parent: Dir, name: bytes) -> set[bytes]:
        """Return the names in the directory that would be visible if the upper held nothing there."""
        dirs = self._search.find(parent, name).dirs
        return set(merge(part.layer.names(part.path) for part in dirs))

    def name_state(self, parent: Dir, name: bytes, node: Node | None) -> NameState:
        """Return what `union.plans` needs to know of a name and the node that it shows, None for nothing."""
        entry = self.upper_entry(parent, name)
        whited_out = entry.kind is Kind.WHITEOUT and entry.stat is not None
        # Where the upper holds nothing, what is shown is what the lower layers hold: no need to search them again.
        in_lower = node is not None if entry.kind is Kind.ABSENT else self.is_in_lower(parent, name)
        if not isinstance(node, Dir):
            return NameState(entry.kind is Kind.FILE, whited_out, in_lower)
        in_upper = entry.kind in _DIRS
        clean = not in_upper or not self.listings.upper(node)
        return NameState(in_upper, whited_out, in_lower, True, bool(node.lower), node.opaque, clean)

    def lower_path(self, parent: Dir | None, name: bytes) -> bytes:
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
        upper, found = self._stack.upper, self.upper_entry(parent, name).stat
        return None if upper is None or found is None else upper.marks(self._nodes.path(parent), name, found).redirect

    # --- listings --------------------------------------------------------------------------------------

    def listing(self, node: Dir) -> list[bytes]:
        """Return the names in a merged directory, upper names first. A lookup may still fail for one of them."""
        if node.removed:
            return []
        if node.redirect_denied:
            raise oserror(errno.EPERM, node.name)
        return self.listings.names(node)

    def is_empty(self, node: Dir) -> bool:
        """Return whether nothing is visible in a directory."""
        return not any(self.find(node, name) is not None for name in self.listing(node))

    def children(self, directory: Dir, names: Iterable[tuple[bytes | None, int]]) -> Iterator[Child]:
        """Yield what is visible now under names, which come with the offsets after them; None is a gap."""
        for name, offset in names:
            if name is None:
                continue
            try:
                found = self.find(directory, name)
            except OSError:  # one damaged entry must not hide all its neighbours
                yield Child(name, None, offset)
                continue
            if found is not None:
                yield Child(name, found[0], offset, found[1])
