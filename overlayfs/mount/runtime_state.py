"""Runtime state: one small JSON file, the record, and one socket for each running daemon.

They are in /run/overlayfs for root and in $XDG_RUNTIME_DIR/overlayfs for users, mode 0700, and only describe: a mount
works without them. A record whose process is gone is stale, and removed by the next program that reads it. Paths are
text in the surrogateescape form of `os.fsdecode`, so that any byte survives JSON.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class WrittenDirectory(NamedTuple):
    """A directory that a mount writes to.

    what: "upper" or "work directory". path: as the user named it. device: major:minor of its file system. place: its
    path from the root of that file system.
    """

    what: str
    path: str
    device: str
    place: str


@dataclass(frozen=True)
class Record:
    """The description of a mount by its daemon.

    started: when the process started, in clock ticks since boot. device: major:minor, as in mountinfo. image,
    workspace, store: set for a mount of an image. written: the upper and the work directory.
    """

    pid: int
    started: int
    mountpoint: str
    device: str
    source: str
    lower: tuple[str, ...]
    upper: str | None
    work: str | None
    engine: str
    notices: tuple[str, ...] = ()
    image: str | None = None
    workspace: str | None = None
    store: str | None = None
    written: tuple[WrittenDirectory, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether the process that wrote the record still exists (a reused pid has another start time)."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (field 22 of proc_pid_stat(5)); None if it is gone.

    A process that was killed but cannot end still exists: a thread of it keeps its descriptors and locks.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # The first thread is counted even after it has ended, as a zombie.
    gone = fields[_STATE] in _ENDED and int(fields[_THREADS]) <= 1
    return None if gone else int(fields[_STARTED])


_BACKLOG = 16  # clients that wait while the daemon starts to serve them
_STATE, _THREADS, _STARTED = 0, 17, 19  # fields after the name of the program
_ENDED = (b"Z", b"X")


def is_dying(pid: int) -> bool:
    """Return whether a process was killed but cannot end, since a thread of it waits uninterruptibly.

    Its first thread may have ended, or be the one that waits (proc_pid_status(5)).
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return False
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    killed = any(int(status[name][0], 16) & _KILLED for name in ("SigPnd", "ShdPnd"))
    return killed or (status["State"][0] in "ZX" and int(status["Threads"][0]) > 1)


_KILLED = 1 << (signal.SIGKILL - 1)


def run_directory() -> Path:
    """Return the directory of the records of this user; it need not exist."""
    if os.geteuid() == 0 and _owns_run():
        return Path("/run/overlayfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "overlayfs" if base else Path(tempfile.gettempdir()) / f"overlayfs-{os.geteuid()}"


def _owns_run() -> bool:
    """Return whether /run belongs to root as this process sees it: in a user namespace, root may be a mapped user."""
    try:
        return Path("/run").stat().st_uid == 0
    except OSError:
        return False


def make_run_directory() -> Path:
    """Return the directory, created if need be. PermissionError if other users can write to it."""
    directory = run_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(directory):
        raise PermissionError(f"{directory} must belong to uid {os.geteuid()} with mode 0700")
    return directory


def _is_private(directory: Path) -> bool:
    """Return whether only this user can write here: without XDG_RUNTIME_DIR the directory is in /tmp."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def record_path(pid: int) -> Path:
    """Return the path of the record of a daemon."""
    return run_directory() / f"{pid}.json"


def socket_path(pid: int) -> Path:
    """Return the path of the control socket of a daemon."""
    return run_directory() / f"{pid}.sock"


def listen(pid: int) -> socket.socket:
    """Return the listening control socket of a daemon; clients can connect from now on."""
    path = socket_path(pid)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(os.fsencode(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def write(record: Record) -> None:
    """Write a record atomically, and remove those of dead daemons."""
    read_all()
    temporary = make_run_directory() / f"{record.pid}.tmp"
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(dataclasses.asdict(record)) + "\n")
    temporary.rename(record_path(record.pid))


def remove(pid: int) -> None:
    """Remove the record and the socket of a daemon, if they exist."""
    for path in (record_path(pid), socket_path(pid)):
        with contextlib.suppress(OSError):
            path.unlink()


def read_all() -> list[Record]:
    """Return the records of running daemons and remove those of dead ones."""
    directory = run_directory()
    if not _is_private(directory):
        return []
    return [record for path in sorted(directory.glob("*.json")) if (record := _read(path))]


def _read(path: Path) -> Record | None:
    try:
        fields = json.loads(path.read_text())
        fields.update(lower=tuple(fields["lower"]), notices=tuple(fields["notices"]))
        fields.update(written=tuple(WrittenDirectory(*each) for each in fields.get("written", ())))
        record = Record(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if record.alive:
        return record
    remove(record.pid)
    return None
