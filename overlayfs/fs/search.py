"""From a name to what the lower layers hold of it: the walk from layer to layer.

Which entries count is decided by `overlayfs.union.resolve`; here is where each layer is asked, and under which name. It
follows the kernel's ovl_lookup (fs/overlayfs/namei.c): a redirect in one layer changes the name that is looked for in
those below, and an absolute one starts again at the roots of those below.
"""

from collections.abc import Sequence
from typing import NamedTuple

from overlayfs.fs.listings import Listings
from overlayfs.fs.nodes import Dir, LowerDir, LowerFile
from overlayfs.tree.layer import NO_MARKS, Entry, Layer, Marks, join
from overlayfs.tree.stats import AnyStat
from overlayfs.union.resolve import Kind, Resolution

_DIRS = (Kind.DIR, Kind.OPAQUE)
_ABSENT = Entry(Kind.ABSENT)


class LowerObject(NamedTuple):
    """What the lower layers hold under a name: directories to merge, or a file, and where the data of the file is.

    `stat` and `marks` are those of the topmost entry.
    """

    dirs: tuple[LowerDir, ...] = ()
    file: LowerFile | None = None
    stat: AnyStat | None = None
    marks: Marks = NO_MARKS
    redirect_denied: bool = False
    data: LowerFile | None = None

    @property
    def found(self) -> bool:
        return bool(self.dirs) or self.file is not None


NOTHING = LowerObject()


class _Hit(NamedTuple):
    """What one layer holds for the wanted name, where, and the name to look for in the layers below.

    stop: a directory on the way hides what is below.
    """

    path: bytes
    name: bytes
    entry: Entry
    wanted: bytes
    stop: bool


class Search:
    """Searches the lower layers of one overlay."""

    def __init__(self, listings: Listings, root: Dir) -> None:
        self._listings = listings
        self._root = root

    def find(self, parent: Dir, wanted: bytes, data_only: bool = False) -> LowerObject:
        """Return what the lower layers hold under `wanted`, a name in `parent` or an absolute path.

        data_only: it is the data of a metadata-only copy in the upper, so a directory ends the search.
        """
        if wanted.startswith(b"/"):
            return self._walk(self._root.lower, self._root.lower, wanted, data_only)
        if not parent.lower:
            return NOTHING
        listing = self._listings.lower(parent, only_if_cheap=True)
        if listing is None:
            return self._walk(parent.lower, parent.lower, wanted, data_only)
        indexes = listing.get(wanted, ())
        if not indexes:
            return NOTHING
        return self._walk([parent.lower[index] for index in indexes], parent.lower, wanted, data_only)

    def _walk(
        self, queue: Sequence[LowerDir], siblings: Sequence[LowerDir], wanted: bytes, data_only: bool
    ) -> LowerObject:
        return _Walk(queue, siblings, self._root.lower, wanted, data_only).run()


class _Walk:
    """One search, from layer to layer.

    queue: the directories to look in, those that are known not to hold the name left out. siblings: all directories of
    that merged directory, for the layers below one that changes the name or leaves its data further down.
    """

    def __init__(
        self,
        queue: Sequence[LowerDir],
        siblings: Sequence[LowerDir],
        root_dirs: Sequence[LowerDir],
        wanted: bytes,
        data_only: bool,
    ) -> None:
        self._queue = queue
        self._siblings = siblings
        self._root_dirs = root_dirs
        self._wanted = wanted
        self._resolution = Resolution(metacopy_above=data_only)
        self._dirs: list[LowerDir] = []
        self._file: LowerFile | None = None
        self._data: LowerFile | None = None
        self._stat: AnyStat | None = None
        self._marks = NO_MARKS
        self._redirect_denied = False
        self._goes_for_data = False  # the last hit is a metadata-only copy
        self._names_its_data = False  # and says where its data is: an opaque directory on the way does not hide that

    def run(self) -> LowerObject:
        position = 0
        while position < len(self._queue):
            part = self._queue[position]
            position += 1
            hit = _look(part, self._wanted)
            wanted = self._visit(part.layer, hit)
            if wanted is None or (hit.stop and not self._names_its_data):
                break
            if wanted != self._wanted or self._goes_for_data:
                self._wanted = wanted
                dirs = self._root_dirs if wanted.startswith(b"/") else self._siblings
                self._queue, position = [each for each in dirs if each.layer.index > part.layer.index], 0
        return LowerObject(tuple(self._dirs), self._file, self._stat, self._marks, self._redirect_denied, self._data)

    def _visit(self, layer: Layer, hit: _Hit) -> bytes | None:
        """Take what one layer holds; return the name to look for in the layers below, None to stop."""
        self._goes_for_data = self._names_its_data = False
        kind, found = hit.entry
        if kind is Kind.ABSENT:
            return hit.wanted
        if found is None or not self._resolution.admits(kind):
            return None
        marks = layer.marks(hit.path, hit.name, found)
        if self._stat is None:
            self._stat, self._marks = found, marks
        if kind is Kind.FILE:
            return self._add_file(LowerFile(layer, hit.path, hit.name), marks, hit.wanted)
        self._dirs.append(LowerDir(layer, join(hit.path, hit.name)))
        if marks.redirect_denied:
            self._redirect_denied = True
            return None
        if not self._resolution.add(Kind.OPAQUE if marks.opaque else kind):
            return None
        if marks.redirect is not None and hit.wanted.startswith(b"/"):
            return _redirected(hit.path, marks.redirect)
        return marks.redirect or hit.wanted

    def _add_file(self, place: LowerFile, marks: Marks, wanted: bytes) -> bytes | None:
        self._file = self._file or place
        if not self._resolution.add(Kind.FILE, marks.metacopy):
            self._data = place
            return None
        self._goes_for_data = True
        self._names_its_data = marks.redirect is not None
        return marks.redirect or wanted


def _look(part: LowerDir, wanted: bytes) -> _Hit:
    """Return what one layer holds for `wanted`: a name in `part`, or an absolute path."""
    if not wanted.startswith(b"/"):
        return _Hit(part.path, wanted, part.layer.probe(part.path, wanted), wanted, False)
    return _look_up_path(part.layer, wanted)


def _look_up_path(layer: Layer, wanted: bytes) -> _Hit:
    *leading, last = wanted.strip(b"/").split(b"/")
    path, stop, onward = b"", False, wanted
    for position, name in enumerate(leading):
        entry = layer.probe(path, name)
        if entry.kind is Kind.ABSENT or entry.stat is None or entry.kind not in _DIRS:
            return _Hit(path, name, _ABSENT, onward, stop or entry.kind is not Kind.ABSENT)
        marks = layer.marks(path, name, entry.stat)
        stop = stop or marks.opaque
        if marks.redirect is not None:
            rest = b"/".join([*leading[position + 1 :], last])
            onward = _redirected(b"/".join(leading[:position]), marks.redirect) + b"/" + rest
        path = join(path, name)
    return _Hit(path, last, layer.probe(path, last), onward, stop)


def _redirected(parent: bytes, redirect: bytes) -> bytes:
    """Return the absolute path that a redirect names, `parent` being the path of the directory it is in."""
    if redirect.startswith(b"/"):
        return redirect
    return b"/" + (parent + b"/" if parent else b"") + redirect
