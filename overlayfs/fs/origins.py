"""Origin marks and link counts: what says which number a node has, and how many names, across copy-up and remount.

The marks are the kernel's: `origin` names the lower object by file handle, `nlink` holds the union's link count
relative to the upper's or the lower file's (fs/overlayfs/copy_up.c, inode.c).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from overlayfs import sysio
from overlayfs.format import nlink
from overlayfs.format.origin import Origin
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import NO_MARKS, Layer, Marks
from overlayfs.tree.stats import AnyStat


class Origins:
    """Follows the origin marks of one stack."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def number(self, layer: Layer, found: AnyStat, marks: Marks) -> int:
        """Return the inode number that an object had before it was copied up, else its own."""
        came_from = self.lasting(marks)
        number = self._stack.origin_number(came_from) if came_from is not None else None
        return number if number is not None else self._stack.number(layer.filesystem, found.st_ino)

    def numbers(self, layer: Layer, found: AnyStat, marks: Marks) -> tuple[int, ...]:
        """Return the inode numbers that a file may get, the preferred one first."""
        own = self._stack.number(layer.filesystem, found.st_ino)
        return (own,) if marks.origin is None else (self.number(layer, found, marks), own)

    def lasting(self, marks: Marks) -> Origin | None:
        """Return the origin that an object keeps when it is neither indexed nor metadata only any more."""
        if marks.origin is not None and (marks.metacopy or marks.nlink is not None):
            return self._first(marks.origin)
        return marks.origin

    def _first(self, came_from: Origin) -> Origin:
        """Return the first origin of the chain that goes on from the object that `came_from` names.

        In the index and for metadata-only copies the kernel wants the origin to be the next lower object, which may
        be such a copy of a former upper itself; elsewhere copy-up hands the first origin on.
        """
        for _ in self._stack.lower:  # one link of the chain for each layer, at most
            marks = self._marks_of(came_from)
            came_from = marks.origin or came_from
            if marks.origin is None or not (marks.metacopy or marks.nlink is not None):
                break
        return came_from

    def _marks_of(self, came_from: Origin) -> Marks:
        with self._opened(came_from) as fd:
            return NO_MARKS if fd is None else self._stack.lower[0].marks_at(fd, b"")

    @contextmanager
    def _opened(self, came_from: Origin) -> Iterator[int | None]:
        """Give a descriptor of the object that an origin names; None when it is gone or may not be opened."""
        roots = (layer.root for layer in self._stack.lower if layer.filesystem.uuid == came_from.uuid)
        tries = (sysio.open_by_handle(root, came_from.fid_type, came_from.fid) for root in roots)
        fd = next((found for found in tries if found is not None), None)
        try:
            yield fd
        finally:
            if fd is not None:
                sysio.close(fd)

    def nlink_delta(self, marks: Marks, found: AnyStat) -> int:
        """Return the union's link count of an indexed file minus that of the upper file itself."""
        decoded = nlink.decode(marks.nlink) if marks.nlink is not None else None
        if decoded is None:
            return -1  # the entry of the index itself
        base, delta = decoded
        if base == "U":
            return delta
        lower = self._lower_nlink(marks.origin)
        return lower + delta - found.st_nlink if lower is not None else -1

    def _lower_nlink(self, came_from: Origin | None) -> int | None:
        if came_from is None:
            return None
        with self._opened(came_from) as fd:
            return None if fd is None else sysio.stat_at(fd, b"").st_nlink
