"""Making the kernel hand over what it holds for a mount: dirty pages of mappings, and of the writeback cache."""

import os

from overlayfs import sysio


def sync_mount(mountpoint: bytes) -> None:
    """Have the kernel start to hand over all that was written through the mount; it may not wait for the end.

    `Engine.prepare_write_out` waits for it. Opening the mount and syncing it are requests to the daemon: within
    it, call this in a thread, while the loop is serving.
    """
    directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sysio.syncfs(directory)
    finally:
        sysio.close(directory)
