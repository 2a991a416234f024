"""Where a mount point may lie in relation to the layers."""

import os

from overlayfs import sysio
from overlayfs.errors import MountError
from overlayfs.fs.config import StackConfig


def check(mountpoint: bytes, stack: StackConfig) -> None:
    """Refuse a mount point strictly inside the upper or the work directory, or a layer that shows mounts. MountError.

    A daemon that looks at such a directory meets its own mount there and waits for itself; not in a layer that can be
    held as a private copy of its mount. Directories are compared by identity, so other paths and bind mounts of the
    same tree are seen. A mount point that *is* a layer is fine: it is held before the mount covers it.
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
    shown = [path for path in stack.lower if not _hides_mounts(path)]
    for path in (*shown, stack.upper, stack.work):
        if path is not None and (identity := _identity(path)):
            found[identity] = path
    return found


def _hides_mounts(path: bytes) -> bool:
    """Return whether a layer can be held without what is mounted in it."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        clone = sysio.clone_mount(fd)
    finally:
        os.close(fd)
    if clone is not None:
        os.close(clone)
    return clone is not None


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
