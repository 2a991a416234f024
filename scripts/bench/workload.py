"""Workloads: an action in a tree, its preparation, and a check of its result."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.site import Site
from overlayfs_cli.benchmark.contenders import Contender


class WrongError(Exception):
    """A workload did not do its work; the message names what is missing."""


@dataclass
class Trial:
    """One run: its tree, and the results that the workload records itself."""

    root: Path
    site: Site
    contender: Contender
    seen: bytes = b""  # the output of the timed command
    value: float | None = None  # measured by the workload itself, in the unit of the workload
    remembered: object = None  # passed from `before` to `act` and `check`

    def path(self, name: str) -> Path:
        """Return a path in the tree."""
        return self.root / name

    def shell(self, script: str) -> None:
        """Run lines of shell in the root of the tree; $A is the directory of what was prepared."""
        done = subprocess.run(
            ["sh", "-ec", script],
            cwd=self.root,
            env=_environment(self.site),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        self.seen = done.stdout
        if done.returncode:
            raise WrongError(done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}")

    def lines(self) -> int:
        """Return how many lines the timed command printed."""
        return self.seen.count(b"\n")


def _environment(site: Site) -> dict[str, str]:
    """Return a fixed environment, so that settings of the user do not affect the measurement."""
    return {
        "A": str(site.assets),
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(site.assets),
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
    }


Step = Callable[[Trial], None]


def nothing(trial: Trial) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Workload:
    """One thing to measure. `content` names the content of the layers.

    `cold`: between `before` and `act` the mount ends, the kernel drops its caches, and a new mount begins.
    `tool`: a command that is run outside the tree before a cold `act`, so that the program itself is in memory.
    """

    name: str
    group: str
    content: str
    act: Step
    check: Step = nothing
    before: Step = nothing
    cold: bool = False
    tool: tuple[str, ...] = ()
    changes: bool = True  # the plain directory must be copied for each run
    copies_up: bool = True  # it changes or hides files of layers
    unit: str = "s"
    more_is_better: bool = False
    only: tuple[str, ...] = field(default=())  # kinds of contenders, if not all of them


def shell(script: str) -> Step:
    """Return a step that is lines of shell in the root of the tree."""
    return lambda trial: trial.shell(script)


def expect(holds: bool, what: str) -> None:
    """Raise WrongError with the message `what` unless `holds`."""
    if not holds:
        raise WrongError(what)


def expect_lines(count: int) -> Step:
    """Return a check that the timed command printed as many lines as it must."""
    return lambda trial: expect(trial.lines() == count, f"{trial.lines()} lines were printed instead of {count}")


def expect_tree(name: str, files: int, size: int) -> Step:
    """Return a check that a directory holds as many files and as many bytes as it must."""

    def check(trial: Trial) -> None:
        found = [path.lstat().st_size for path in trial.path(name).rglob("*") if path.is_file()]
        expect(len(found) == files, f"{name} has {len(found)} files instead of {files}")
        expect(sum(found) == size, f"{name} has {sum(found)} bytes instead of {size}")

    return check


def expect_gone(name: str) -> Step:
    """Return a check that a name no longer exists."""
    return lambda trial: expect(not trial.path(name).exists(), f"{name} is still there")


def seconds_of(step: Callable[[], object]) -> float:
    """Return how long something takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun
