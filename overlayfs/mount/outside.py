"""Waiting for our own mount, within its daemon, without being in the way of its end.

A call on our own mount waits for an answer that this process gives, and in most places no signal ends the wait. If the
daemon is killed meanwhile, its other threads are gone, but the one that waits keeps the descriptors that all of them
share, /dev/fuse among them. So the kernel does not notice that nobody answers any more, and everybody who uses the
mount hangs for good. (This is the deadlock of Documentation/filesystems/fuse/fuse.rst of Linux, from the inside.)

So whatever may wait for our mount is done here: in a thread with a table of descriptors of its own, which /dev/fuse is
not in. When the daemon is killed the connection ends with the other threads, and with the connection the wait.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from overlayfs.mount import syscalls

R = TypeVar("R")


def run(work: Callable[[], R]) -> R:
    """Return what `work` returns, or raise what it raises; blocks.

    `work` has none of our descriptors but the standard streams: it opens what it needs, and must not log.
    """
    done: Future[R] = Future()
    threading.Thread(target=_carry_out, args=(work, done), name="outside", daemon=True).start()
    return done.result()


def _carry_out(work: Callable[[], R], done: Future[R]) -> None:
    # Refused by Linux before 5.9 and by some sandboxes: then the work is done as well as it can be.
    with contextlib.suppress(OSError):
        syscalls.leave_descriptors()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
