"""Progress of long work: one line on standard error that is renewed in place, on a terminal and nowhere else."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

PERIOD = 0.2  # seconds between two states of the line; shorter ones cannot be read
PATIENCE = 0.5  # seconds of work that needs no line

Show = Callable[[str], None]


@contextlib.contextmanager
def line(quiet: bool = False) -> Iterator[Show]:
    """Give a function that shows a text; the line is wiped at the end. Silent off a terminal and when `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        yield _renewed(time.monotonic())
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _renewed(start: float) -> Show:
    due = start + PATIENCE

    def show(text: str) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return
        due = now + PERIOD
        sys.stderr.write(f"\r{text}, {now - start:.0f} s\x1b[K")
        sys.stderr.flush()

    return show


@contextlib.contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """Show how long something takes of which nothing else is known."""
    done = threading.Event()
    with line(quiet) as show:
        clock = threading.Thread(target=_tick, args=(show, text, done))
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()


def _tick(show: Show, text: str, done: threading.Event) -> None:
    while not done.wait(PERIOD):
        show(text)
