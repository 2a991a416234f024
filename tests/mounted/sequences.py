"""Short programs on one file, run on a mount and on a plain directory at once: the results must be the same."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random

SIZE = 300_000  # bytes; large enough for passthrough
PAGE = mmap.PAGESIZE

Result = object
Step = Callable[["Files"], Result]


class Files:
    """The descriptors and maps that one program has of the file `name`; duplicates and maps delay its close."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / name
        self.fds: list[int] = []
        self.maps: list[mmap.mmap] = []
        self.count = 0

    def open(self, flags: int) -> Result:
        self.fds.append(os.open(self.path, flags, 0o644))
        return None

    def newest(self) -> int:
        """The descriptor that was opened last."""
        if not self.fds:
            raise OSError(errno.EBADF, "nothing open")
        return self.fds[-1]

    def write(self, at: int | None) -> Result:
        """Write a mark that is unique, at an offset or at the descriptor's position."""
        self.count += 1
        data = b"<%03d>" % self.count
        return os.write(self.newest(), data) if at is None else os.pwrite(self.newest(), data, at)

    def map(self, shared_write: bool) -> Result:
        access = mmap.ACCESS_WRITE if shared_write else mmap.ACCESS_READ
        self.maps.append(mmap.mmap(self.newest(), PAGE, access=access))
        return self.maps[-1][:20]

    def store(self) -> Result:
        """Write through the newest shared map."""
        if not self.maps:
            raise OSError(errno.EBADF, "nothing mapped")
        try:
            self.maps[-1][3:8] = b"{map}"
        except TypeError:
            return "read-only"
        self.maps[-1].flush()
        return self.maps[-1][:20]

    def finish(self) -> None:
        """Close everything."""
        for each in self.maps:
            each.close()
        for fd in self.fds:
            os.close(fd)


def _close(files: Files) -> Result:
    if files.fds:
        os.close(files.fds.pop(0))
    return len(files.fds)


def _dup(files: Files) -> Result:
    files.fds.insert(0, os.dup(files.newest()))
    return None


def _fork(files: Files) -> Result:
    """A child writes through the descriptors it inherits and exits; the kernel releases its files later."""
    fd = files.newest()
    child = os.fork()
    if child == 0:
        try:
            os.pwrite(fd, b"(child)", 30)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return None


def _unlink(files: Files) -> Result:
    os.unlink(files.path)
    return None


def _rename(files: Files) -> Result:
    os.rename(files.path, files.path.with_suffix(".moved"))
    return None


def _look(files: Files) -> Result:
    """All that a program can see, by the name and through its descriptors."""
    found = os.fstat(files.newest())
    try:
        named: Result = os.stat(files.path).st_size
    except OSError as error:
        named = error.errno
    return found.st_size, found.st_nlink, named


def _content(files: Files) -> Result:
    with open(files.path, "rb", buffering=0) as file:
        return file.read(100), os.fstat(file.fileno()).st_size


STEPS: dict[str, Step] = {
    "open for reading": lambda files: files.open(os.O_RDONLY),
    "open for writing": lambda files: files.open(os.O_WRONLY),
    "open for both": lambda files: files.open(os.O_RDWR),
    "open to append": lambda files: files.open(os.O_RDWR | os.O_APPEND | os.O_CREAT),
    "open and cut": lambda files: files.open(os.O_RDWR | os.O_TRUNC | os.O_CREAT),
    "close the oldest": _close,
    "duplicate": _dup,
    "fork": _fork,
    "read": lambda files: os.pread(files.newest(), 60, 0),
    "write": lambda files: files.write(10),
    "write on": lambda files: files.write(None),
    "cut": lambda files: os.ftruncate(files.newest(), PAGE + 5),
    "map for reading": lambda files: files.map(False),
    "map for writing": lambda files: files.map(True),
    "store": Files.store,
    "unlink": _unlink,
    "rename": _rename,
    "look": _look,
    "content": _content,
}
OPENS = [name for name in STEPS if name.startswith("open")]
SHORT = [*OPENS, "close the oldest", "map for writing", "unlink", "content"]


def programs(seed: int, count: int) -> Iterator[tuple[str, ...]]:
    """Every sequence of three of the steps that change how the file is open, then longer random ones."""
    yield from ((*steps, "write", "content") for steps in product(SHORT, repeat=3) if steps[0] in OPENS)
    random = Random(seed)
    for _ in range(count):
        yield tuple(random.choice(OPENS) if random.random() < 0.3 else random.choice(list(STEPS)) for _ in range(14))


def outcome(step: Step, files: Files) -> Result:
    """The result of a step, or its errno."""
    try:
        return step(files)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ValueError as error:  # a file too short to be mapped
        return str(error)


def fill(directory: Path, name: str, size: int = SIZE) -> None:
    """Make the file of a program."""
    with open(directory / name, "wb") as file:
        file.write(bytes(range(65, 91)) * 2)
        file.truncate(size)


def differences(mounted: Path, plain: Path, name: str, steps: tuple[str, ...], data: bool = True) -> list[str]:
    """Run a program on both and return what differs; without `data` only which steps fail, and how."""
    lines = []
    files = (Files(mounted, name), Files(plain, name))
    try:
        for number, word in enumerate(steps):
            ours, theirs = (outcome(STEPS[word], each) for each in files)
            if not data:
                ours, theirs = (each if isinstance(each, str) else "done" for each in (ours, theirs))
            if ours != theirs:
                lines.append(f"{' / '.join(steps[: number + 1])}: ours {ours!r}, plain {theirs!r}")
    finally:
        for each in files:
            each.finish()
    return lines
