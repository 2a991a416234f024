"""Threads that make one slow system call each and answer for themselves.

What they do needs no state of the loop: a call that was prepared there, and a reply that is written to the kernel by
whoever has it. So an answer does not wait for the loop to have its turn, and a disk that stands still keeps only
those waiting who need it. Threads are started when all others are busy and end with the process.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

MOST = 200  # threads; more than operations that are expected to stand still at once


class Workers:
    """Carries out jobs, each in the first thread that is free."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._started = 0
        self.busy = 0  # jobs that are not done yet
        self._lock = threading.Lock()

    def run(self, job: Callable[[], None]) -> None:
        """Carry out a job, which must not raise; returns at once."""
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
