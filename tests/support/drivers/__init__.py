"""One interface to a plain directory, `overlayfs.fs` without a mount, our mount, and kernel overlayfs."""

from tests.support.drivers.base import Path, Tree
from tests.support.drivers.mounts import CommandMount, FuseMount, KernelOverlay, PlainDirectory, Pyfuse3Mount
from tests.support.drivers.raw import Handle, Raw, Stat
from tests.support.drivers.stack import Stack

__all__ = [
    "CommandMount", "FuseMount", "Handle", "KernelOverlay", "Path", "PlainDirectory", "Pyfuse3Mount", "Raw", "Stack",
    "Stat", "Tree", "driver_class",
]  # fmt: skip


def driver_class(name: str) -> type[Tree]:
    """The driver of this name; the product is imported only for the one that needs it in this process."""
    if name == "fs":
        from tests.support.drivers.overlay import FsDriver

        return FsDriver
    mounts: list[type[Tree]] = [PlainDirectory, FuseMount, Pyfuse3Mount, CommandMount, KernelOverlay]
    return next(kind for kind in mounts if kind.name == name)
