"""What the kernel may cache, and for how long. Pure.

Layers do not change under a mount, and only the mount changes its upper. So names, absences, attributes and pages stay
valid until a request changes them, and the kernel, which sends the request, knows.
"""

import os
from dataclasses import dataclass

FOREVER = 365 * 86400.0  # seconds; longer than any mount lives, and no counter on the way overflows


@dataclass(frozen=True)
class CachingPolicy:
    """How long names, absences and attributes are cached, in seconds; whether cached pages survive a new open."""

    entry: float = FOREVER
    negative: float = FOREVER
    attributes: float = FOREVER
    keep_cache: bool = True
    writeback: bool = False

    def backing_flags(self, flags: int) -> int:
        """Return the open(2) flags for the real file that fit an open of the mount with `flags`.

        Requests carry offsets even for O_APPEND, and buffers that are not aligned as O_DIRECT wants them, so both flags
        are removed. With the writeback cache the kernel also reads through handles that were opened for writing only.
        """
        flags &= ~(os.O_APPEND | os.O_DIRECT)
        if self.writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return flags


def caching(timeout: float | None = None, writeback: bool = False) -> CachingPolicy:
    """Return the policy for a `timeout` in seconds; with None everything is cached for ever, with 0 nothing is.

    A timeout means that the layers may be changed from outside: then cached pages do not survive a new open either.
    """
    if timeout is None or timeout >= FOREVER:
        return CachingPolicy(writeback=writeback)
    timeout = max(timeout, 0.0)
    return CachingPolicy(timeout, timeout, timeout, keep_cache=False, writeback=writeback)
