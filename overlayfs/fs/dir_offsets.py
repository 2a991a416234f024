"""Reading directories without handles: positions that stay true while names come and go.

Where the kernel opens no directories (FUSE_NO_OPENDIR_SUPPORT) a listing is asked for by node and position. Each
name gets a position when it is first seen and keeps it; a name that has gone leaves a gap. So a reader that comes
back misses nothing and sees nothing twice, also while `rm -r` empties the directory under it (POSIX, readdir()).
"""

import errno
from collections import OrderedDict
from collections.abc import Iterator

from overlayfs.errors import oserror
from overlayfs.fs.lookup import Child, Lookup
from overlayfs.fs.nodes import Dir, Node

_KEPT_NAMES = 500_000
_GAPS = 1000  # a listing with more gaps than this, and more gaps than names, is renumbered


class _Listing:
    """The names of one directory in the order of their positions; `base` is the position before the first."""

    __slots__ = ("base", "known", "names")

    def __init__(self, base: int) -> None:
        self.base = base
        self.names: list[bytes | None] = []
        self.known: dict[bytes, int] = {}

    def update(self, current: list[bytes]) -> None:
        """Bring the names up to date: gaps for those that have gone, new ones at the end."""
        for name in self.known.keys() - set(current):
            self.names[self.known.pop(name)] = None
        for name in current:
            if name not in self.known:
                self.known[name] = len(self.names)
                self.names.append(name)

    @property
    def end(self) -> int:
        """The last position."""
        return self.base + len(self.names)

    @property
    def is_worn(self) -> bool:
        """Whether it is mostly gaps."""
        gaps = len(self.names) - len(self.known)
        return gaps > _GAPS and gaps > len(self.known)


class DirOffsets:
    """The listings that are being read, the most recent ones first to stay."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._kept: OrderedDict[Dir, _Listing] = OrderedDict()
        self._names = 0
        self._floor = 0  # no dropped listing had a position beyond this one

    def read(self, node: Node, position: int) -> Iterator[Child]:
        """Return entries from a position on, without `.` and `..`; position 0 lists the directory again."""
        if not isinstance(node, Dir):
            raise oserror(errno.ENOTDIR)
        listing = self._listing(node, refresh=position == 0)
        # A reader from before a listing was renumbered sees all of it: a name twice is better than a name missed.
        first = max(position - listing.base, 0)
        names = ((listing.names[at], listing.base + at + 1) for at in range(first, len(listing.names)))
        return self._lookup.children(node, names)

    def drop(self, node: Dir) -> None:
        """Drop the listing of a directory whose node has left the table."""
        listing = self._kept.pop(node, None)
        if listing is not None:
            self._names -= len(listing.names)

    def _listing(self, node: Dir, refresh: bool) -> _Listing:
        listing = self._kept.pop(node, None)
        if listing is not None:
            self._names -= len(listing.names)
        if refresh or listing is None:
            listing = self._updated(node, listing)
        self._kept[node] = listing
        self._names += len(listing.names)
        self._shrink()
        return listing

    def _updated(self, node: Dir, listing: _Listing | None) -> _Listing:
        if listing is None or listing.is_worn:
            listing = _Listing(self._floor if listing is None else listing.end)
        listing.update(self._lookup.listing(node))
        return listing

    def _shrink(self) -> None:
        while self._names > _KEPT_NAMES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._names -= len(oldest.names)
            self._floor = max(self._floor, oldest.end)
