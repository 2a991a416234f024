"""How long to look for the next request before going to sleep.

Waking a sleeping daemon on another core costs more than most requests (docs/engine.md), so the loop looks again for a
while. It pays only where requests follow closely: the time is doubled when the last wait would have been
caught and halved when it was in vain, down to none; an idle mount costs nothing. On one core, or when processes wait
for a processor, looking takes it from those who need it, and the scheduler lets us wait for that later on: then
there is none, and the next sample says whether that has passed.
"""

import os
import time
from collections.abc import Callable

LONGEST = 100e-6  # seconds; the gap between two requests of a busy client is shorter
SHORTEST = 20e-6
SAMPLE = 0.1  # seconds between two looks at how crowded the machine is
CROWDED = 0.15  # part of the time in which somebody waits for a processor, from which on nobody looks

_PRESSURE = "/proc/pressure/cpu"


class BusyPoll:
    """The adaptive time; `fixed` seconds switch the adaptation off, 0 the looking.

    `clock` counts seconds, `stalled` those in which some process has waited for a processor.
    """

    def __init__(
        self,
        fixed: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        stalled: Callable[[], float] | None = None,
    ) -> None:
        self.clock = clock
        self._fixed = fixed
        self._stalled = stalled or stalled_seconds
        self._most = _alone() if fixed is None else fixed
        self.seconds = self._most
        self._sampled = clock(), self._stalled()

    def waited(self, gap: float) -> None:
        """No request came while looking; it came `gap` seconds after the last one."""
        if self._fixed is not None:
            return
        now = self.clock()
        if now - self._sampled[0] >= SAMPLE:
            self._sample(now)
        if gap < LONGEST:
            self.seconds = min(max(self.seconds * 2, SHORTEST), self._most)
        elif self.seconds:
            self.seconds = self.seconds / 2 if self.seconds > SHORTEST else 0.0

    def _sample(self, now: float) -> None:
        then, before = self._sampled
        stalled = self._stalled()
        crowded = stalled - before > CROWDED * (now - then)
        self._most = 0.0 if crowded else _alone()
        self.seconds = min(self.seconds, self._most)
        self._sampled = now, stalled


def stalled_seconds() -> float:
    """Return how long some process has waited for a processor since the system started (proc_pressure_cpu).

    Where the kernel does not count that: the seconds since then if the load is more than the processors, else 0.
    """
    try:
        with open(_PRESSURE, "rb") as stream:
            return int(stream.readline().rpartition(b"=")[2]) / 1e6
    except OSError:
        return time.monotonic() if os.getloadavg()[0] > len(os.sched_getaffinity(0)) else 0.0


def _alone() -> float:
    """Return the longest time worth looking for on this machine."""
    return LONGEST if len(os.sched_getaffinity(0)) > 1 else 0.0
