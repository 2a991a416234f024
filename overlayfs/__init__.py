"""A union filesystem in user space: read-only layers under one writable upper, shown as one tree.

    from overlayfs import Overlay, StackConfig, Store

`docs/python-api.md` shows their use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayfs.fs import Attributes, Caller, Changes, IdRange, Node, Overlay, StackConfig
    from overlayfs.library import Store

__version__ = "0.1.0"

__all__ = ["Attributes", "Caller", "Changes", "IdRange", "Node", "Overlay", "StackConfig", "Store"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Store":
        from overlayfs import library

        return library.Store
    from overlayfs import fs

    return getattr(fs, name)
