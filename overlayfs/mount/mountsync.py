"""Making the kernel hand over what it holds for a mount: dirty pages of mappings, and of the writeback cache."""

import os

from overlayfs import sysio


def sync_mount(mountpoint: bytes) -> None:
    """Return when all that was written through the mount has arrived.

    Opening the mount and syncing it are requests to the daemon: within it, call this in a thread, while the
    loop is serving.
    """
    directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sysio.syncfs(directory)
    finally:
        sysio.close(directory)
