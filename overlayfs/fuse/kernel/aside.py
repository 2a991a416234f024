"""The requests of a mount as the stand-in sees them: most can be answered, and changes wait for the loop."""

import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import trio

from overlayfs.fs.overlay import Overlay
from overlayfs.fs.space import CHANGING_REQUESTS
from overlayfs.fuse.kernel.protocol import LAYOUTS, Op
from overlayfs.fuse.kernel.session import Request, received

log = logging.getLogger(__name__)

HARMLESS = frozenset(
    {
        *(Op.LOOKUP, Op.GETATTR, Op.STATX, Op.READLINK, Op.READ, Op.STATFS, Op.GETXATTR, Op.LISTXATTR, Op.LSEEK),
        *(Op.OPENDIR, Op.READDIR, Op.READDIRPLUS, Op.FSYNC, Op.FSYNCDIR, Op.FLUSH, Op.ACCESS),
    }
)
"""What changes nothing and needs no task of the loop: an fsync has a thread of its own."""

_OPEN = LAYOUTS["open_in"]
_IOCTL = LAYOUTS["ioctl_in"]
_NOTHING_THERE = (errno.EAGAIN, errno.EINTR, errno.ENOENT)


class Aside:
    """Reads requests beside the loop. On the loop but for what says otherwise."""

    def __init__(self, source: int, size: int, overlay: Overlay, handle: Callable[[Request], None]) -> None:
        self.source = source
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._overlay = overlay
        self._handle = handle
        self._left: deque[bytes] = deque()
        self._token = trio.lowlevel.current_trio_token()

    def begin(self) -> None:
        """Somebody stands in. In the thread, while the loop waits."""
        self._overlay.keep_open(True)

    def take(self) -> None:
        """Read one request; answer it, or put it aside. In the thread, while the loop waits."""
        try:
            length = os.readv(self.source, [self._buffer])
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                return
            raise
        request = received(self._buffer, self._view, length)
        if request.op in HARMLESS or _only_looks(request):
            self._handle(request)
        else:
            self._left.append(bytes(self._view[:length]))

    def end(self) -> None:
        """Nobody stands in any more. In the thread, before the loop goes on."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._catch_up, idempotent=True)

    def _catch_up(self) -> None:
        self._overlay.keep_open(False)
        while self._left:
            raw = bytearray(self._left.popleft())
            self._handle(received(raw, memoryview(raw), len(raw)))


def _only_looks(request: Request) -> bool:
    """Return whether a request of a kind that may change something does not; one that is cut short may."""
    if request.op == Op.OPEN and len(request.body) >= _OPEN.size:
        flags: int = _OPEN.unpack_from(request.body)[0]
        return flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY
    if request.op == Op.IOCTL and len(request.body) >= _IOCTL.size:
        return _IOCTL.unpack_from(request.body)[2] not in CHANGING_REQUESTS
    return False
