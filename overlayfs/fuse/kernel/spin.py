"""How long to look for the next request before going to sleep. Pure.

Waking a sleeping daemon on another core costs more than most requests (docs/engine.md), so the loop looks again for a
while. It pays only where requests follow closely: the time is doubled when the last wait would have been
caught and halved when it was in vain, down to none; an idle mount costs nothing. On one core, or when something else
wants the one we look on, looking takes the processor from the client that is to send the request.
"""

import os
import resource
import time
from collections.abc import Callable

LONGEST = 100e-6  # seconds; the gap between two requests of a busy client is shorter
SHORTEST = 20e-6
_SAMPLE = 512  # waits between two looks at who else wants the processor
_CROWDED = 0.05  # preemptions per wait above which looking is given up until the next sample


class Spin:
    """The adaptive time; `fixed` seconds switch the adaptation off, 0 the looking."""

    def __init__(self, fixed: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._fixed = fixed
        self._most = _alone() if fixed is None else fixed
        self.seconds = self._most
        self._waits = 0
        self._preempted = _preemptions()

    def waited(self, gap: float) -> None:
        """No request came while looking; it came `gap` seconds after the last one."""
        if self._fixed is not None:
            return
        self._waits += 1
        if self._waits >= _SAMPLE:
            self._look_around()
        if gap < LONGEST:
            self.seconds = min(max(self.seconds * 2, SHORTEST), self._most)
        elif self.seconds:
            self.seconds = self.seconds / 2 if self.seconds > SHORTEST else 0.0

    def _look_around(self) -> None:
        now = _preemptions()
        crowded = (now - self._preempted) > _CROWDED * self._waits
        self._most = 0.0 if crowded else _alone()
        self._waits, self._preempted = 0, now


def _alone() -> float:
    """Return the longest time worth looking for on this machine."""
    return LONGEST if len(os.sched_getaffinity(0)) > 1 else 0.0


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
