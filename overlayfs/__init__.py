"""A union filesystem in user space: read-only layers under one writable upper, shown as one tree."""

from overlayfs.fs.config import IdRange, StackConfig
from overlayfs.fs.overlay import Overlay

__all__ = ["IdRange", "Overlay", "StackConfig"]
