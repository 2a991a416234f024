"""What the kernel may remember, and for how long. Pure.

Layers do not change under a mount and the upper is ours alone, so names, absences, attributes and pages
stay true until a request of our own changes them, and the kernel sees every such request pass.
"""

import os
from dataclasses import dataclass

FOREVER = 365 * 86400.0  # seconds; longer than any mount needs, short enough for every clock in between


@dataclass(frozen=True)
class CachingPolicy:
    """Life of cached names, absences and attributes in seconds; whether pages survive a new open."""

    entry: float = FOREVER
    negative: float = FOREVER
    attributes: float = FOREVER
    keep_cache: bool = True
    writeback: bool = False

    def backing_flags(self, flags: int) -> int:
        """Return the open(2) flags to use on a layer for a client's `flags`.

        The kernel sends offsets for O_APPEND and pages for O_DIRECT, so neither fits the file behind. With
        the writeback cache it also reads through handles that were opened for writing only.
        """
        flags &= ~(os.O_APPEND | os.O_DIRECT)
        if self.writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return flags


def caching(timeout: float | None = None, writeback: bool = False) -> CachingPolicy:
    """Return the policy for a `timeout` in seconds; None trusts the layers, 0 lets nothing be remembered.

    A given timeout says that somebody else may change the layers: then pages do not outlive an open either.
    """
    if timeout is None or timeout >= FOREVER:
        return CachingPolicy(writeback=writeback)
    timeout = max(timeout, 0.0)
    return CachingPolicy(timeout, timeout, timeout, keep_cache=False, writeback=writeback)
