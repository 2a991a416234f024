"""How a change of names is carried out in the upper: facts in, a plan out.

Each plan has exactly one step that makes the change visible, a rename, exchange, link or create; what comes before
is invisible and what comes after is tidying (reference: the kernel's fs/overlayfs/dir.c, which is cited below).
"""

from enum import Enum, Flag, auto
from typing import NamedTuple


class NameState(NamedTuple):
    """What is known of one name before the change.

    in_upper: the upper holds a visible object. whited_out: a whiteout has this very name in the upper (a `.wh.`
    whiteout has another name and does not count). in_lower: something would be visible if the upper held nothing.
    merged: a directory that is merged with lower ones. opaque: a directory that is marked so. clean: an upper directory
    without any entries, not even whiteouts.
    """

    in_upper: bool = False
    whited_out: bool = False
    in_lower: bool = False
    is_dir: bool = False
    merged: bool = False
    opaque: bool = False
    clean: bool = True


class Create(Enum):
    """Where a new object appears."""

    IN_PLACE = auto()  # the name is free: made under it
    OVER_WHITEOUT = auto()  # made in the work directory, renamed over the whiteout
    EXCHANGE_WHITEOUT = auto()  # a directory cannot replace a file: exchanged, the whiteout removed after


class Remove(Enum):
    """How a name disappears."""

    UNLINK = auto()  # nothing in lower layers: unlink or rmdir
    HIDE = auto()  # nothing in the upper: a whiteout is made on the free name, which is one step
    WHITEOUT = auto()  # a whiteout from the work directory is renamed over it
    EXCHANGE_WHITEOUT = auto()  # an upper directory is exchanged with a whiteout, then emptied aside
    MOVE_ASIDE = auto()  # an upper directory that holds whiteouts, nothing in lower layers: moved aside, then emptied


class Mark(Enum):
    """What must be written on a directory before it moves, so that it shows the same under its new name."""

    NONE = auto()
    OPAQUE = auto()
    REDIRECT = auto()


class Move(Flag):
    """The flags of the one rename that publishes, named as in renameat2(2)."""

    PLAIN = 0
    EXCHANGE = auto()
    WHITEOUT = auto()


class Rename(NamedTuple):
    """A rename: marks first, then `clear_target`, then `move`, then `sweep_old`: what is left at the old name goes."""

    move: Move
    source_mark: Mark
    target_mark: Mark
    clear_target: bool
    sweep_old: bool


def create(name_state: NameState, is_dir: bool) -> Create:
    """Return how an object comes to a name that shows nothing (ovl_create_or_link)."""
    if not name_state.whited_out:
        return Create.IN_PLACE
    return Create.EXCHANGE_WHITEOUT if is_dir else Create.OVER_WHITEOUT


def remove(name_state: NameState) -> Remove:
    """Return how a visible object loses its name (ovl_do_remove): a directory is already known to show nothing."""
    if name_state.is_dir and name_state.in_upper:
        if name_state.in_lower:
            return Remove.EXCHANGE_WHITEOUT
        return Remove.UNLINK if name_state.clean else Remove.MOVE_ASIDE
    if not name_state.in_lower:
        return Remove.UNLINK
    return Remove.WHITEOUT if name_state.in_upper else Remove.HIDE


def rename(source: NameState, target: NameState, into_merged: bool) -> Rename:
    """Return how `source`, which is in the upper, moves to the place of `target`, which is replaced (ovl_rename).

    `into_merged`: the new parent is merged with lower directories.
    """
    mark = _mark(source, into_merged)
    if target.whited_out:
        move = Move.EXCHANGE if source.in_lower or source.is_dir else Move.PLAIN
        return Rename(move, mark, Mark.NONE, False, move is Move.EXCHANGE and not source.in_lower)
    move = Move.WHITEOUT if source.in_lower else Move.PLAIN
    return Rename(move, mark, Mark.NONE, target.is_dir and target.in_upper and not target.clean, False)


def exchange(source: NameState, target: NameState, into_merged: bool, from_merged: bool) -> Rename:
    """Return how two visible objects in the upper change places; `from_merged` is the old parent's `into_merged`."""
    there = _mark(source, into_merged)
    back = _mark(target, from_merged)
    return Rename(Move.EXCHANGE, there, back, False, False)


def _mark(name_state: NameState, into_merged: bool) -> Mark:
    if not name_state.is_dir:
        return Mark.NONE
    if name_state.merged:
        return Mark.REDIRECT
    return Mark.OPAQUE if into_merged and not name_state.opaque else Mark.NONE
