"""Random operations on one file and on a model in memory, as fsx does: their contents must be the same.

Several descriptors read, write, append, map, truncate, punch and copy; now and then all of them are closed. Numbers are
bytes.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from tests.support import syscalls

LARGEST = 300_000
LONGEST = 20_000
BETWEEN_LOOKS = 200  # operations between two complete comparisons
PAGE = mmap.PAGESIZE

_UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EXDEV)


class Exerciser:
    """One file, which exists with `content`, its model, and the number of operations done."""

    def __init__(self, path: Path, content: bytes, seed: int) -> None:
        self.path = path
        self.done = 0
        self._model = bytearray(content)
        self._random = Random(seed)
        self._open: dict[int, int] = {}
        self._operations: tuple[Callable[[], None], ...] = (
            *(self._write, self._write, self._read, self._read, self._append, self._write_mapped, self._read_mapped),
            *(self._cut, self._sync, self._punch, self._zero, self._copy, self._reopen, self._read_past_cache),
            *(self._change_mode, self._allocate),
        )

    def run(self, count: int) -> list[str]:
        """Do so many operations; return what was wrong. Ends with the first wrong one."""
        try:
            for _ in range(count):
                operation = self._random.choice(self._operations)
                operation()
                self.done += 1
                if self.done % BETWEEN_LOOKS == 0:
                    self._look()
            self._look()
        except (AssertionError, OSError) as error:
            return [f"operation {self.done}, {operation.__name__}: {error!r}"]
        finally:
            self.close()
        return []

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _fd(self, flags: int) -> int:
        if flags not in self._open:
            self._open[flags] = os.open(self.path, flags)
        return self._open[flags]

    def _reading(self) -> int:
        return self._fd(self._random.choice((os.O_RDONLY, os.O_RDWR)))

    def _range(self, limit: int = LARGEST) -> tuple[int, int]:
        """A random offset and length, which end within `limit`."""
        start = self._random.randrange(max(1, limit))
        return start, min(self._random.randint(1, LONGEST), limit - start)

    def _put(self, start: int, data: bytes) -> None:
        self._model.extend(bytes(max(0, start - len(self._model))))
        self._model[start : start + len(data)] = data

    def _compare(self, start: int, found: bytes, wanted: bytes | bytearray) -> None:
        if found != wanted:
            pairs = enumerate(zip(found, wanted, strict=False))
            first = next((at for at, (one, other) in pairs if one != other), min(len(found), len(wanted)))
            raise AssertionError(f"{len(found)} bytes for {len(wanted)} at {start}, the first wrong one at {first}")

    def _look(self) -> None:
        assert os.stat(self.path).st_size == len(self._model), f"{os.stat(self.path).st_size}, not {len(self._model)}"
        self._compare(0, self.path.read_bytes(), bytes(self._model))

    # --- operations ------------------------------------------------------------------------------------

    def _write(self) -> None:
        start, length = self._range()
        data = self._random.randbytes(length)
        assert os.pwrite(self._fd(os.O_RDWR), data, start) == length
        self._put(start, data)

    def _append(self) -> None:
        data = self._random.randbytes(min(self._random.randint(1, LONGEST), LARGEST - len(self._model)))
        assert os.write(self._fd(os.O_WRONLY | os.O_APPEND), data) == len(data)
        self._model.extend(data)

    def _read(self) -> None:
        start, length = self._range()
        self._compare(start, os.pread(self._reading(), length, start), self._model[start : start + length])

    def _read_past_cache(self) -> None:
        start = self._random.randrange(LARGEST) // PAGE * PAGE
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:  # not supported by the disk
                return
            raise
        with mmap.mmap(-1, 4 * PAGE) as buffer:
            length = os.preadv(fd, [buffer], start)
            os.close(fd)
            self._compare(start, buffer[:length], self._model[start : start + 4 * PAGE])

    def _write_mapped(self) -> None:
        if not self._model:
            return
        start, length = self._range(len(self._model))
        data = self._random.randbytes(length)
        with mmap.mmap(self._fd(os.O_RDWR), len(self._model)) as mapped:
            mapped[start : start + length] = data
            if self._random.random() < 0.3:
                mapped.flush()
        self._put(start, data)

    def _read_mapped(self) -> None:
        if not self._model:
            return
        start, length = self._range(len(self._model))
        with mmap.mmap(self._reading(), len(self._model), prot=mmap.PROT_READ) as mapped:
            self._compare(start, mapped[start : start + length], self._model[start : start + length])

    def _cut(self) -> None:
        size = self._random.choice((0, self._random.randrange(LARGEST), self._random.randrange(len(self._model) + 1)))
        if self._random.random() < 0.5:
            os.ftruncate(self._fd(os.O_RDWR), size)
        else:
            os.truncate(self.path, size)
        del self._model[size:]
        self._put(size, b"")

    def _sync(self) -> None:
        self._random.choice((os.fsync, os.fdatasync))(self._reading())

    def _punch(self) -> None:
        start, length = self._range()
        with _where_able():
            syscalls.fallocate(self._fd(os.O_RDWR), syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, start, length)
            end = min(start + length, len(self._model))
            self._model[start:end] = bytes(max(0, end - start))

    def _zero(self) -> None:
        start, length = self._range()
        with _where_able():
            syscalls.fallocate(self._fd(os.O_RDWR), syscalls.ZERO_RANGE, start, length)
            self._put(start, bytes(length))

    def _allocate(self) -> None:
        start, length = self._range()
        with _where_able():
            syscalls.fallocate(self._fd(os.O_RDWR), 0, start, length)
            self._put(start + length, b"") if start + length > len(self._model) else None

    def _copy(self) -> None:
        start, length = self._range()
        target = self._random.randrange(LARGEST - LONGEST)
        if abs(start - target) < length or start >= len(self._model):
            return
        fd = self._fd(os.O_RDWR)
        with _where_able():
            done = os.copy_file_range(fd, fd, length, start, target)
            self._put(target, bytes(self._model[start : start + done]))

    def _reopen(self) -> None:
        self.close()

    def _change_mode(self) -> None:
        os.chmod(self.path, self._random.choice((0o600, 0o644, 0o640)))


@contextmanager
def _where_able() -> Iterator[None]:
    """Ignore that an engine or disk does not support an operation; then it must have changed nothing."""
    with suppress(OSError):
        try:
            yield
        except OSError as error:
            if error.errno not in _UNABLE:
                raise AssertionError(repr(error)) from error
            raise
