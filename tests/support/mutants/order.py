"""M6: a record of the location of data that is durable before the data.

The fault is that of a block map written ahead of its blocks. We keep no block map; the location of the data of a file
is given by the mark `metacopy` of a copy that holds only metadata: while it exists, readers take the data from below.
So the mutant removes the mark, makes that durable, and only then writes the data and makes it durable as well: every
step of the real `fill`, in the wrong order.
"""

from contextlib import AbstractContextManager
from unittest import mock

from overlayfs import sysio
from overlayfs.format import xattrs
from overlayfs.tree import staging
from overlayfs.tree.upper import Upper

_fill = staging.fill


def _record_first(upper: Upper, pin: int, target: int, data: int) -> None:
    upper.drop_mark(pin, b"", xattrs.METACOPY)
    sysio.fsync(target)
    _fill(upper, pin, target, data)


def record_before_data() -> AbstractContextManager[object]:
    """Return the patch for M6."""
    return mock.patch.object(staging, "fill", _record_first)


MUTANTS = {"M6": record_before_data}
