"""Serves read-only requests while the event loop is blocked in a system call.

Changes are made on the loop, one after the other, which is why they need no locks. On a file system that is frozen
(fsfreeze(8), a snapshot) or whose disk hangs such a call does not return, and no signal ends it. Then the standby
thread reads the requests and answers those that change nothing; the others it defers to the loop. When the call
returns, the loop waits until the standby thread has finished its request and has stopped.

What the standby thread does may happen between two system calls of one change: look-ups, reads, listings. The kernel
keeps them away from a directory whose names are being changed and from a file that is being written (i_rwsem).
Descriptors that the loop has borrowed stay open (`Overlay.keep_open`).

Requests that change nothing pay nothing for this. A change sets three variables; while changes come, the thread checks
twenty times a second whether one of them hangs, and before the first one it does not exist.
"""

import errno
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

from overlayfs.fs.overlay import Overlay
from overlayfs.fs.space import CHANGING_REQUESTS
from overlayfs.fuse.kernel.protocol import LAYOUTS, Op
from overlayfs.fuse.kernel.request import Request

log = logging.getLogger(__name__)

TICK = 0.05  # seconds between two checks; a call that has not returned between them hangs
QUIET = 20  # checks without a change after which the thread sleeps until the next change

READ_ONLY_REQUESTS = frozenset(
    {
        *(Op.LOOKUP, Op.GETATTR, Op.STATX, Op.READLINK, Op.READ, Op.STATFS, Op.GETXATTR, Op.LISTXATTR, Op.LSEEK),
        *(Op.OPENDIR, Op.READDIR, Op.READDIRPLUS, Op.FSYNC, Op.FSYNCDIR, Op.FLUSH, Op.ACCESS),
    }
)
"""Requests that change nothing and need no task of the loop: an fsync runs in a thread of its own."""

_OPEN = LAYOUTS["open_in"]
_IOCTL = LAYOUTS["ioctl_in"]
_NOTHING_THERE = (errno.EAGAIN, errno.EINTR, errno.ENOENT)


class Reader(Protocol):
    """Where the standby thread gets requests from. All methods run in that thread while the loop is blocked."""

    @property
    def source(self) -> int:
        """The descriptor that requests are read from."""

    def begin(self) -> None:
        """The standby thread serves from now on."""

    def read_one(self) -> None:
        """Read one request; answer it if it changes nothing, else defer it. OSError after the end of the mount."""

    def end(self) -> None:
        """The standby thread has stopped; let the loop answer the deferred requests as soon as it can."""


class StandbyReader:
    """The requests of a mount, for the standby thread; `handle` answers one."""

    def __init__(self, source: int, size: int, overlay: Overlay, handle: Callable[[Request], None]) -> None:
        self.source = source
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._overlay = overlay
        self._handle = handle
        self._deferred: deque[bytes] = deque()
        self._token = trio.lowlevel.current_trio_token()

    def begin(self) -> None:
        """Keep what the loop has borrowed open from now on."""
        self._overlay.keep_open(True)

    def read_one(self) -> None:
        """Read one request; answer or defer it."""
        try:
            length = os.readv(self.source, [self._buffer])
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                return
            raise
        request = Request(self._view[:length])
        if request.op in READ_ONLY_REQUESTS or _is_read_only(request):
            self._handle(request)
        else:
            self._deferred.append(bytes(self._view[:length]))

    def end(self) -> None:
        """Schedule the deferred requests on the loop."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._handle_deferred, idempotent=True)

    def _handle_deferred(self) -> None:
        """Answer them, on the loop."""
        self._overlay.keep_open(False)
        while self._deferred:
            self._handle(Request(memoryview(self._deferred.popleft())))


def _is_read_only(request: Request) -> bool:
    """Return whether a request of a kind that may change something does not. A truncated one counts as changing."""
    if request.op == Op.OPEN and len(request.body) >= _OPEN.size:
        flags: int = _OPEN.unpack_from(request.body)[0]
        return flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY
    if request.op == Op.IOCTL and len(request.body) >= _IOCTL.size:
        return _IOCTL.unpack_from(request.body)[2] not in CHANGING_REQUESTS
    return False


class Standby:
    """Watches the changing calls of the thread that made it, the loop, and serves while one hangs.

    `sysio` calls `begin` and `end` around each changing call.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._loop = threading.get_ident()
        self._thread: threading.Thread | None = None
        self._calls = 0  # changing calls that the loop has begun
        self._inside = False  # the loop is in one of them now
        self._resting = True  # the thread sleeps until the next change
        self._serving = False
        self._awake = threading.Event()
        self._closing = threading.Event()
        self._serving_lock = threading.Lock()  # held while the thread serves
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable when the loop is back

    # --- on the loop -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A changing call is about to be made, in any thread."""
        if threading.get_ident() == self._loop:
            self._calls += 1
            self._inside = True
            if self._resting:
                self._wake()

    def end(self) -> None:
        """The call has returned. If the standby thread is serving, wait until it has stopped."""
        if threading.get_ident() == self._loop:
            self._inside = False
            if self._serving:
                os.eventfd_write(self._wake_fd, 1)
                with self._serving_lock:
                    pass

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake_fd)

    def _wake(self) -> None:
        self._resting = False
        self._awake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="standby", daemon=True)
            self._thread.start()

    # --- in the thread ---------------------------------------------------------------------------------
    # Each side writes its own variables before it reads those of the other, so at least one sees the other's change.

    def _watch(self) -> None:
        quiet = 0
        while not self._closing.is_set():
            calls, inside = self._calls, self._inside
            self._closing.wait(TICK)
            quiet = quiet + 1 if calls == self._calls else 0
            if quiet and inside and self._inside:
                self._serve_instead(calls)
            elif quiet > QUIET:
                self._sleep(calls)

    def _sleep(self, calls: int) -> None:
        """Sleep until the next change."""
        self._awake.clear()
        self._resting = True
        if calls == self._calls and not self._closing.is_set():
            self._awake.wait()
        self._resting = False

    def _serve_instead(self, calls: int) -> None:
        """Answer requests until the call that was number `calls` has returned."""
        with self._serving_lock:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            self._serving = True
            try:
                if self._inside and calls == self._calls:
                    self._serve()
            finally:
                self._serving = False

    def _serve(self) -> None:
        log.debug("the loop is blocked in a system call: the standby thread serves read-only requests")
        poll = select.poll()
        for fd in (self._reader.source, self._wake_fd):
            poll.register(fd, select.POLLIN)
        self._reader.begin()
        try:
            while self._wake_fd not in dict(poll.poll()):
                self._reader.read_one()
        except OSError as error:
            log.debug("the standby thread got no more requests: %s", error)
        finally:
            self._reader.end()
