"""Runs our command line quickly: a process that has all modules loaded forks for each command.

Commands behave as for users; the program itself forks the daemon of a mount. `mutant` is a planted bug for the command
and its daemon (tests/support/mutants).
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, Self

from overlayfs.mount import mounts
from tests.support import processes, syscalls

DETACH = 2


class Launcher:
    """The process that forks, a context manager that ends it; daemons must be ended by the caller."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, mutant: str = "") -> tuple[int, str]:
        """Run a command; return its exit code and its output on both streams."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([mutant, *words]) + "\n")
        self._process.stdin.flush()
        code, output = json.loads(self._process.stdout.readline())
        return int(code), str(output)

    def mount(self, point: Path, *words: str, mutant: str = "") -> int:
        """Mount in the background with further arguments; return the pid of the daemon, which is our child."""
        code, output = self.run("mount", "-q", *words, str(point), mutant=mutant)
        assert code == 0, f"cannot mount: {output}"
        pid = mounts.find(os.fsencode(point)).pid
        assert pid is not None
        return pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def end(point: Path, pid: int) -> int:
    """Unmount and return the exit code of the daemon."""
    syscalls.umount(os.fsencode(point))
    return processes.reap(pid)


def clear(point: Path, pid: int) -> None:
    """Kill a daemon if it still runs, and remove its mount."""
    if pid in processes.children():
        os.kill(pid, signal.SIGKILL)
        processes.reap(pid)
    while os.fsencode(point) in {mount.mountpoint for mount in mounts.list_mounts()}:
        syscalls.umount(os.fsencode(point), DETACH)


# --- the process that forks ----------------------------------------------------------------------------------


def _serve() -> None:
    _load()
    for line in sys.stdin:
        mutant, *words = json.loads(line)
        print(json.dumps(_forked(mutant, words)), flush=True)


def _load() -> None:
    """Import modules that commands import lazily."""
    importlib.import_module("tests.support.mutants")


def _forked(mutant: str, words: list[str]) -> tuple[int, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _become(mutant, words, writing)
    os.close(writing)
    with open(reading, errors="replace") as stream:
        output = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def _become(mutant: str, words: list[str], output: int) -> NoReturn:
    from overlayfs_cli.main import main
    from tests.support.mutants import seeded

    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(null)
        os.close(output)
        sys.argv = ["overlayfs", *words]
        with seeded(mutant) if mutant else contextlib.nullcontext():
            code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
