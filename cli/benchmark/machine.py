"""The machine a measurement was made on, and what else it was doing."""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from overlayfs_cli.benchmark.contenders import Contender


def describe() -> dict[str, Any]:
    """Return what the times depend on: kernel, processor, cores, memory, Python, libfuse and distribution."""
    return {
        "kernel": platform.release(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(_field("/proc/meminfo", "MemTotal").split()[0]) >> 10,
        "python": platform.python_version(),
        "fuse": _version(("fusermount3", "--version")),
        "system": _field("/etc/os-release", "PRETTY_NAME", "=").strip('"'),
        "virtual": "hypervisor" in _field("/proc/cpuinfo", "flags"),
    }


def _field(path: str, name: str, separator: str = ":") -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(separator)[2].strip() for line in lines if line.partition(separator)[0].strip() == name)
    return next(found, "")


def load() -> dict[str, Any]:
    """Return how busy the machine is: the load averages, and how long tasks had to wait (in percent, ten seconds)."""
    waits = {kind: _pressure(kind) for kind in ("cpu", "io", "memory")}
    return {"average": [round(each, 2) for each in os.getloadavg()], "pressure": waits}


def _pressure(kind: str) -> float | None:
    try:
        first = Path(f"/proc/pressure/{kind}").read_text().split()
    except OSError:  # a kernel without pressure stall information
        return None
    return float(first[1].partition("=")[2])


def warning() -> str:
    """Return a sentence if the machine is too busy for figures that mean something; empty otherwise."""
    now = os.getloadavg()[0]
    allowed = max(1.0, 0.5 * len(os.sched_getaffinity(0)))
    return f"the machine is busy (load {now:.1f}): ratios may be off, times certainly are" if now > allowed else ""


def version(contender: Contender) -> str:
    """Return the line in which a contender prints its version; empty if it has none."""
    helper = contender.command[0] if contender.command else ""
    if not helper or helper == "mount":
        return ""
    return _version((helper, "--version"))


def _version(words: tuple[str, ...]) -> str:
    if not shutil.which(words[0]):
        return ""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if any(map(str.isdigit, line))]
    own = [line for line in lines if line.startswith(os.path.basename(words[0]))]
    return next(iter([*own, *lines]), "")


def commit() -> str:
    """Return the commit that is measured, with a plus sign if the work tree differs from it."""
    root = Path(__file__).resolve().parents[2]
    words = ("git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def now() -> str:
    """Return the time, in UTC, as RFC 3339 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def filesystem(place: Path) -> str:
    """Return the type of the file system of a directory."""
    words = ("findmnt", "-n", "-o", "FSTYPE", "-T", str(place))
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
