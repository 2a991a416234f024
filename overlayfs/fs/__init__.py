"""The filesystem's verbs, synchronous and without FUSE: nodes, handles, look-up, files, names, attributes."""

from overlayfs.fs.attributes import Attributes, Changes
from overlayfs.fs.config import IdRange, StackConfig
from overlayfs.fs.files import Child
from overlayfs.fs.lifting import LiftStep, Need
from overlayfs.fs.names import Caller
from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay

__all__ = [
    "Attributes", "Caller", "Changes", "Child", "IdRange", "LiftStep", "Need", "Node", "Overlay", "StackConfig",
]  # fmt: skip
