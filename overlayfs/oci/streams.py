"""Streams of bytes: prefetching in a thread, hashing, and peeking.

A stream is a function `read(size)` that returns some bytes, not always `size` of them, and ``b""`` at the end. Hashing,
compressing, reading and writing release the GIL, so each stage of a pipeline has its own thread. At most `_QUEUED`
pieces wait between two stages, so that memory does not grow with the stream.
"""

import errno
import hashlib
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Self

from overlayfs import sysio

Read = Callable[[int], bytes]

PIECE = 1 << 20
_QUEUED = 8
_JOIN_TIMEOUT = 1.0  # seconds that closing waits for a thread that may be blocked reading from outside


def unnamed_file(directory: int) -> int:
    """Return a descriptor of an unnamed file (O_TMPFILE), open for reading and writing, in an open directory.

    File systems without O_TMPFILE get a file that is unlinked at once.
    """
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
    """A stream, with the sha256 digest and the length of what has been read so far."""

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
        """Yield the rest of the stream in pieces."""
        while data := self.read(PIECE):
            yield data

    @property
    def digest(self) -> str:
        """``sha256:HEX`` of what has been read."""
        return "sha256:" + self._hash.hexdigest()


class Prefetch:
    """Runs an iterator of pieces in a thread, ahead of its reader. A context manager; leaving it ends the thread.

    An exception of the iterator is raised by `read` after the pieces before it. join_timeout: how many seconds leaving
    waits for the thread, None without a limit; a source from outside may block for ever. `name` is the thread's.
    """

    def __init__(self, pieces: Iterator[bytes], name: str, join_timeout: float | None = _JOIN_TIMEOUT) -> None:
        self._pieces = pieces
        self._join_timeout = join_timeout
        self._queue: deque[bytes | BaseException | None] = deque()
        self._free = threading.Semaphore(_QUEUED)
        self._filled = threading.Semaphore(0)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to read ahead."""
        self._thread.start()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for piece in self._pieces:
                self._free.acquire()
                if self._ended:
                    break
                self._queue.append(piece)
                self._filled.release()
        except BaseException as error:
            last = error
        finally:
            if isinstance(self._pieces, Generator):
                self._pieces.close()
        self._queue.append(last)
        self._filled.release()

    def read(self, size: int) -> bytes:
        """Return the next piece, whatever its size; ``b""`` at the end."""
        if self._ended:
            return b""
        self._filled.acquire()
        found = self._queue.popleft()
        if isinstance(found, bytes):
            self._free.release()
            return found
        self._ended = True
        if found is not None:
            raise found
        return b""

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(PIECE):
            yield data

    def close(self) -> None:
        """End the thread, if it was started, and wait for it."""
        self._ended = True
        self._free.release()
        if self._thread.ident is not None:
            self._thread.join(self._join_timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    undo: ExitStack, pieces: Iterator[bytes], name: str, join_timeout: float | None = _JOIN_TIMEOUT
) -> Prefetch:
    """Return a started `Prefetch` that `undo` closes.

    The close is registered before the thread starts: an interrupt in between would leave a thread that runs while what
    it reads is closed.
    """
    ahead = Prefetch(pieces, name, join_timeout)
    undo.callback(ahead.close)
    ahead.start()
    return ahead


class PeekableReader:
    """A stream whose next bytes can be looked at before they are read."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._peeked = b""

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes without reading them; fewer only at the end of the stream."""
        while len(self._peeked) < size and (more := self._read(size - len(self._peeked))):
            self._peeked += more
        return self._peeked[:size]

    def read(self, size: int) -> bytes:
        """Return the next bytes, those that were peeked at first."""
        if not self._peeked:
            return self._read(size)
        peeked, self._peeked = self._peeked, b""
        return peeked
