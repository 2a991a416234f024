"""A layer as a tar: the stream of a layer's items, and the layer that a stream makes."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import tar_writer
from overlayfs.oci.layer_entries import EntryWithData, OpenData
from overlayfs.oci.streams import PIECE, Read
from overlayfs.oci.tar_entry import TarEntry, shown
from overlayfs.oci.tar_reader import BLOCK, TarReader
from overlayfs.oci.unpack import Unpacker, write_pieces
from overlayfs.tree.staging import copy_data

_TOGETHER = 256 * 1024  # bytes of headers and small files that go on as one piece
_ZEROS = bytes(PIECE)

Progress = Callable[[int], None]
"""Called with the bytes of the plain tar so far."""


def tar_pieces(items: Iterable[EntryWithData], newest: int | None = None) -> Iterator[bytes]:
    """Yield the tar of items, in pieces of little more than 1 MiB. `newest`: no time is later, in nanoseconds."""
    held: list[bytes] = []
    size = 0
    for piece in _small_pieces(items, newest):
        held.append(piece)
        size += len(piece)
        if size >= _TOGETHER:
            yield b"".join(held) if len(held) > 1 else piece
            held, size = [], 0
    yield b"".join(held) + tar_writer.END


def _small_pieces(items: Iterable[EntryWithData], newest: int | None) -> Iterator[bytes]:
    for entry, opener in items:
        if newest is not None and entry.mtime_ns > newest:
            entry = entry._replace(mtime_ns=newest)
        yield tar_writer.header(entry)
        if opener is not None and entry.size:
            yield from _data(entry, opener())
            if entry.size % BLOCK:
                yield tar_writer.padding(entry.size)


def _data(entry: TarEntry, fd: int) -> Iterator[bytes]:
    try:
        offset = hole = 0
        while offset < entry.size:
            if offset >= hole:
                data, hole = sysio.next_data(fd, offset)
                yield from _zeros(min(data, entry.size) - offset)
                offset = max(data, offset)
                if data == hole:
                    break
            piece = sysio.read_at(fd, offset, min(PIECE, min(hole, entry.size) - offset))
            if not piece:
                break
            offset += len(piece)
            yield piece
        if offset < entry.size:
            raise UserError(f"{shown(entry.path)} has become shorter while it was read; layers must not change")
    finally:
        sysio.close(fd)


def _zeros(count: int) -> Iterator[bytes]:
    """Yield what a hole reads as: reading it would make pages of zeros, which costs a hundred times as much."""
    while count > 0:
        yield _ZEROS[: min(count, PIECE)]
        count -= PIECE


def source_date_epoch() -> int | None:
    """Return what SOURCE_DATE_EPOCH asks for, in nanoseconds; UserError when it is no number of seconds."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    if not told:
        return None
    if not told.isdecimal():
        raise UserError(f"SOURCE_DATE_EPOCH is {told!r}; set it to seconds since 1970, or unset it")
    return int(told) * 1_000_000_000


def unpack_tar(read: Read, root: int, progress: Progress | None = None, merged: bool = False) -> Unpacker:
    """Make a layer in the empty directory `root` from a plain tar, read to the end of the stream.

    Returns the unpacker, closed: it knows what could not be kept. After an error what is there is worth nothing.
    """
    reader = TarReader(read)
    unpacker = Unpacker(root, merged)
    try:
        for entry in reader:
            unpacker.add(entry, functools.partial(_fill, reader, entry, progress))
            if progress is not None:
                progress(reader.position)
        reader.finish()
        unpacker.finish()
    finally:
        unpacker.close()
    return unpacker


def unpack_entries(
    items: Iterable[EntryWithData], root: int, progress: Progress | None = None, merged: bool = False
) -> Unpacker:
    """Make copies of items in the empty directory `root`: data shared where the file systems can, holes kept.

    Returns the unpacker, closed: it knows what could not be kept.
    """
    unpacker = Unpacker(root, merged)
    done = 0
    try:
        for entry, opener in items:
            unpacker.add(entry, None if opener is None else functools.partial(_copy, opener))
            done += entry.size
            if progress is not None:
                progress(done)
        unpacker.finish()
    finally:
        unpacker.close()
    return unpacker


def _copy(opener: OpenData, target: int) -> None:
    source = opener()
    try:
        copy_data(source, target)
    finally:
        sysio.close(source)


def _fill(reader: TarReader, entry: TarEntry, progress: Progress | None, fd: int) -> None:
    write_pieces(fd, entry, reader.pieces() if progress is None else _told(reader, progress))


def _told(reader: TarReader, progress: Progress) -> Iterator[memoryview]:
    for piece in reader.pieces():
        progress(reader.position)
        yield piece
