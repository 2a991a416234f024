"""What only a person at a terminal sees: progress, and Ctrl-C in the middle of long work."""

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from overlayfs_cli import progress
from tests.cli.conftest import program
from tests.support import requirements

LIMIT = 60.0


class Terminal:
    """Standard error of a program, as a terminal."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        self._seen = b""

    def started(self) -> None:
        """The program has its own copy of the terminal; from now on its end is the end."""
        os.close(self.theirs)

    def wait_for(self, text: bytes) -> None:
        """Read until a text has come."""
        deadline = time.monotonic() + LIMIT
        while text not in self._seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self._seen
            self._seen += os.read(self._ours, 4096)

    def rest(self) -> bytes:
        """Read to the end and return all that was ever written."""
        try:
            while part := os.read(self._ours, 4096):
                self._seen += part
        except OSError:  # EIO: the program has closed its end
            pass
        os.close(self._ours)
        return self._seen


@pytest.fixture
def upper(place: Path) -> Path:
    """A directory with a layer `a` and an upper `u` that takes seconds to commit; gives the directory."""
    requirements.need_root()
    (place / "a").mkdir()
    for number in range(150):
        directory = place / "u" / str(number)
        directory.mkdir(parents=True)
        for name in range(100):
            (directory / str(name)).write_bytes(b"content")
    return place


def commit(place: Path, terminal: Terminal) -> subprocess.Popen[bytes]:
    words = [program("overlayfs"), "commit", "--upper", "u", "--lower", "a", "--to", "new"]
    process = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=terminal.theirs)
    terminal.started()
    return process


def test_progress_is_shown_and_wiped(upper: Path) -> None:
    terminal = Terminal()
    process = commit(upper, terminal)
    terminal.wait_for(b" entries, 0 MiB, ")
    out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, os.fsencode(upper / "new") + b"\n")
    assert terminal.rest().endswith(b"\r\x1b[K")


def test_an_interrupted_commit_leaves_nothing(upper: Path) -> None:
    terminal = Terminal()
    process = commit(upper, terminal)
    terminal.wait_for(b" entries, ")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in terminal.rest()
    assert sorted(os.listdir(upper)) == ["a", "u"]


def test_no_progress_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.line() as show, progress.waiting("working"):
        show("1 entry")
    assert capsys.readouterr() == ("", "")
