"""M5 and M7: errors that are mistaken for something else, or not handled."""

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from overlayfs.fuse import engine
from overlayfs.fuse.kernel import session
from overlayfs.fuse.pyfuse3 import handlers as pyfuse3_handlers
from overlayfs.tree.layer import Entry, Layer
from overlayfs.union.resolve import Kind

_probe = Layer.probe


def _probe_or_absent(self: Layer, path: bytes, name: bytes) -> Entry:
    try:
        return _probe(self, path, name)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return Entry(Kind.ABSENT)


def unreadable_is_absent() -> AbstractContextManager[object]:
    """Return the patch for M5: a name that a layer cannot read is not there."""
    return mock.patch.object(Layer, "probe", _probe_or_absent)


_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE)


def _map_only_disk_errors(error: Exception, kind: str) -> int:
    if isinstance(error, OSError) and error.errno not in _OF_THE_PROCESS:
        return engine.reply_errno(error, kind)
    raise error


@contextmanager
def escaping_exceptions() -> Iterator[None]:
    """Return the patch for M7: exhausted descriptors and memory, and defects, are not turned into replies."""
    with (
        mock.patch.object(session, "reply_errno", _map_only_disk_errors),
        mock.patch.object(pyfuse3_handlers, "reply_errno", _map_only_disk_errors),
    ):
        yield


MUTANTS = {"M5": unreadable_is_absent, "M7": escaping_exceptions}
