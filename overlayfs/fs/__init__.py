"""The filesystem's verbs, synchronous and without FUSE: nodes, handles, look-up, files, names, attributes.

What the package offers is loaded when it is first asked for: a program that only reads options, as the parent of a
daemon does, stays small.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overlayfs.fs.config import IdRange, StackConfig
    from overlayfs.fs.copyup import Requirement
    from overlayfs.fs.lookup import Child
    from overlayfs.fs.metadata import Attributes, Changes
    from overlayfs.fs.names import Caller
    from overlayfs.fs.nodes import Node
    from overlayfs.fs.overlay import Overlay

__all__ = [
    "Attributes",
    "Caller",
    "Changes",
    "Child",
    "IdRange",
    "Node",
    "Overlay",
    "Requirement",
    "StackConfig",
]  # fmt: skip

_HOMES = {
    "Attributes": "metadata",
    "Caller": "names",
    "Changes": "metadata",
    "Child": "lookup",
    "IdRange": "config",
    "Requirement": "copyup",
    "Node": "nodes",
    "Overlay": "overlay",
    "StackConfig": "config",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
