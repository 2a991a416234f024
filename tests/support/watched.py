"""File systems on a disk that records writes, and can be made to fail (tests/support/diskserver.py)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.support import disks, loops, syscalls, writelog
from tests.support.polling import until
from tests.support.requirements import need_filesystem, need_program, need_root
from tests.support.writelog import Event, State

ROOT = Path(__file__).parents[2]
KINDS = ("ext4", "xfs", "btrfs")


@dataclass
class WatchedDisk:
    """A disk with a file system, mounted at `point`; the file `base` is the image before the log begins."""

    kind: str
    place: Path
    options: str
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def point(self) -> Path:
        """The mount point of the file system."""
        return self.place / "mnt"

    def mark(self, text: str) -> None:
        """Append a mark to the log."""
        writelog.append(self._log, writelog.MARK, 0, text.encode())

    def behave(self, words: str) -> None:
        """Set the behaviour of the disk from now on."""
        # Replaced in one step, so that the disk never reads a part of it.
        fresh = self.place / "control.new"
        fresh.write_text(words)
        fresh.rename(self.place / "control")

    def sync(self) -> None:
        """Make all of the file system durable.

        xfs sends the disk no flush at syncfs(2) when nothing but data was dirty (seen with Linux 6.18), so the disk is
        flushed as well.
        """
        for path, sync in ((self.point, syscalls.syncfs), (self._device, os.fsync)):
            fd = os.open(path, os.O_RDONLY)
            try:
                sync(fd)
            finally:
                os.close(fd)

    def recording(self) -> "Recording":
        """Return the writes so far; the disk must be closed, or idle."""
        return Recording(self.kind, self.place, writelog.read(self.place / "log"))

    def begin(self) -> None:
        """Make and mount the file system."""
        for name in ("server", "mnt"):
            (self.place / name).mkdir()
        make_image(self.kind, self.place / "image")
        copy_image(self.place / "image", self.place / "base")
        self._log = os.open(self.place / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, self._log)
        self.behave("")
        self._stack.enter_context(_served(self.place))
        self._stack.callback(self.behave, "")
        disk = self.place / "server" / "disk"
        mounted = loops.mounted(self.kind, disk, self.point, self.options, direct=True)
        self._device = self._stack.enter_context(mounted)

    def end(self) -> None:
        """Unmount, and stop the disk."""
        self._stack.close()


@contextmanager
def _served(place: Path) -> Iterator[None]:
    names = [str(place / name) for name in ("image", "log", "control", "server")]
    command = [sys.executable, "-m", "tests.support.diskserver", *names]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is not None or os.path.ismount(place / "server"))
        assert process.poll() is None, "the disk did not start"
        yield
    finally:
        if os.path.ismount(place / "server"):
            syscalls.umount(os.fsencode(place / "server"))
        process.wait(20)


@contextmanager
def watched(kind: str, place: Path, options: str = "") -> Iterator[WatchedDisk]:
    """Yield a new file system of this kind in `place`, which must not exist and should be on a tmpfs."""
    need_root()
    need_filesystem(kind)
    place.mkdir()
    disk = WatchedDisk(kind, place, options)
    try:
        disk.begin()
        yield disk
    finally:
        disk.end()


def make_image(kind: str, image: Path) -> None:
    """Make an empty file system in a file."""
    need_program(disks.MAKE[kind][0], "losetup")
    with open(image, "wb") as file:
        file.truncate(disks.SIZE.get(kind, 64 << 20))
    subprocess.run([*disks.MAKE[kind], str(image)], check=True, capture_output=True)


def copy_image(source: Path, target: Path) -> None:
    """Copy an image with zeros as holes: a new file system then takes little space."""
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)


def _copy_extents(source: Path, target: Path) -> None:
    """Copy an image and keep its holes."""
    with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        end = 0
        with suppress(OSError):  # ENXIO: nothing but a hole up to the end
            while end < size:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
                end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
                os.pwrite(new.fileno(), os.pread(old.fileno(), end - start, start), start)


class Recording:
    """The history of a disk, from which its state at any moment can be rebuilt."""

    def __init__(self, kind: str, place: Path, events: list[Event]) -> None:
        self.kind = kind
        self.events = events
        self._base = place / "base"
        self._settled = place / "settled"  # an image of the events up to `_at`
        self._cut = place / "cut"
        self._point = place / "replayed"
        self._at = 0
        self._marks = {event.data: at for at, event in enumerate(events) if event.kind == writelog.MARK}
        self._point.mkdir(exist_ok=True)
        copy_image(self._base, self._settled)

    def marked(self, text: str) -> int:
        """Return the number of the event that is this mark."""
        return self._marks[text.encode()]

    def states(self, first: int, end: int, random: Random) -> Iterator[State]:
        """Yield the states of a power cut between two events."""
        return writelog.states(self.events, first, end, random)

    @contextmanager
    def after(self, state: State) -> Iterator[Path]:
        """Yield the file system, mounted in the state after a power cut. States must be in the order of the log."""
        self._advance(state.settled)
        self._cut.unlink(missing_ok=True)
        _copy_extents(self._settled, self._cut)
        self._apply(self._cut, state.kept)
        with loops.mounted(self.kind, self._cut, self._point):
            yield self._point

    def _advance(self, settled: int) -> None:
        self._apply(self._settled, tuple(range(self._at, settled)))
        self._at = settled

    def _apply(self, image: Path, numbers: tuple[int, ...]) -> None:
        with open(image, "r+b", buffering=0) as file:
            for event in (self.events[at] for at in numbers):
                if event.kind == writelog.WRITE:
                    os.pwrite(file.fileno(), event.data, event.offset)
