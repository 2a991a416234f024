"""Mounts of our program, started as users start them; every daemon is waited for at the end of its test."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from tests.mounted.scene import MODULES
from tests.support import engines, processes, syscalls
from tests.support.fork_server import ForkServer
from tests.support.polling import until
from tests.support.requirements import need, need_root

PROGRAM = str(Path(sys.executable).with_name("overlayfs"))
ROOT = Path(__file__).parents[2]
DETACH = 2


class Stack:
    """Directories for one mount: two lower layers, an upper, a work directory and a mount point."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("top", "low", "u", "w", "m"):
            (base / name).mkdir(parents=True)
        self.upper, self.work, self.point = base / "u", base / "w", base / "m"
        self.lower = [f"{base}/top", f"{base}/low"]
        (base / "top" / "t").write_bytes(b"top")
        (base / "low" / "d").mkdir()
        (base / "low" / "d" / "f").write_bytes(b"low" * 1000)

    @property
    def options(self) -> str:
        """The option string of the mount."""
        lower = ":".join(self.lower)
        return engines.option(f"lowerdir={lower},upperdir={self.upper},workdir={self.work}")

    def command(self, *flags: str, options: str = "", point: Path | None = None) -> list[str]:
        """The command line that mounts it."""
        text = f"{self.options},{options}" if options else self.options
        return [PROGRAM, "mount", *flags, "-o", text, str(point or self.point)]


class Mount:
    """One stack and the daemons that were started for it."""

    def __init__(self, base: Path) -> None:
        self.stack = Stack(base)
        self.point = self.stack.point
        self.pids: list[int] = []
        self.running: list[subprocess.Popen[str]] = []

    @property
    def pid(self) -> int:
        """The newest daemon."""
        return self.pids[-1]

    def start(self, *flags: str, options: str = "", point: Path | None = None) -> None:
        """Mount in the background; fail with the program's message."""
        done = self.attempt(*flags, options=options, point=point)
        assert done.returncode == 0, done.stderr

    def attempt(self, *flags: str, options: str = "", point: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Try to mount in the background, and record the daemon that starts; a daemon that failed must end."""
        before = processes.children()
        command = self.stack.command(*flags, options=options, point=point)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode == 0:
            self.note_daemons(before)
        else:
            processes.reap_since(before)
        return done

    def note_daemons(self, before: set[int]) -> None:
        """Record new children of this process as daemons."""
        self.pids += sorted(processes.children() - before)

    def foreground(
        self,
        *flags: str,
        options: str = "",
        environment: dict[str, str] | None = None,
        log: IO[str] | int = subprocess.PIPE,
    ) -> "Foreground":
        """Mount in the foreground and return when it answers; `log` takes more output than an unread pipe."""
        command = self.stack.command("-f", *flags, options=options)
        return self._watch(command, log, environment or {})

    def faulty(self, fault: Path, log: IO[str]) -> "Foreground":
        """Mount in the foreground with verbs that fail as the file `fault` says; no data bypasses them."""
        options = f"{self.stack.options},io=cached"
        command = [sys.executable, "-m", "tests.mounted.faulty", str(fault), options, str(self.point)]
        return self._watch(command, log, {})

    def wrong(self, fault: str, options: str) -> "Foreground":
        """Mount in the foreground by an engine that is wrong in one way (tests/mounted/wrong.py)."""
        words = f"{self.stack.options},{options}"
        command = [sys.executable, "-m", "tests.mounted.wrong", fault, words, str(self.point)]
        return self._watch(command, subprocess.DEVNULL, {})

    def mutant(self, name: str) -> "Foreground":
        """Mount in the foreground by a program that has a planted bug (tests/support/mutants)."""
        command = [sys.executable, "-m", "tests.support.mutants", name, self.stack.options, str(self.point)]
        return self._watch(command, subprocess.DEVNULL, {})

    def _watch(self, command: list[str], errors: IO[str] | int, environment: dict[str, str]) -> "Foreground":
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
        )
        self.running.append(process)
        until(lambda: process.poll() is not None or os.path.ismount(self.point))
        assert process.poll() is None, process.communicate()[1]
        return Foreground(process)

    def unmount(self) -> int:
        """Unmount as umount(8) does and return the exit code of the daemon."""
        syscalls.umount(os.fsencode(self.point))
        return processes.reap(self.pids.pop())

    def finish(self) -> None:
        """End daemons and mounts that a failed test has left."""
        for point in (self.point, *self.stack.base.glob("m?")):
            with suppress(OSError):
                while True:
                    syscalls.umount(os.fsencode(point), DETACH)
        for process in self.running:
            _end(process)
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                processes.reap(pid)


class Foreground:
    """A mount in the foreground."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def ended(self) -> tuple[int, str]:
        """Wait for the end; exit code and log."""
        _, written = self.process.communicate(timeout=20)
        return self.process.returncode, written


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture
def make_mount(place: Path) -> Iterator[Callable[[], Mount]]:
    """Factory of mounts with directories of their own."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    made: list[Mount] = []

    def make() -> Mount:
        made.append(Mount(place / f"s{len(made)}"))
        return made[-1]

    yield make
    for mount in made:
        mount.finish()


@pytest.fixture
def mount(make_mount: Callable[[], Mount]) -> Mount:
    """One mount, not started."""
    return make_mount()


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """A fork server for daemons."""
    need_root()
    with ForkServer(*MODULES) as started:
        yield started
