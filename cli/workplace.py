"""The work directory that nobody named: a sibling of the upper."""

import contextlib
import os
from collections.abc import Iterator

from overlayfs.errors import MountError


@contextlib.contextmanager
def work_beside(upper: bytes) -> Iterator[bytes]:
    """Give `UPPER.work`, made if need be; what fails inside leaves no new directory behind."""
    work = upper.rstrip(b"/") + b".work"
    made = os.path.isdir(upper) and _made(work)
    try:
        yield work
    except BaseException:
        if made:
            _remove(work)
        raise


def _made(work: bytes) -> bool:
    """Make the directory; False if it is there already."""
    try:
        os.mkdir(work, 0o700)
    except FileExistsError:
        return False
    except OSError as error:
        reason = f"{os.fsdecode(work)}: {error.strerror}"
        raise MountError(f"cannot make a work directory beside the upper: {reason}; name one with --work") from None
    return True


def _remove(work: bytes) -> None:
    """Remove the directory with the empty ones that a mount has begun to fill it with."""
    for directory, _, _ in os.walk(work, topdown=False):
        with contextlib.suppress(OSError):  # not empty: then somebody uses it
            os.rmdir(directory)
