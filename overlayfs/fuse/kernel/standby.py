"""Who answers while the loop waits for a disk.

Changes are made on the loop, at once, which is why they need no locks. On a file system that is frozen (fsfreeze(8),
a snapshot) or whose disk hangs such a call does not come back, and no signal ends it. Then a thread of its own, the
stand-in, reads the requests and answers those that change nothing; the others are put aside for the loop. When the
call comes back, the loop waits until the stand-in has finished its request and stands back: what the loop has begun it
finishes alone, as if nobody had been there.

What the stand-in does meanwhile may happen between two system calls of a change: look-ups, reads, listings. The kernel
keeps them away from a directory whose names are being changed and from a file that is being written (i_rwsem).
Descriptors that the loop has borrowed stay open (`Overlay.keep_open`).

Who only reads pays nothing for this. A change sets three numbers; while changes come, the thread looks twenty times a
second whether one of them hangs, and before the first one it does not exist.
"""

import logging
import os
import select
import threading
from contextlib import suppress
from typing import Protocol

log = logging.getLogger(__name__)

TICK = 0.05  # seconds; a call that is the same at two looks hangs
QUIET = 20  # looks without a change after which nobody looks any more


class Work(Protocol):
    """What the stand-in takes over from the loop."""

    @property
    def source(self) -> int:
        """The descriptor that requests are read from."""

    def begin(self) -> None:
        """Somebody stands in from now on."""

    def take(self) -> None:
        """Read one request; answer it if it changes nothing, else put it aside. OSError when there are no more."""

    def end(self) -> None:
        """Nobody stands in any more: let the loop answer what was put aside as soon as it can."""


class Standby:
    """Watches the changing calls of the thread that made it, the loop, and stands in for it. A guard of `sysio`."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._loop = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._calls = 0  # that the loop has begun
        self._inside = False  # one of them now
        self._resting = True  # nobody looks
        self._standing_in = False
        self._roused = threading.Event()
        self._over = threading.Event()
        self._place = threading.Lock()  # held by who stands in
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # --- on the loop -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A changing call is about to be made, in whatever thread."""
        if threading.get_ident() == self._loop:
            self._calls += 1
            self._inside = True
            if self._resting:
                self._rouse()

    def end(self) -> None:
        """It is back; somebody who stands in makes room before the loop goes on."""
        if threading.get_ident() == self._loop:
            self._inside = False
            if self._standing_in:
                os.eventfd_write(self._bell, 1)
                with self._place:
                    pass

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._roused.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._bell)

    def _rouse(self) -> None:
        self._resting = False
        self._roused.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="stand-in", daemon=True)
            self._thread.start()

    # --- in the thread ---------------------------------------------------------------------------------
    # The loop writes its numbers before it reads ours, and we ours before we read its: one of us sees the other.

    def _watch(self) -> None:
        quiet = 0
        while not self._over.is_set():
            calls, inside = self._calls, self._inside
            self._over.wait(TICK)
            quiet = quiet + 1 if calls == self._calls else 0
            if quiet and inside and self._inside:
                self._standby(calls)
            elif quiet > QUIET:
                self._rest(calls)

    def _rest(self, calls: int) -> None:
        """Sleep until the next change."""
        self._roused.clear()
        self._resting = True
        if calls == self._calls and not self._over.is_set():
            self._roused.wait()
        self._resting = False

    def _standby(self, calls: int) -> None:
        """Answer requests until the loop is back."""
        with self._place:
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            self._standing_in = True
            try:
                if self._inside and calls == self._calls:
                    self._serve()
            finally:
                self._standing_in = False

    def _serve(self) -> None:
        log.debug("the loop waits for a disk: somebody stands in")
        waiting = select.poll()
        for fd in (self._work.source, self._bell):
            waiting.register(fd, select.POLLIN)
        self._work.begin()
        try:
            while self._bell not in dict(waiting.poll()):
                self._work.take()
        except OSError as error:
            log.debug("there are no more requests: %s", error)
        finally:
            self._work.end()
