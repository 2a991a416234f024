"""Bytes on their way: threads that work ahead of their reader, and streams that know their digest.

A stream is a function that returns some bytes each time it is asked, ``b""`` at the end. Hashing, compressing, reading
and writing release the interpreter's lock, so each stage of a pipeline has its own thread; at most `_AHEAD` pieces wait
between two of them, so that memory does not grow with the stream.
"""

import errno
import hashlib
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Self

from overlayfs import sysio

Read = Callable[[int], bytes]

PIECE = 1 << 20
_AHEAD = 8
_PATIENCE = 1.0  # seconds that closing waits for a thread that may be blocked in a read from outside


def unnamed_file(directory: int) -> int:
    """Return a file without a name, open for reading and writing, on the file system of an open directory."""
    try:
        return sysio.open_child(directory, b"", os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    name = b"unnamed-" + secrets.token_hex(8).encode()
    fd = sysio.open_child(directory, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    sysio.unlink_at(directory, name)
    return fd


class HashingReader:
    """A stream, its sha256 and its length so far."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._hash = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        data = self._read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def pieces(self) -> Iterator[bytes]:
        """Yield all that is left."""
        while data := self.read(PIECE):
            yield data

    @property
    def digest(self) -> str:
        """``sha256:HEX`` of what was read."""
        return "sha256:" + self._hash.hexdigest()


class Prefetch:
    """Runs an iterator in a thread and gives its pieces in their order. A context; leaving it ends the thread.

    What the iterator raises is raised to the reader, in the place of the piece. `patience`: how many seconds leaving
    waits for a piece that is being made, None for as long as it takes; a source outside may block for ever.
    """

    def __init__(self, pieces: Iterator[bytes], name: str, patience: float | None = _PATIENCE) -> None:
        self._pieces = pieces
        self._patience = patience
        self._waiting: deque[bytes | BaseException | None] = deque()
        self._room = threading.Semaphore(_AHEAD)
        self._ready = threading.Semaphore(0)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for piece in self._pieces:
                self._room.acquire()
                if self._ended:
                    break
                self._waiting.append(piece)
                self._ready.release()
        except BaseException as error:
            last = error
        finally:
            if isinstance(self._pieces, Generator):
                self._pieces.close()
        self._waiting.append(last)
        self._ready.release()

    def read(self, size: int) -> bytes:
        """Return the next piece, whatever its size; ``b""`` at the end."""
        if self._ended:
            return b""
        self._ready.acquire()
        found = self._waiting.popleft()
        if isinstance(found, bytes):
            self._room.release()
            return found
        self._ended = True
        if found is not None:
            raise found
        return b""

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(PIECE):
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._room.release()
        self._thread.join(self._patience)


class PeekableReader:
    """A stream whose first bytes were looked at and are given again."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._held = b""

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end of the stream; they stay unread."""
        while len(self._held) < size and (more := self._read(size - len(self._held))):
            self._held += more
        return self._held[:size]

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        if not self._held:
            return self._read(size)
        held, self._held = self._held, b""
        return held
