"""A mount in the foreground of a process that a test has prepared."""

import os

from overlayfs.errors import UserError
from overlayfs.mount import start
from overlayfs.mount.options import Draft


def mount(options: str, mountpoint: str) -> int:
    """Mount and serve until unmounted; return the exit code."""
    draft = Draft()
    draft.read(options.encode())
    draft.mount.update(foreground=True)
    try:
        start.mount(draft.build(), os.fsencode(mountpoint))
    except UserError as error:
        return error.exit_code
    return 0
