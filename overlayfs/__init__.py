"""A union filesystem in user space: read-only layers under one writable upper, shown as one tree.

    from overlayfs import Overlay, StackConfig

`docs/design.md` shows its use without a mount.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayfs.fs import Attributes, Caller, Changes, IdRange, Node, Overlay, StackConfig

__all__ = ["Attributes", "Caller", "Changes", "IdRange", "Node", "Overlay", "StackConfig"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from overlayfs import fs

    return getattr(fs, name)
