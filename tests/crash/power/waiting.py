"""Disks that block: a frozen file system, and the requests to a mount meanwhile."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.crash.power.rig import Rig

LIMIT = 10.0  # seconds after which something counts as hanging
_FREEZE, _THAW = 0xC004_5877, 0xC004_5878  # FIFREEZE and FITHAW of linux/fs.h

Act = Callable[[], object]


@contextmanager
def frozen(point: Path) -> Iterator[None]:
    """The file system at `point` takes no changes inside the block."""
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _THAW, 0)
    finally:
        os.close(fd)


class Running:
    """A call in a thread of its own, which may hang."""

    def __init__(self, act: Act) -> None:
        self._act = act
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error

    def hangs(self) -> bool:
        """Whether it is still running."""
        return self._thread.is_alive()

    def wrong(self, within: float = LIMIT) -> str:
        """Wait for the end; return why it did not come, or the error."""
        self._thread.join(within)
        if self._thread.is_alive():
            return "hangs"
        return repr(self._error) if self._error else ""


def waits_for_disk(pid: int) -> bool:
    """Whether a thread of a process is in an uninterruptible system call."""
    return any(_state(Path(task, "stat")) == "D" for task in Path(f"/proc/{pid}/task").iterdir())


def _state(stat: Path) -> str:
    return stat.read_text().rpartition(")")[2].split()[0]


def looks(rig: Rig) -> dict[str, Act]:
    """Calls that change nothing, on objects that have not been looked up and on known ones."""
    point = rig.point
    return {
        "read a lower file": (point / "b").read_bytes,
        "read a file of the upper": (point / "upper").read_bytes,
        "look up": lambda: os.lstat(point / "d" / "x"),
        "look for what is not there": (point / "d" / "unknown").exists,
        "list": lambda: os.listdir(point / "d"),
        "list what is above": lambda: os.listdir(point),
        "follow": lambda: os.readlink(point / "way"),
        "attribute": lambda: os.getxattr(point / "upper", "user.mark"),
        "space": lambda: os.statvfs(point),
    }


def changes(place: Path) -> dict[str, Act]:
    """One change of each kind, in a directory that is in the upper and in one that is not."""
    return {
        "mkdir": (place / "made").mkdir,
        "create": (place / "new").touch,
        "symlink": lambda: (place / "soft").symlink_to("x"),
        "chmod a lower file": lambda: (place / "lower1").chmod(0o600),
        "chmod an upper file": lambda: (place / "up1").chmod(0o600),
        "first write": lambda: (place / "lower2").write_bytes(b"2"),
        "write": lambda: (place / "up2").write_bytes(b"2"),
        "truncate": lambda: os.truncate(place / "lower3", 10),
        "link": lambda: os.link(place / "lower4", place / "hard"),
        "rename": lambda: os.rename(place / "lower5", place / "renamed"),
        "rename a directory": lambda: os.rename(place / "sub", place / "moved"),
        "unlink a lower file": (place / "lower6").unlink,
        "unlink an upper file": (place / "up3").unlink,
        "attribute": lambda: os.setxattr(place / "lower7", "user.mark", b"2"),
    }


def build(lower: Path) -> None:
    """Create what those changes need in the layer, a directory for each."""
    for name in changes(lower):
        _build(lower / name)


def _build(place: Path) -> None:
    (place / "sub").mkdir(parents=True)
    (place / "sub" / "in").write_bytes(b"in")
    for number in range(1, 8):
        (place / f"lower{number}").write_bytes(b"lower" * 100)


def prepare(rig: Rig, place: Path) -> None:
    """Create what they need in the upper, and what the looks need."""
    for number in range(1, 4):
        (place / f"up{number}").write_bytes(b"up" * 100)
    (rig.point / "upper").write_bytes(b"upper")
    os.setxattr(rig.point / "upper", "user.mark", b"1")
    if not (rig.point / "way").is_symlink():
        (rig.point / "way").symlink_to("b")
    rig.disk.sync()
