"""Types of arguments that several commands take. They are bytes as soon as they are read."""

import os

from overlayfs.errors import UsageError


def path(given: str) -> bytes:
    """Return a path as bytes; whether anything is there is for the command to find out, whose sentence says more."""
    if not given:
        raise UsageError("an empty path is given")
    return os.fsencode(given)


def text(given: str) -> bytes:
    """Return the bytes behind what the shell gave."""
    return os.fsencode(given)
