"""Disturbance of a measurement: the CPU seconds of all processes that have nothing to do with it."""

import os
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
KERNEL_THREADS = 2  # their parent; their work may as well be for the measurement, so it does not count
SHARE = 0.2  # of one CPU; more than that is a disturbance
LEAST = 0.03  # seconds; fewer than three ticks are not significant


@dataclass(frozen=True)
class Reading:
    """CPU seconds used so far: by a daemon, and by processes that have nothing to do with the measurement."""

    daemon: float
    foreign: float


def read(daemon: int | None) -> Reading:
    """Return a reading. Part of the measurement are this process, its descendants, and the daemon of the mount."""
    own = {os.getpid(), daemon}
    used: dict[int, float] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := _used(name)):
            parent, seconds = found
            if int(name) not in own and parent not in (*own, KERNEL_THREADS):
                used[int(name)] = seconds
    itself = _used(str(daemon)) if daemon else None
    return Reading(itself[1] if itself else 0.0, sum(used.values()) + _stolen())


def _used(name: str) -> tuple[int, float] | None:
    """Return the parent of a process and its CPU seconds, those of its ended children included."""
    try:
        fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), sum(map(int, fields[11:15])) / TICKS


def _stolen() -> float:
    """Return the CPU seconds that the hypervisor took (steal time)."""
    return int(Path("/proc/stat").read_text().split(maxsplit=10)[8]) / TICKS


def is_disturbed(foreign: float, elapsed: float) -> bool:
    """Return whether other processes took enough CPU time to disturb a measurement."""
    return foreign > max(LEAST, SHARE * elapsed)
