"""The debug lines of `-d`: one per request, with kind, node id, names, result, and microseconds until the reply.

    LOOKUP 1 'etc': OK, 41 us

An engine decides when it mounts whether to write them. When it does not, a request costs exactly what it would cost
without this module.
"""

import errno
import logging
import os
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

clock = time.perf_counter


def is_enabled() -> bool:
    """Return whether the lines would be seen."""
    return log.isEnabledFor(logging.DEBUG)


def write(kind: str, nodeid: int, names: Sequence[bytes], code: int, began: float) -> None:
    """Log a request that was received at `began` (seconds of `clock`) and answered with an errno, 0 for success."""
    microseconds = (clock() - began) * 1e6
    shown = "".join(f" {os.fsdecode(name)!r}" for name in names)
    result = errno.errorcode.get(code, str(code)) if code else "OK"
    log.debug("%s %d%s: %s, %.0f us", kind, nodeid, shown, result, microseconds)
