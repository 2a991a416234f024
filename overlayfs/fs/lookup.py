"""From a name to a node: what the layers hold, merged, and bound to a number.

The walk through lower layers follows the kernel's ovl_lookup (fs/overlayfs/namei.c): a redirect met in one layer
changes the name that is looked for in those below, and an absolute one starts again at the roots of those below.
"""

import errno
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import nlink, origin, whiteout
from overlayfs.format.origin import Origin
from overlayfs.fs.nodes import ROOT_NUMBER, Dir, File, LowerDir, LowerFile, Node, NodeTable
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import NO_MARKS, Entry, Layer, Marks, join
from overlayfs.tree.stats import AnyStat
from overlayfs.union.merge import fold, merge
from overlayfs.union.plans import NameState
from overlayfs.union.resolve import Kind

LONGEST_NAME = 255
_HUGE = 2 << 20  # bytes of directory data above which names are probed one by one until somebody lists
_KEPT_NAMES = 500_000

_DIRS = (Kind.DIR, Kind.OPAQUE)
_ABSENT = Entry(Kind.ABSENT)


class _Hit(NamedTuple):
    """What one lower layer has for the name looked for, where, and how the walk goes on."""

    path: bytes
    name: bytes
    entry: Entry
    wanted: bytes
    stop: bool


class _Below(NamedTuple):
    """What the lower layers make of a name: parts of a directory, or a file, and where that file's data lies."""

    parts: tuple[LowerDir, ...] = ()
    file: LowerFile | None = None
    stat: AnyStat | None = None
    marks: Marks = NO_MARKS
    redirect_denied: bool = False
    data: LowerFile | None = None

    @property
    def found(self) -> bool:
        return bool(self.parts) or self.file is not None


NOTHING_BELOW = _Below()


class Lookup:
    """Look-ups in one stack, with the listings that are kept."""

    def __init__(self, stack: Stack, nodes: NodeTable) -> None:
        self._stack = stack
        self._nodes = nodes
        self._kept: OrderedDict[int, tuple[Dir, int]] = OrderedDict()
        self._kept_names = 0
        self.fresh: tuple[Node, AnyStat] | None = None  # the stat taken while binding, for the reply that follows
        self._absent: tuple[Dir, bytes, int] | None = None  # the name last missed, and when its directory had changed
        self.root = self._make_root()

    def _make_root(self) -> Dir:
        parts = []
        for layer in self._stack.lower:
            parts.append(LowerDir(layer, b""))
            if layer.marks(b"", b"", layer.stat(b"", b"")).opaque:
                break
        upper = self._stack.upper
        cut = upper is not None and upper.marks(b"", b"", upper.stat(b"", b"")).opaque
        root = Dir(ROOT_NUMBER, None, b"", upper is not None, () if cut else tuple(parts), cut)
        self._nodes.add(root)
        return root

    # --- paths -----------------------------------------------------------------------------------------

    def path(self, node: Dir) -> bytes:
        """Return the path of a directory in the overlay, which is also its path in the upper."""
        epoch, path = node.path_cache
        return path if epoch == self._nodes.epoch else self._find_path(node)

    def _find_path(self, node: Dir) -> bytes:
        # Not recursive: a tree may be deeper than the interpreter's stack.
        unknown = []
        walk: Dir | None = node
        while walk is not None and walk.path_cache[0] != self._nodes.epoch:
            unknown.append(walk)
            walk = walk.parent
        path = walk.path_cache[1] if walk is not None else b""
        for each in reversed(unknown):
            path = join(path, each.name)
            each.path_cache = (self._nodes.epoch, path)
        return path

    # --- look-up ---------------------------------------------------------------------------------------

    def lookup(self, parent: Dir, name: bytes) -> Node | None:
        """Return the node that a name shows, None for none; OSError where a layer cannot be read.

        ENAMETOOLONG for more than 255 bytes, EPERM where a redirect must not be followed.
        """
        node = parent.children.get(name)
        if node is not None:
            return node
        # Who makes a name asks for it several times over, the kernel first; what a kept listing says holds till then.
        missed = (parent, name, parent.changed)
        if self._absent != missed:
            node = self._find(parent, name)
            listed = parent.below is not None or not parent.lower
            self._absent = missed if node is None and listed else None
        return node

    def forget_missed(self) -> None:
        """Look again for the name last missed: it is about to appear, and may have done so even if that fails."""
        self._absent = None

    def _find(self, parent: Dir, name: bytes) -> Node | None:
        if len(name) > LONGEST_NAME:
            raise oserror(errno.ENAMETOOLONG, name)
        if parent.removed or whiteout.is_reserved(name):
            return None
        self._require_readable(parent)
        entry = self.upper_entry(parent, name)
        if entry.kind is Kind.WHITEOUT:
            return None
        if entry.kind is Kind.ABSENT:
            return self._bind_below(parent, name)
        return self._bind_upper(parent, name, entry)

    @staticmethod
    def _require_readable(parent: Dir) -> None:
        if parent.redirect_denied:
            raise oserror(errno.EPERM, parent.name)

    def upper_entry(self, parent: Dir, name: bytes) -> Entry:
        """Return what the upper holds under a name."""
        if self._stack.upper is None or not parent.in_upper:
            return _ABSENT
        if parent.upper_names is not None and name not in parent.upper_names:
            return _ABSENT
        return self._stack.upper.probe(self.path(parent), name)

    def below(self, parent: Dir, name: bytes) -> bool:
        """Return whether a name would be visible if the upper held nothing there."""
        return bool(parent.lower) and self._search(parent, name, name).found

    def names_below(self, parent: Dir, name: bytes) -> set[bytes]:
        """Return the names in the directory that would be visible if the upper held nothing there."""
        parts = self._search(parent, name, name).parts
        return set(merge(part.layer.names(part.path) for part in parts))

    # --- lower layers ----------------------------------------------------------------------------------

    def _search(self, parent: Dir, name: bytes, wanted: bytes, data_only: bool = False) -> _Below:
        """Return what the lower layers make of `wanted`, seen from `parent`; `name` is its plain name.

        data_only: a metadata-only file lies above, so a directory ends the search.
        """
        if wanted.startswith(b"/"):
            return self._descend(self.root.lower, wanted, data_only)
        if not parent.lower:
            return NOTHING_BELOW
        indexes = self._indexes(parent, wanted)
        if indexes is None and len(parent.lower) == 1:
            indexes = (0,)
        if indexes is None:
            return self._descend(parent.lower, wanted, data_only)
        return self._descend_known(parent.lower, indexes, wanted, data_only)

    def _indexes(self, parent: Dir, name: bytes) -> tuple[int, ...] | None:
        listing = self._lower_listing(parent, only_if_cheap=True)
        return None if listing is None else listing.get(name, ())

    def _descend_known(
        self, parts: Sequence[LowerDir], indexes: tuple[int, ...], wanted: bytes, data_only: bool
    ) -> _Below:
        if not indexes:
            return NOTHING_BELOW
        # A file may be metadata only and have its data further down, so all layers below it count.
        first = parts[indexes[0]]
        entry = first.layer.probe(first.path, wanted)
        if entry.kind is Kind.FILE:
            return self._complete_file(first, wanted, entry) or self._descend(parts[indexes[0] :], wanted, data_only)
        return self._descend([parts[i] for i in indexes], wanted, data_only, parts)

    @staticmethod
    def _complete_file(part: LowerDir, name: bytes, entry: Entry) -> _Below | None:
        """Return what a file in the first layer that holds a name makes of it, None if its data lies further down.

        That is what a walk would find, for the case that most look-ups are.
        """
        assert entry.stat is not None
        marks = part.layer.marks(part.path, name, entry.stat)
        if marks.metacopy:
            return None
        place = LowerFile(part.layer, part.path, name)
        return _Below(file=place, stat=entry.stat, marks=marks, data=place)

    def _descend(
        self, parts: Sequence[LowerDir], wanted: bytes, data_only: bool, all_parts: Sequence[LowerDir] | None = None
    ) -> _Below:
        walk = _Walk(self, list(parts), list(all_parts or parts), wanted, data_only)
        return walk.run()

    def step(self, part: LowerDir, wanted: bytes) -> _Hit:
        """Return what one layer has for `wanted`: a name in `part`, or an absolute path."""
        if not wanted.startswith(b"/"):
            return _Hit(part.path, wanted, part.layer.probe(part.path, wanted), wanted, False)
        return self._step_path(part.layer, wanted)

    @staticmethod
    def _step_path(layer: Layer, wanted: bytes) -> _Hit:
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

    # --- binding ---------------------------------------------------------------------------------------

    def _bind_below(self, parent: Dir, name: bytes) -> Node | None:
        plain = self._bind_plain(parent, name)
        if plain is not None:
            return plain
        below = self._search(parent, name, name)
        if below.stat is None:
            return None
        if below.parts:
            return self._new_dir(parent, name, None, NO_MARKS, below)
        return self._bind_lower_file(parent, name, below, below.stat)

    def _bind_upper(self, parent: Dir, name: bytes, entry: Entry) -> Node:
        upper, found = self._stack.upper, entry.stat
        assert upper is not None and found is not None
        marks = upper.marks(self.path(parent), name, found)
        if not stat.S_ISDIR(found.st_mode):
            return self._bind_upper_file(parent, name, found, marks)
        below = NOTHING_BELOW
        if not marks.opaque and entry.kind is not Kind.OPAQUE and (parent.lower or marks.redirect):
            below = self._search(parent, name, marks.redirect or name)
        return self._new_dir(parent, name, found, marks, below)

    def _new_dir(self, parent: Dir, name: bytes, found: AnyStat | None, marks: Marks, below: _Below) -> Dir:
        opaque = found is not None and not below.parts and marks.opaque
        numbers = self._dir_numbers(found, marks, below)
        node = Dir(self._nodes.free_number(*numbers), parent, name, found is not None, below.parts, opaque)
        node.redirect_denied = marks.redirect_denied or below.redirect_denied
        self._settle(node, parent, name, found is not None, found or below.stat)
        return node

    def _dir_numbers(self, found: AnyStat | None, marks: Marks, below: _Below) -> list[int]:
        numbers = []
        if below.parts and below.stat is not None:
            numbers.append(self._number(below.parts[0].layer, below.stat, below.marks))
        if found is not None and self._stack.upper is not None:
            numbers.append(self._number(self._stack.upper, found, marks))
        return numbers

    def _numbers_of_file(self, layer: Layer, found: AnyStat, marks: Marks) -> tuple[int, ...]:
        own = self._stack.number(layer.filesystem, found.st_ino)
        return (own,) if marks.origin is None else (self._number(layer, found, marks), own)

    def _number(self, layer: Layer, found: AnyStat, marks: Marks) -> int:
        came_from = self.lasting_origin(marks)
        number = self._stack.origin_number(came_from) if came_from is not None else None
        return number if number is not None else self._stack.number(layer.filesystem, found.st_ino)

    def lasting_origin(self, marks: Marks) -> Origin | None:
        """Return the origin that an object keeps when it is neither indexed nor metadata only any more."""
        if marks.origin is not None and (marks.metacopy or marks.nlink is not None):
            return self._first_origin(marks.origin)
        return marks.origin

    def _first_origin(self, came_from: Origin) -> Origin:
        """Return where the chain of origins begins that goes on from the object that `came_from` names.

        In the index and for metadata-only copies the kernel wants the origin to be the object right below, which may
        be such a copy of a former upper itself; elsewhere copy-up hands the first origin on.
        """
        for _ in self._stack.lower:  # one link of the chain for each layer, at most
            marks = self._marks_of(came_from)
            came_from = marks.origin or came_from
            if marks.origin is None or not (marks.metacopy or marks.nlink is not None):
                break
        return came_from

    def _marks_of(self, came_from: Origin) -> Marks:
        with self._by_origin(came_from) as fd:
            return NO_MARKS if fd is None else self._stack.lower[0].marks_at(fd, b"")

    @contextmanager
    def _by_origin(self, came_from: Origin) -> Iterator[int | None]:
        """Give a descriptor of the object that an origin names; None where it cannot be had (no privilege, gone)."""
        roots = (layer.root for layer in self._stack.lower if layer.filesystem.uuid == came_from.uuid)
        tries = (sysio.open_by_handle(root, came_from.fid_type, came_from.fid) for root in roots)
        fd = next((found for found in tries if found is not None), None)
        try:
            yield fd
        finally:
            if fd is not None:
                sysio.close(fd)

    def _bind_upper_file(self, parent: Dir, name: bytes, found: AnyStat, marks: Marks) -> File:
        key = (found.st_dev, found.st_ino)
        node = self._nodes.by_key(key)
        if node is None:
            node = self._new_upper_file(parent, name, found, marks)
            self._nodes.add_key(node, key)  # last: a node that an error left half made must not be found again
        self._settle(node, parent, name, True, found)
        return node

    def _new_upper_file(self, parent: Dir, name: bytes, found: AnyStat, marks: Marks) -> File:
        upper = self._stack.upper
        assert upper is not None
        number = self._nodes.free_number(*self._numbers_of_file(upper, found, marks))
        node = File(number, stat.S_IFMT(found.st_mode), True, None)
        self._find_index(node, found, marks)
        if marks.metacopy:
            node.data = self._data_below(parent, name, marks)
        return node

    def _data_below(self, parent: Dir, name: bytes, marks: Marks) -> LowerFile:
        return self._search(parent, name, marks.redirect or name, data_only=True).data or self._no_data()

    def _no_data(self) -> LowerFile:
        # A metadata-only file whose data is missing stays visible, and opening it is EIO: a directory cannot be read.
        return LowerFile(self._stack.lower[-1], b"", b"")

    def _find_index(self, node: File, found: AnyStat, marks: Marks) -> None:
        # An upper file with an entry in the index carries a link count; without one its own count is right.
        upper = self._stack.upper
        if upper is None or upper.work.index is None or marks.origin is None or marks.nlink is None:
            return
        name = origin.index_name(marks.origin)
        try:
            entry = sysio.stat_at(upper.work.index, name)
        except FileNotFoundError:
            return
        if (entry.st_dev, entry.st_ino) == (found.st_dev, found.st_ino):
            node.index = name
            node.nlink_delta = self.nlink_delta(marks, found)

    def nlink_delta(self, marks: Marks, found: AnyStat) -> int:
        """Return what the union's link count of an indexed file is beyond that of the upper file itself."""
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
        with self._by_origin(came_from) as fd:
            return None if fd is None else sysio.stat_at(fd, b"").st_nlink

    def _bind_plain(self, parent: Dir, name: bytes) -> File | None:
        """Bind a file of one name and no marks where the listing says that it lies; None for all else.

        Most look-ups end here, at half the cost; it finds what `_search` and `_bind_lower_file` would.
        """
        known = None if parent.sealed or parent.below is None else parent.below.get(name)
        if known is None:
            return None
        place = LowerFile(*parent.lower[known[0]], name)
        found = place.layer.plain_file(place.path, name)
        if found is None or found.st_nlink > 1 or self._nodes.by_key((found.st_dev, found.st_ino)) is not None:
            return None
        number = self._nodes.free_number(self._stack.number(place.layer.filesystem, found.st_ino))
        node = File(number, stat.S_IFREG, False, place)
        node.single_link = True
        self._nodes.add_key(node, (found.st_dev, found.st_ino))
        self._settle(node, parent, name, False, found)
        return node

    def _bind_lower_file(self, parent: Dir, name: bytes, below: _Below, found: AnyStat) -> File:
        place = below.file
        assert place is not None
        key = (found.st_dev, found.st_ino)
        node = self._nodes.by_key(key) or self._bind_indexed(place, found, below)
        if node is None:
            number = self._nodes.free_number(*self._numbers_of_file(place.layer, found, below.marks))
            node = File(number, stat.S_IFMT(found.st_mode), False, place)
            node.single_link = found.st_nlink == 1
            node.data = (below.data or self._no_data()) if below.marks.metacopy else None
            self._nodes.add_key(node, key)
        elif node.lower is None:
            node.lower = place
        self._settle(node, parent, name, False, None if node.in_upper else found)
        return node

    def _bind_indexed(self, place: LowerFile, found: AnyStat, below: _Below) -> File | None:
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
        node = self._index_node(place, name, entry, self._number(place.layer, found, below.marks))
        if node.data is not None:
            node.data = below.data or self._no_data()
        self._nodes.add_key(node, (found.st_dev, found.st_ino))
        return node

    def _index_node(self, place: LowerFile, name: bytes, entry: AnyStat, wanted: int) -> File:
        upper = self._stack.upper
        assert upper is not None and upper.work.index is not None
        node = self._nodes.by_key((entry.st_dev, entry.st_ino))
        if node is None:
            node = File(self._nodes.free_number(wanted), stat.S_IFMT(entry.st_mode), True, place)
            marks = upper.index_marks(name)
            node.index = name
            node.nlink_delta = self.nlink_delta(marks, entry)
            if marks.metacopy:
                node.data = place
            self._nodes.add_key(node, (entry.st_dev, entry.st_ino))
        return node

    def _settle(self, node: Node, parent: Dir, name: bytes, in_upper: bool, found: AnyStat | None) -> None:
        # A name first: what has none is dropped as soon as it rests.
        self._nodes.attach(node, parent, name, in_upper)
        self._nodes.add(node)
        self.fresh = (node, found) if found is not None else None

    # --- facts for plans -------------------------------------------------------------------------------

    def name_state(self, parent: Dir, name: bytes, node: Node | None) -> NameState:
        """Return what `union.plans` wants to know of a name and the node that it shows, None for nothing."""
        entry = self.upper_entry(parent, name)
        occupied = entry.kind is Kind.WHITEOUT and entry.stat is not None
        # Where the upper holds nothing, what is shown is what lies below: no need to search the layers again.
        below = node is not None if entry.kind is Kind.ABSENT else self.below(parent, name)
        if not isinstance(node, Dir):
            return NameState(entry.kind is Kind.FILE, occupied, below)
        in_upper = entry.kind in _DIRS
        clean = not in_upper or not self._upper_listing(node)
        return NameState(in_upper, occupied, below, True, bool(node.lower), node.opaque, clean)

    # --- listings --------------------------------------------------------------------------------------

    def listing(self, node: Dir) -> list[bytes]:
        """Return the names in a merged directory, upper names first. A look-up may still refuse one of them."""
        if node.removed:
            return []
        self._require_readable(node)
        upper = self._upper_listing(node)
        lower = self._lower_listing(node, only_if_cheap=False) or {}
        names = [name for name, kind in upper.items() if kind is not Kind.WHITEOUT]
        names += [name for name in lower if name not in upper]
        return names

    def is_empty(self, node: Dir) -> bool:
        """Return whether nothing is visible in a directory."""
        return not any(self.lookup(node, name) is not None for name in self.listing(node))

    def _upper_listing(self, node: Dir) -> dict[bytes, Kind]:
        if self._stack.upper is None or not node.in_upper or node.removed:
            return {}
        if node.upper_names is None:
            node.upper_names = self._stack.upper.names(self.path(node))
            self._keep(node)
        return node.upper_names

    def _lower_listing(self, node: Dir, only_if_cheap: bool) -> dict[bytes, tuple[int, ...]] | None:
        if node.sealed:
            self._unseal(node)
        if node.below is None and (not only_if_cheap or self._is_worth_listing(node)):
            node.below = merge(part.layer.names(part.path) for part in node.lower)
            self._keep(node)
        return node.below

    def _unseal(self, node: Dir) -> None:
        """Merge what former uppers hold into the listing of what lies below them."""
        for listing in reversed(node.sealed):
            if node.below is not None:
                node.below = fold(listing, node.below)
        node.sealed = ()
        self._keep(node)

    def _is_worth_listing(self, node: Dir) -> bool:
        # One part: a probe costs one stat, as a listing's entry would. Huge: see _HUGE.
        if len(node.lower) < 2:
            return False
        return sum(part.layer.stat(part.path, b"").st_size for part in node.lower) < _HUGE

    def drop(self, node: Dir) -> None:
        """Count no names of a directory whose node has left the table."""
        kept, size = self._kept.get(node.number, (None, 0))
        if kept is node:
            del self._kept[node.number]
            self._kept_names -= size

    def _keep(self, node: Dir) -> None:
        size = len(node.below or ()) + len(node.upper_names or ())
        _, before = self._kept.pop(node.number, (node, 0))
        self._kept[node.number] = (node, size)
        self._kept_names += size - before
        while self._kept_names > _KEPT_NAMES and len(self._kept) > 1:
            _, (oldest, count) = self._kept.popitem(last=False)
            oldest.below = oldest.upper_names = None
            oldest.sealed = ()
            self._kept_names -= count


def _redirected(parent: bytes, redirect: bytes) -> bytes:
    """Return the absolute path that a redirect names, `parent` being the path of the directory it lies in."""
    if redirect.startswith(b"/"):
        return redirect
    return b"/" + (parent + b"/" if parent else b"") + redirect


class _Walk:
    """One search through lower layers, top to bottom."""

    def __init__(
        self, lookup: Lookup, queue: list[LowerDir], parts: list[LowerDir], wanted: bytes, data_only: bool
    ) -> None:
        self._lookup = lookup
        self._queue = queue
        self._parts = parts  # where to go on when a redirect changes the name
        self._wanted = wanted
        self._files_only = data_only
        self._found: list[LowerDir] = []
        self._file: LowerFile | None = None
        self._data: LowerFile | None = None
        self._stat: AnyStat | None = None
        self._marks = NO_MARKS
        self._redirect_denied = False
        self._leads_on = False  # the last hit names the place of its data: what is opaque on the way does not hide that

    def run(self) -> _Below:
        position = 0
        while position < len(self._queue):
            part = self._queue[position]
            position += 1
            hit = self._lookup.step(part, self._wanted)
            redirect = self._take(part.layer, hit)
            if redirect is None or (hit.stop and not self._leads_on):
                break
            if redirect != self._wanted:
                position = self._follow(part, redirect)
        return _Below(tuple(self._found), self._file, self._stat, self._marks, self._redirect_denied, self._data)

    def _take(self, layer: Layer, hit: _Hit) -> bytes | None:
        """Take what one layer has; return the name to look for in the next, None to stop."""
        entry = hit.entry
        self._leads_on = False
        if entry.kind is Kind.ABSENT:
            return hit.wanted
        if entry.kind is Kind.WHITEOUT or entry.stat is None:
            return None
        if entry.kind is Kind.FILE:
            return self._take_file(layer, hit, entry.stat)
        return self._take_dir(layer, hit, entry.stat)

    def _take_file(self, layer: Layer, hit: _Hit, found: AnyStat) -> bytes | None:
        if self._found:
            return None
        marks = layer.marks(hit.path, hit.name, found)
        self._note(found, marks)
        place = LowerFile(layer, hit.path, hit.name)
        self._file = self._file or place
        if not marks.metacopy:
            self._data = place
            return None
        self._files_only = True
        self._leads_on = marks.redirect is not None
        return marks.redirect or hit.wanted

    def _take_dir(self, layer: Layer, hit: _Hit, found: AnyStat) -> bytes | None:
        if self._files_only:
            return None
        marks = layer.marks(hit.path, hit.name, found)
        self._note(found, marks)
        self._found.append(LowerDir(layer, join(hit.path, hit.name)))
        if marks.redirect_denied:
            self._redirect_denied = True
            return None
        if marks.opaque or hit.entry.kind is Kind.OPAQUE:
            return None
        if marks.redirect is None or marks.redirect.startswith(b"/") or not hit.wanted.startswith(b"/"):
            return marks.redirect or hit.wanted
        return _redirected(hit.path, marks.redirect)

    def _note(self, found: AnyStat, marks: Marks) -> None:
        if self._stat is None:
            self._stat, self._marks = found, marks

    def _follow(self, part: LowerDir, wanted: bytes) -> int:
        """Look for another name from now on, in every layer below `part`'s; return where the queue goes on."""
        self._wanted = wanted
        candidates = self._lookup.root.lower if wanted.startswith(b"/") else self._parts
        self._queue = [candidate for candidate in candidates if candidate.layer.index > part.layer.index]
        return 0
