"""Catching what a C library writes to standard error while it fails."""

import contextlib
import os
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], bytes]]:
    """Send descriptor 2 to memory within the context; the value returns what was written so far.

    Programs started meanwhile inherit it. Not for a process with other threads that write to descriptor 2.
    """
    memory = os.memfd_create("stderr")
    saved = os.dup(2)
    try:
        os.dup2(memory, 2)
        yield lambda: os.pread(memory, 1 << 16, 0)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(memory)
