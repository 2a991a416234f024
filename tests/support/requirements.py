"""What a test needs of the machine: missing things are skipped aloud, and fail where CI says that all is there."""

import os
import shutil
from typing import NoReturn

import pytest


def strict() -> bool:
    """Whether a skip counts as a failure: set CI=true where everything must be present."""
    return os.environ.get("CI", "").lower() == "true"


def unavailable(reason: str) -> NoReturn:
    """Skip this test and say why."""
    pytest.skip(reason)


def need(present: bool, reason: str) -> None:
    """Go on only if `present`; `reason` says what is missing."""
    if not present:
        unavailable(reason)


def need_root() -> None:
    """Go on only as root."""
    need(os.geteuid() == 0, "needs root: it mounts, makes devices and changes owners")


def need_program(*names: str) -> None:
    """Go on only if every program is on the PATH."""
    for name in names:
        need(shutil.which(name) is not None, f"needs the program {name}")


def need_filesystem(name: str) -> None:
    """Go on only if the kernel knows this kind of file system."""
    with open("/proc/filesystems", encoding="ascii") as file:
        known = {line.split()[-1] for line in file}
    need(name in known, f"needs kernel support for {name}")
