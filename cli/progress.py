"""Progress of long operations: lines on standard error, redrawn in place, and only on a terminal."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

from overlayfs.errors import one_line

PERIOD = 0.2  # seconds between redraws
DELAY = 0.5  # seconds before the first one; shorter operations show nothing

Show = Callable[[str], None]
ShowLine = Callable[[str, str], None]


@contextlib.contextmanager
def line(quiet: bool = False) -> Iterator[Show]:
    """Yield a function that shows a text on one line, which is erased at the end.

    Nothing is shown if `quiet`, or if standard error is not a terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        yield _renewed(time.monotonic())
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


@contextlib.contextmanager
def board(quiet: bool = False) -> Iterator[ShowLine]:
    """Yield a function that shows a text on the line of a key, for any thread; the lines are erased at the end."""
    if quiet or not sys.stderr.isatty():
        yield lambda key, text: None
        return
    lines, done = _Board(), threading.Event()
    clock = threading.Thread(target=lines.renew, args=(done,))
    clock.start()
    try:
        yield lines.show
    finally:
        done.set()
        clock.join()


class _Board:
    """Several lines that are redrawn together; if the terminal has fewer rows, the newest lines are shown."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._drawn = 0

    def show(self, key: str, text: str) -> None:
        self._texts[key] = text

    def renew(self, done: threading.Event) -> None:
        """Redraw the lines periodically until `done` is set; then erase them."""
        done.wait(DELAY)
        while not done.wait(PERIOD):
            self._draw()
        self._write([])

    def _draw(self) -> None:
        columns, rows = shutil.get_terminal_size()
        self._write([text[: columns - 1] for text in tuple(self._texts.values())][-max(1, rows - 1) :])

    def _write(self, lines: list[str]) -> None:
        up = f"\r\x1b[{self._drawn}A" if self._drawn else "\r"
        sys.stderr.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        sys.stderr.flush()
        self._drawn = len(lines)


def _renewed(start: float) -> Show:
    due = start + DELAY

    def show(text: str) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return
        due = now + PERIOD
        sys.stderr.write(f"\r{text}, {now - start:.0f} s\x1b[K")
        sys.stderr.flush()

    return show


def layer_text(layer: int, layers: int, done: int) -> str:
    """Return the text for `done` bytes of one of an image's layers; `layers` is 0 while it is not known."""
    where = f"layer {layer} of {layers}, " if layers else ""
    return f"{where}{done >> 20} MiB"


def note(sentence: str) -> None:
    """Print a notice to standard error, in place of a line of progress."""
    erase = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{erase}overlayfs: note: {one_line(sentence)}\n")


@contextlib.contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """Show the elapsed time of an operation that reports no progress."""
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
