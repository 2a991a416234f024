"""Worker threads for system calls that may block: `Threads` for calls that a task awaits, `Workers` for calls that
answer a request by themselves.

More threads than operations that are expected to stall at once; those of `Workers` end with the process.
"""

import functools
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

import trio

P = ParamSpec("P")
R = TypeVar("R")

MOST = 200  # threads of each kind


class Threads:
    """Makes blocking calls for tasks, which await the result."""

    def __init__(self, count: int = MOST) -> None:
        self._limiter = trio.CapacityLimiter(count)

    async def run(self, call: Callable[P, R], *args: P.args, **keywords: P.kwargs) -> R:
        """Make a call in a thread and return its result; the caller is not cancelled before the call has returned.

        It is made even if the caller is already cancelled: only the call frees what was prepared for it.
        """
        made = functools.partial(call, *args, **keywords)
        results: list[R] = []
        with trio.CancelScope(shield=True):
            results.append(await trio.to_thread.run_sync(made, limiter=self._limiter))
        return results[0]


class Workers:
    """Runs jobs that send their own reply, each in the first thread that is free.

    A job uses no state of the loop: its call was prepared there, and the reply is written to the kernel by the thread.
    So an answer does not wait for the loop's next turn, and a disk that hangs delays only the requests that need it.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._started = 0
        self.busy = 0  # jobs that are not finished
        self._lock = threading.Lock()

    def run(self, job: Callable[[], None]) -> None:
        """Start a job, which must not raise, and return at once."""
        with self._lock:
            self.busy += 1
            short = self.busy > self._started and self._started < MOST
            if short:
                self._started += 1
        if short:
            threading.Thread(target=self._work, daemon=True).start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            self._jobs.get()()
            with self._lock:
                self.busy -= 1
