"""Compressing and decompressing streams with all processors; the output depends only on the input.

gzip works as in pigz: the input is split into blocks, each is compressed separately with the 32 KiB before it as its
dictionary, and the results in order are one deflate stream. isal compresses where it is installed, zlib elsewhere;
their output differs. zstd has threads of its own. Levels and block sizes determine the digests of our blobs, so they
change only by a decision (docs/decisions/0007-compression.md).

Sources: RFC 1952 (gzip), RFC 1951, section 3.2.4 (an empty stored block ends a flush), RFC 8878 (zstd).
"""

import os
import struct
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import Any, Protocol

from overlayfs.oci import image_spec
from overlayfs.oci.tar_entry import ArchiveError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def _import_isal() -> Any:
    try:
        from isal import isal_zlib
    except ImportError:  # isal does not exist for this processor
        return None
    return isal_zlib


_isal = _import_isal()
_BLOCK = 1 << 20
_DICTIONARY = 32 * 1024
_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # no name, no time, unknown operating system
_ISAL_LEVEL = 2
_ZLIB_LEVEL = 6
_ZSTD_LEVEL = 3
_OUTPUT = 1 << 20  # bytes that one call of a decompressor returns at most
_INPUT = 1 << 18  # bytes that are read for a decompressor at a time

Read = Callable[[int], bytes]


class Compression(Enum):
    """How a layer's tar is compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"

    @property
    def media_type(self) -> str:
        """The OCI media type of a layer with this compression."""
        return image_spec.OCI_LAYER if self is Compression.NONE else f"{image_spec.OCI_LAYER}+{self.value}"


class Compressor(Protocol):
    """Compresses a stream: the pieces that `feed` and `finish` yield, in order, are the output."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add input, and yield the output that is ready."""

    def finish(self) -> Iterator[bytes]:
        """Yield the rest of the output."""

    def close(self) -> None:
        """End its threads and discard their output; after `finish` this does nothing."""


def threads() -> int:
    """Return how many processors this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def compressor(kind: Compression) -> Compressor:
    """Return a new compressor."""
    if kind is Compression.NONE:
        return _Copy()
    return _Gzip() if kind is Compression.GZIP else _Zstd()


class _Copy:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        pass


class _Zstd:
    def __init__(self) -> None:
        # At least one worker: the output is the same for any number of them, but differs from that of none.
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: _ZSTD_LEVEL,
            zstd.CompressionParameter.checksum_flag: 1,
            zstd.CompressionParameter.nb_workers: threads(),
        }
        self._inner = zstd.ZstdCompressor(options=options)

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._inner.compress(data)

    def finish(self) -> Iterator[bytes]:
        yield self._inner.flush()

    def close(self) -> None:
        pass


class _Gzip:
    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(threads(), thread_name_prefix="gzip")
        self._running: deque[Future[bytes]] = deque()
        self._depth = 2 * threads()
        self._block = bytearray()
        self._before = b""
        self._crc = 0
        self._size = 0
        self._ready = [_GZIP_HEADER]

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._crc = _crc32(data, self._crc)
        self._size += len(data)
        self._block += data
        while len(self._block) >= _BLOCK:
            self._start(bytes(self._block[:_BLOCK]))
            del self._block[:_BLOCK]
            yield from self._results(self._depth)

    def _start(self, block: bytes) -> None:
        self._running.append(self._pool.submit(_deflate, block, self._before, False))
        self._before = block[-_DICTIONARY:]

    def _results(self, leave: int) -> Iterator[bytes]:
        """Yield results in order until only `leave` blocks are being compressed."""
        while self._ready:
            yield self._ready.pop()
        while len(self._running) > leave:
            yield self._running.popleft().result()

    def finish(self) -> Iterator[bytes]:
        self._running.append(self._pool.submit(_deflate, bytes(self._block), self._before, True))
        yield from self._results(0)
        yield struct.pack("<II", self._crc, self._size & 0xFFFFFFFF)
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _crc32(data: bytes, value: int) -> int:
    return int((_isal or zlib).crc32(data, value))


def _deflate(block: bytes, before: bytes, last: bool) -> bytes:
    inner: Any
    if _isal is None:
        inner = zlib.compressobj(_ZLIB_LEVEL, zlib.DEFLATED, -15, 8, zlib.Z_DEFAULT_STRATEGY, before)
    else:
        inner = _isal.compressobj(_ISAL_LEVEL, _isal.DEFLATED, -15, zdict=before)
    mode = zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH
    return bytes(inner.compress(block) + inner.flush(mode))


# --- decompressing -------------------------------------------------------------------------------------------

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"  # of a skippable frame, after a byte of 50 to 5f; zstd:chunked has such frames
LONGEST_MAGIC = 5


def detect(start: bytes) -> Compression:
    """Return the compression of a stream from its first `LONGEST_MAGIC` bytes. Raises `ArchiveError` for others."""
    if start.startswith(_GZIP_MAGIC):
        return Compression.GZIP
    if start.startswith(_ZSTD_MAGIC) or (start[:1] and 0x50 <= start[0] <= 0x5F and start[1:4] == _SKIPPABLE_MAGIC):
        return Compression.ZSTD
    for magic, name in ((b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"), (b"\x04\x22\x4d\x18", "lz4")):
        if start.startswith(magic):
            raise ArchiveError(f"it is compressed with {name}; decompress it first, or use gzip or zstd")
    return Compression.NONE


class DecompressingReader:
    """Reads a compressed stream: any number of gzip members or zstd frames, one after the other, or plain bytes."""

    def __init__(self, read: Read, kind: Compression) -> None:
        self._source = read
        self._kind = kind
        self._inner: Any = None
        self._input = b""

    def read(self, size: int) -> bytes:
        """Return some decompressed bytes, at most 1 MiB, and ``b""`` at the end. Raises `ArchiveError` for damage."""
        try:
            return self._source(size) if self._kind is Compression.NONE else self._decompress()
        except _DAMAGE as error:
            raise ArchiveError(f"its {self._kind.value} compression is damaged") from error

    def _decompress(self) -> bytes:
        while True:
            if (self._inner is None or self._inner.eof) and not self._next_member():
                return b""
            data = self._step()
            if data:
                return data

    def _next_member(self) -> bool:
        """Begin the next member; return False at the end. Zeros after the last one are padding (gzip(1))."""
        if self._inner is not None:
            self._input = self._inner.unused_data
        first = self._inner is None
        self._input = self._input or self._source(_INPUT)
        if not first and self._kind is Compression.GZIP:
            while self._input and not self._input.strip(b"\0"):
                self._input = self._source(_INPUT)
        if not self._input:
            return False
        self._inner = _decompressor(self._kind)
        return True

    def _step(self) -> bytes:
        if self._needs_input() and not self._input:
            self._input = self._source(_INPUT)
            if not self._input:
                raise ArchiveError(f"its {self._kind.value} compression ends too early: it is not complete")
        given, self._input = self._input, b""
        if self._kind is Compression.ZSTD:
            return bytes(self._inner.decompress(given, _OUTPUT))
        data = self._inner.decompress(given, _OUTPUT)
        self._input = self._inner.unconsumed_tail
        return bytes(data)

    def _needs_input(self) -> bool:
        return bool(self._inner.needs_input) if self._kind is Compression.ZSTD else True


_DAMAGE: tuple[type[Exception], ...] = (zlib.error, zstd.ZstdError, *(() if _isal is None else (_isal.error,)))


def _decompressor(kind: Compression) -> Any:
    if kind is Compression.ZSTD:
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})
    return (_isal or zlib).decompressobj(31)
