"""One name, many layers: which of the entries are visible.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "Upper and Lower", "Directories", "whiteouts and opaque
directories" and "Metadata only copy up".
"""

from collections.abc import Iterable
from enum import Enum


class Kind(Enum):
    """What one layer holds under a name."""

    ABSENT = "absent"
    WHITEOUT = "whiteout"
    FILE = "file"
    """Anything that is not a directory."""
    DIR = "directory"
    OPAQUE = "opaque directory"


class Resolution:
    """The rule, for entries that are given one at a time, top first: `admits` each that is there, and `add` it.

    The walk through real layers (`overlayfs.fs.search`) is driven by it, and so is `resolve`.
    metacopy_above: the upper has a metadata-only copy, and only its data is looked for.
    """

    __slots__ = ("_merging", "_wants_data")

    def __init__(self, metacopy_above: bool = False) -> None:
        self._merging = False  # a directory has been added
        self._wants_data = metacopy_above

    def admits(self, kind: Kind) -> bool:
        """Return whether an entry that is there is part of the name; if not, it hides all layers below."""
        if kind is Kind.FILE:
            return not self._merging
        return kind is not Kind.WHITEOUT and not self._wants_data

    def add(self, kind: Kind, metacopy: bool = False) -> bool:
        """Add an admitted entry; return whether entries of the layers below count, too."""
        if kind is Kind.FILE:
            self._wants_data = metacopy
            return metacopy
        self._merging = True
        return kind is Kind.DIR


def resolve(kinds: Iterable[Kind]) -> tuple[int, ...]:
    """Return the positions, top first, of the entries that make up a name; empty when there is no such name.

    `kinds` is what each layer holds, top first.  It is consumed no further than the layer that decides, so a
    layer below is not asked.  More than one position means a merged directory.
    """
    resolution = Resolution()
    visible: list[int] = []
    for position, kind in enumerate(kinds):
        if kind is Kind.ABSENT:
            continue
        if not resolution.admits(kind):
            break
        visible.append(position)
        if not resolution.add(kind):
            break
    return tuple(visible)
