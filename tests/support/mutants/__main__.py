"""A mount in the foreground that has a bug: `python -m tests.support.mutants NAME OPTIONS MOUNTPOINT`."""

import os
import sys

from overlayfs.errors import UserError
from overlayfs.mount import life
from overlayfs.mount.options import Draft
from tests.support.mutants import seeded


def main(name: str, options: str, mountpoint: str) -> int:
    """Mount until the end of the mount."""
    draft = Draft()
    draft.read(f"{options},debug".encode())
    try:
        with seeded(name):
            life.mount(draft.build(), os.fsencode(mountpoint))
    except UserError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
