"""A mount whose upper is on a disk that can be made to fail, to stall, or to be slow."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overlayfs import Overlay
from tests.crash.harness import View, view
from tests.crash.power.session import Mounter, Stack, mounted
from tests.support import loops, processes
from tests.support.watched import WatchedDisk, watched

LOWER = {"a": 60_000, "b": 60_000, "c": 60_000, "d/x": 5_000, "d/y": 5_000}
ENDING = 10.0  # seconds that a daemon has after SIGTERM


@dataclass
class Rig:
    """The disk, the mount at `point`, and the daemon."""

    disk: WatchedDisk
    stack: Stack
    point: Path
    daemon: "subprocess.Popen[bytes]"

    def end(self) -> int:
        """End the daemon as an administrator does; it has ten seconds."""
        os.kill(self.daemon.pid, signal.SIGTERM)
        assert processes.ends(self.daemon.pid, ENDING), "SIGTERM did not end the daemon in time"
        return self.daemon.wait()


@contextmanager
def rigged(
    kind: str,
    memory: Path,
    mounter: Mounter,
    options: str = "",
    inside: str = "",
    build: Callable[[Path], object] = lambda _: None,
) -> Iterator[Rig]:
    """A stack of a lower layer beside the disk and an upper on it, mounted. `memory`: an empty place.

    inside: a subvolume of btrfs that has upper and work. build: makes more of the lower layer.
    """
    stack = Stack(memory, False, inside)
    for name, size in LOWER.items():
        path = memory / "lower" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name[-1].encode() * size)
    build(memory / "lower")
    point = memory / "mount"
    point.mkdir()
    with watched(kind, memory / "disk", options) as disk:
        if inside:
            subprocess.run(["btrfs", "subvolume", "create", str(disk.point / inside)], check=True, capture_output=True)
        for name in ("up", "work"):
            (disk.point / inside / name).mkdir()
        disk.sync()
        try:
            with mounted(mounter(stack.options(disk.point), point), point) as daemon:
                yield Rig(disk, stack, point, daemon)
        finally:
            disk.behave("")


def left(rig: Rig) -> View:
    """Return what the stack shows after the disk was removed and attached again."""
    point = rig.stack.place / "again"
    point.mkdir()
    with loops.mounted(rig.disk.kind, rig.disk.place / "image", point):
        overlay = Overlay(rig.stack.config(point))
        try:
            return view(overlay)
        finally:
            overlay.close()
