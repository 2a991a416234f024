"""One name, many layers: which of the entries are visible.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "Upper and Lower", "Directories" and "whiteouts and
opaque directories".
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


def resolve(kinds: Iterable[Kind]) -> tuple[int, ...]:
    """Return the positions, top first, of the entries that make up a name; empty when there is no such name.

    `kinds` is what each layer holds, top first.  It is consumed no further than the layer that decides, so a
    layer below is not asked.  More than one position means a merged directory.
    """
    visible: list[int] = []
    for position, kind in enumerate(kinds):
        if kind is Kind.ABSENT:
            continue
        if kind is Kind.WHITEOUT or (kind is Kind.FILE and visible):
            break  # hidden by the whiteout, or a file below a directory
        visible.append(position)
        if kind is not Kind.DIR:
            break  # a file or an opaque directory ends the stack
    return tuple(visible)
