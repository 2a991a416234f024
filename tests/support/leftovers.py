"""The last check of a test run: no mount, process or loop device of it is left."""

import json
import subprocess
from pathlib import Path

from tests.support import processes

ENDING = 5.0  # seconds


def mounts_below(base: Path) -> list[str]:
    """Return the mount points below a directory, innermost first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split()[4].replace("\\040", " ") for line in file]
    return sorted((point for point in points if _is_below(point, base)), key=len, reverse=True)


def loops_below(base: Path) -> list[str]:
    """Return the loop devices whose image is below a directory."""
    done = subprocess.run(["losetup", "--list", "--json"], capture_output=True, text=True, check=True)
    devices = json.loads(done.stdout)["loopdevices"] if done.stdout.strip() else []
    return [device["name"] for device in devices if _is_below(str(device["back-file"]), base)]


def _is_below(path: str, base: Path) -> bool:
    return path == str(base) or path.startswith(f"{base}/")


def leftovers(base: Path, children_before: set[int]) -> list[str]:
    """Return one line for each thing left behind."""
    lines = [f"still mounted: {point}" for point in mounts_below(base)]
    lines += [f"still attached: {device}" for device in loops_below(base)]
    ours = processes.children() - children_before
    # A daemon that was just unmounted may still be ending; orphans stay zombies until they are waited for.
    lines += [f"still running: {pid} {processes.command(pid)}" for pid in ours if not processes.ends(pid, ENDING)]
    return lines
