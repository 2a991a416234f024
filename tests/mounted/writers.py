"""Programs that write consecutive numbers, each in its own way, and know which ones were acknowledged."""

import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

LINE = 9  # bytes of one number
PIECE = 20  # numbers in a file that grows
SLOTS = 400  # numbers in a file that is used as a ring
Files = Mapping[str, Path]  # the content of a directory, by name


class Writer(ABC):
    """Writes 0, 1, 2... below its own directory, as fast as it can. `acknowledged`: how many writes have returned."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.acknowledged = 0
        self.error: OSError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self.directory.mkdir()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._opened:
                self.begin()
                while not self._ended.is_set():
                    self.write(self.acknowledged, b"%08d\n" % self.acknowledged)
                    self.acknowledged += 1
                self.finish()
        except OSError as error:
            self.error = error

    def begin(self) -> None:
        """Open what is needed throughout."""
        return

    def finish(self) -> None:
        """Check once more before everything is closed."""
        return

    @abstractmethod
    def write(self, number: int, line: bytes) -> None:
        """Write a number."""

    @staticmethod
    @abstractmethod
    def last(files: Files) -> int:
        """Return how many numbers the files hold; AssertionError or ValueError if one is missing."""

    def compare(self, files: Files, low: int, high: int) -> list[str]:
        """Return what is wrong unless the files hold the first `low` to `high` numbers."""
        try:
            found = self.last(files)
        except (AssertionError, ValueError) as error:
            return [f"{type(self).__name__}: {error}"]
        problem = f"{type(self).__name__}: {found} numbers are there, not {low} to {high}"
        return [] if low <= found <= high else [problem]


class NewFiles(Writer):
    """A new file for every few numbers."""

    def write(self, number: int, line: bytes) -> None:
        if number % PIECE == 0:
            self._opened.close()
            self._file = self._opened.enter_context((self.directory / f"{number:08}").open("wb", buffering=0))
        self._file.write(line)

    @staticmethod
    def last(files: Files) -> int:
        return _in_a_row(files, PIECE)


class Appended(Writer):
    """A log with O_APPEND, changed now and then."""

    def write(self, number: int, line: bytes) -> None:
        if number % SLOTS == 0:
            self._opened.close()
            self._file = self._opened.enter_context((self.directory / f"{number:08}").open("ab", buffering=0))
        self._file.write(line)

    @staticmethod
    def last(files: Files) -> int:
        return _in_a_row(files, SLOTS)


class Kept(Writer):
    """Writes through one handle."""

    def begin(self) -> None:
        self._file = self._opened.enter_context((self.directory / "ring").open("w+b", buffering=0))

    def write(self, number: int, line: bytes) -> None:
        assert os.pwrite(self._file.fileno(), line, number % SLOTS * LINE) == LINE

    @staticmethod
    def last(files: Files) -> int:
        return _in_a_ring(files["ring"].read_bytes()) if "ring" in files else 0


class Unnamed(Kept):
    """One handle of an unlinked file, which no layer has. `left`: how many numbers it held in the end."""

    def begin(self) -> None:
        super().begin()
        (self.directory / "ring").unlink()

    def finish(self) -> None:
        self.left = _in_a_ring(os.pread(self._file.fileno(), SLOTS * LINE, 0))


class Mapped(Kept):
    """Writes through a shared mapping; a number counts when msync(2) has returned."""

    def begin(self) -> None:
        super().begin()
        self._file.truncate(SLOTS * LINE)
        self._memory = self._opened.enter_context(mmap.mmap(self._file.fileno(), SLOTS * LINE))

    def write(self, number: int, line: bytes) -> None:
        at = number % SLOTS * LINE
        self._memory[at : at + LINE] = line
        self._memory.flush()


class Replaced(Writer):
    """A file that is written under another name and renamed, as editors do."""

    def write(self, number: int, line: bytes) -> None:
        (self.directory / "new").write_bytes(line)
        os.rename(self.directory / "new", self.directory / "now")

    @staticmethod
    def last(files: Files) -> int:
        return int(files["now"].read_bytes()) + 1 if "now" in files else 0


def _in_a_row(files: Files, piece: int) -> int:
    expected = 0
    names = sorted(files)
    for position, name in enumerate(names):
        assert int(name) == expected, f"{expected} is missing, {name} is there"
        numbers = [int(line) for line in files[name].read_bytes().split()]
        assert numbers == list(range(expected, expected + len(numbers))), f"{name} holds {numbers}"
        expected += len(numbers)
        assert len(numbers) == piece or position == len(names) - 1, f"{name} has lost its end"
    return expected


def _in_a_ring(data: bytes) -> int:
    numbers = [int(line) for line in data.replace(b"\0", b"").split()]
    last = max(numbers, default=-1)
    expected = [number for number in range(last + 1) if number > last - SLOTS]
    assert sorted(numbers) == expected, f"of {last} numbers {sorted(numbers)[:3]}... are there"
    return last + 1


def files_in(directory: Path) -> dict[str, Path]:
    """The files of a directory; none if it is not there."""
    return {name: directory / name for name in os.listdir(directory)} if directory.exists() else {}
