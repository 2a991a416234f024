"""Progress of long work: lines on standard error that are renewed in place, on a terminal and nowhere else."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

PERIOD = 0.2  # seconds between two states of the line; shorter ones cannot be read
PATIENCE = 0.5  # seconds of work that needs no line

Show = Callable[[str], None]
ShowLine = Callable[[str, str], None]


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


@contextlib.contextmanager
def board(quiet: bool = False) -> Iterator[ShowLine]:
    """Give a function, for any thread, that sets the text in the line of a key; all lines are wiped at the end."""
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
    """Several lines, renewed together, no more than the terminal has: older ones give way."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._drawn = 0

    def show(self, key: str, text: str) -> None:
        self._texts[key] = text

    def renew(self, done: threading.Event) -> None:
        """Draw the lines again and again, first after some patience; at the end they are wiped."""
        done.wait(PATIENCE)
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


def layer_text(layer: int, layers: int, done: int) -> str:
    """Return how far work on the layers of an image is; no layers: they are not known yet."""
    where = f"layer {layer} of {layers}, " if layers else ""
    return f"{where}{done >> 20} MiB"


def note(sentence: str) -> None:
    """Tell what is left out, on standard error, past a line of progress."""
    wipe = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{wipe}overlayfs: note: {sentence}\n")


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
