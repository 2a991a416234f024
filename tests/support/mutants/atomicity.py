"""M2 and M3: changes that become visible in more than one step."""

from contextlib import AbstractContextManager
from unittest import mock

from overlayfs import sysio
from overlayfs.fs.copyup_steps import Build
from overlayfs.fs.nodes import Dir, File, Node
from overlayfs.tree.upper import Place, Upper
from overlayfs.tree.workdir import WorkDir
from overlayfs.union.plans import Create, Move

_begin = Build.begin
_move = Upper._move


class _PlaceOfItsOwn(WorkDir):
    """A work directory whose one staging place is the final one: a name in a directory of the upper."""

    def __init__(self, work: WorkDir, dirfd: int, name: bytes) -> None:
        super().__init__(work.root, work.path)
        self.index = work.index
        self.fd = dirfd
        self._name = name

    def temporary(self) -> bytes:
        """Return the final name."""
        return self._name


class _InPlace:
    """An upper that builds under the final name; everything else is that of the real one."""

    def __init__(self, upper: Upper, work: _PlaceOfItsOwn) -> None:
        self._upper = upper
        self.work = work

    def __getattr__(self, name: str) -> object:
        return getattr(self._upper, name)

    def publish(self, temporary: bytes, dirfd: int, name: bytes, how: Create) -> None:
        """The name exists already."""


def _final_place(node: Node) -> tuple[Dir, bytes] | None:
    if isinstance(node, File):
        return next(((parent, name) for parent, name in node.names if parent.in_upper), None)
    return (node.parent, node.name) if isinstance(node, Dir) and node.parent is not None else None


def _begin_in_place(self: Build) -> None:
    _begin(self)
    place = _final_place(self.node)
    if place is not None:
        dirfd = self._upper.dirfd(self._context.nodes.path(place[0]))
        work = _PlaceOfItsOwn(self._upper.work, dirfd, place[1])
        object.__setattr__(self, "_upper", _InPlace(self._upper, work))


def copy_up_in_place() -> AbstractContextManager[object]:
    """Return the patch for M2: data and attributes are written under the final name, one after the other."""
    return mock.patch.object(Build, "begin", _begin_in_place)


def _move_in_two_steps(self: Upper, source: Place, target: Place, move: Move) -> None:
    if Move.WHITEOUT not in move or not self.features.devices:
        _move(self, source, target, move)
        return
    old = self.dirfd(source[0])
    sysio.rename_at(old, source[1], self.dirfd(target[0]), target[1])
    self._put_whiteout(old, source[1], exchange=False)


def whiteout_after_rename() -> AbstractContextManager[object]:
    """Return the patch for M3: between the two steps the lower object under the old name shows."""
    return mock.patch.object(Upper, "_move", _move_in_two_steps)


MUTANTS = {"M2": copy_up_in_place, "M3": whiteout_after_rename}
