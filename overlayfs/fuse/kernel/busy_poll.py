"""How long to poll for the next request before going to sleep.

Waking a sleeping daemon on another core takes longer than most requests (docs/engine.md), so the loop polls for a
while. That pays only where requests follow closely: the time is doubled when polling that long would have caught the
last request and halved when it would not, down to none, so an idle mount costs nothing. On one core, or when processes
wait for a CPU, polling takes the CPU from them, and the scheduler makes the daemon wait for that later: then the loop
does not poll until a later sample finds the CPUs less busy.
"""

import os
import time
from collections.abc import Callable

LONGEST = 100e-6  # seconds; the gaps between the requests of a busy client are shorter
SHORTEST = 20e-6
SAMPLE = 0.1  # seconds between two samples of how busy the CPUs are
CROWDED = 0.15  # the fraction of time in which some process waits for a CPU, above which the loop does not poll

_PRESSURE = "/proc/pressure/cpu"


class BusyPoll:
    """The adaptive time, `seconds`. A time that is `fixed` does not adapt, 0 switches polling off.

    `clock` counts seconds, `stalled` those in which some process has waited for a CPU.
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
        self._most = _longest() if fixed is None else fixed
        self.seconds = self._most
        self._sampled = clock(), self._stalled()

    def waited(self, gap: float) -> None:
        """Adapt: no request came while polling, and one came `gap` seconds after the last one."""
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
        self._most = 0.0 if crowded else _longest()
        self.seconds = min(self.seconds, self._most)
        self._sampled = now, stalled


def stalled_seconds() -> float:
    """Return for how many seconds some process has waited for a CPU since the system started (proc_pressure_cpu(5)).

    Where the kernel does not count that: the uptime if the load exceeds the number of CPUs, else 0.
    """
    try:
        with open(_PRESSURE, "rb") as stream:
            return int(stream.readline().rpartition(b"=")[2]) / 1e6
    except OSError:
        return time.monotonic() if os.getloadavg()[0] > len(os.sched_getaffinity(0)) else 0.0


def _longest() -> float:
    """Return the longest time worth polling on this machine."""
    return LONGEST if len(os.sched_getaffinity(0)) > 1 else 0.0
