"""Processes that tests start indirectly: daemons become our children, so that they can be found and waited for."""

import os
import select
import time
from collections.abc import Iterable

from tests.support import syscalls

LIMIT = 20.0


def adopt() -> None:
    """Make orphaned grandchildren children of this process from now on."""
    syscalls.become_subreaper()


def children() -> set[int]:
    """Return the pids of all children, zombies included."""
    own = os.getpid()
    return {pid for pid in _pids() if _parent(pid) == own}


def _pids() -> Iterable[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def command(pid: int) -> str:
    """Return the command line of a process, for messages."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone"


def ends(pid: int, limit: float = LIMIT) -> bool:
    """Return whether a child has ended or ends within `limit` seconds; a zombie has ended."""
    handle = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([handle], [], [], limit)
    finally:
        os.close(handle)
    return bool(ready)


def is_dead(pid: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except FileNotFoundError:
        return True


def reap(pid: int, limit: float = LIMIT) -> int:
    """Wait for a child to end and return its exit code; fail if it does not end within `limit` seconds."""
    assert ends(pid, limit), f"process {pid} does not end: {command(pid)}"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reap_since(before: set[int], limit: float = LIMIT) -> None:
    """Wait for every child that was not there before."""
    deadline = time.monotonic() + limit
    for pid in children() - before:
        reap(pid, max(0.0, deadline - time.monotonic()))
