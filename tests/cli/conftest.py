"""Running the two programs inside this process, and as processes of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayfs_cli import main, mount_helper


class Ended(NamedTuple):
    """How a program ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def overlayfs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `overlayfs` with the given words, in this process."""

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["overlayfs", *words])
        return Ended(main.main(), *capsys.readouterr())

    return run


@pytest.fixture
def overlayfs_mount(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `overlayfs-mount` with the given words, in this process; `called` is the name it is called by."""

    def run(*words: str, called: str = "overlayfs-mount") -> Ended:
        monkeypatch.setattr(sys, "argv", [called, *words])
        return Ended(mount_helper.main(), *capsys.readouterr())

    return run


def program(name: str) -> str:
    """Return the path of an installed console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def process(name: str, *words: str | bytes, cwd: Path | None = None, timeout: float = 60) -> Ended:
    """Run an installed program as a process of its own."""
    done = subprocess.run(
        [program(name), *words], capture_output=True, text=True, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL
    )
    return Ended(done.returncode, done.stdout, done.stderr)
