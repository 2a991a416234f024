"""Requirements of a test on the machine: a test is skipped with the reason, or fails where CI=true promises all."""

import os
import shutil
from typing import NoReturn

import pytest


def strict() -> bool:
    """Return whether a skip counts as a failure: set CI=true where everything must be present."""
    return os.environ.get("CI", "").lower() == "true"


def unavailable(reason: str) -> NoReturn:
    """Skip this test with a reason."""
    pytest.skip(reason)


def need(present: bool, reason: str) -> None:
    """Skip the test unless `present`; `reason` names what is missing."""
    if not present:
        unavailable(reason)


def need_root() -> None:
    """Skip the test unless it runs as root."""
    need(os.geteuid() == 0, "needs root: it mounts, makes devices and changes owners")


def need_program(*names: str) -> None:
    """Skip the test unless every program is on the PATH."""
    for name in names:
        need(shutil.which(name) is not None, f"needs the program {name}")


def need_filesystem(name: str) -> None:
    """Skip the test unless the kernel supports this kind of file system."""
    with open("/proc/filesystems", encoding="ascii") as file:
        known = {line.split()[-1] for line in file}
    need(name in known, f"needs kernel support for {name}")
