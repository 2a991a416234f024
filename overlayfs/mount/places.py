"""Where a mount point may lie in relation to the layers."""

import os

from overlayfs.errors import MountError
from overlayfs.fs.config import StackConfig


def check(mountpoint: bytes, stack: StackConfig) -> None:
    """Refuse a mount point strictly inside a layer, the upper or the work directory. MountError.

    A daemon that looks at such a layer meets its own mount there and waits for itself. Directories are
    compared by identity, so other paths and bind mounts of the same tree are seen. A mount point that *is*
    a layer is fine: layers are held by descriptor before the mount covers them.
    """
    layers = _identities(stack)
    for above in _ancestors(mountpoint):
        path = layers.get(above)
        if path is not None:
            raise MountError(
                f"{os.fsdecode(mountpoint)} lies inside {os.fsdecode(path)}, which is part of the stack; "
                "choose a mount point outside"
            )


def _identities(stack: StackConfig) -> dict[tuple[int, int], bytes]:
    found = {}
    for path in (*stack.lower, stack.upper, stack.work):
        if path is not None and (identity := _identity(path)):
            found[identity] = path
    return found


def _ancestors(path: bytes) -> list[tuple[int, int]]:
    found = []
    while path != b"/":
        path = os.path.dirname(path)
        if identity := _identity(path):
            found.append(identity)
    return found


def _identity(path: bytes) -> tuple[int, int] | None:
    """Return what a directory is, None for one that cannot be seen: opening the stack says why."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
