"""M1: a copy-up that syncs nothing before its name appears, or before its metacopy mark is removed."""

from contextlib import AbstractContextManager
from types import SimpleNamespace
from unittest import mock

from overlayfs import sysio
from overlayfs.tree import staging


def _nothing(_fd: int) -> None:
    """There is nothing to sync."""


def without_fsync() -> AbstractContextManager[object]:
    """Return the patch for M1."""
    silent = SimpleNamespace(**{**vars(sysio), "fsync": _nothing, "syncfs": _nothing})
    return mock.patch.object(staging, "sysio", silent)


MUTANTS = {"M1": without_fsync}
