"""The default work directory: `UPPER.work`, beside the upper."""

import contextlib
import os
from collections.abc import Iterator

from overlayfs.errors import MountError


@contextlib.contextmanager
def default_workdir(upper: bytes) -> Iterator[bytes]:
    """Yield `UPPER.work`, created if it does not exist; an exception inside removes it again if it was created here.

    Raises `MountError` if it cannot be created. An upper that is not a directory gets none: the mount reports it.
    """
    work = upper.rstrip(b"/") + b".work"
    created = os.path.isdir(upper) and _create(work)
    try:
        yield work
    except BaseException:
        if created:
            _remove(work)
        raise


def _create(work: bytes) -> bool:
    """Create the directory; return whether it is new."""
    try:
        os.mkdir(work, 0o700)
    except FileExistsError:
        return False
    except OSError as error:
        reason = f"{os.fsdecode(work)}: {error.strerror}"
        raise MountError(f"cannot create a work directory beside the upper: {reason}; name one with --work") from None
    return True


def _remove(work: bytes) -> None:
    """Remove the directory, and the empty ones that a mount has created in it."""
    for directory, _, _ in os.walk(work, topdown=False):
        with contextlib.suppress(OSError):  # not empty: another mount uses it
            os.rmdir(directory)
