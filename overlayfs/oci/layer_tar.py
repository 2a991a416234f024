"""Converting between entries, the stream of a tar archive, and an unpacked tree."""

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

_PIECE_SIZE = 256 * 1024  # headers and small files are joined to pieces of at least this many bytes
_ZEROS = bytes(PIECE)

Progress = Callable[[int], None]
"""`progress(bytes)` is called with how many bytes of the plain tar have been processed."""


def tar_pieces(entries: Iterable[EntryWithData], max_mtime: int | None = None) -> Iterator[bytes]:
    """Yield the tar of some entries in pieces of up to about 1 MiB.

    max_mtime: later modification times are replaced by this one, in nanoseconds since 1970. Raises `UserError` for a
    file that shrinks while it is read, and OSError.
    """
    joined: list[bytes] = []
    size = 0
    for piece in _small_pieces(entries, max_mtime):
        joined.append(piece)
        size += len(piece)
        if size >= _PIECE_SIZE:
            yield b"".join(joined) if len(joined) > 1 else piece
            joined, size = [], 0
    yield b"".join(joined) + tar_writer.END


def _small_pieces(entries: Iterable[EntryWithData], max_mtime: int | None) -> Iterator[bytes]:
    for entry, open_data in entries:
        if max_mtime is not None and entry.mtime_ns > max_mtime:
            entry = entry._replace(mtime_ns=max_mtime)
        yield tar_writer.header(entry)
        if open_data is not None and entry.size:
            yield from _data(entry, open_data())
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
            raise UserError(f"{shown(entry.path)} became shorter while it was read; layers must not change")
    finally:
        sysio.close(fd)


def _zeros(count: int) -> Iterator[bytes]:
    """Yield the zeros of a hole. Reading them would fill the page cache, which takes a hundred times as long."""
    while count > 0:
        yield _ZEROS[: min(count, PIECE)]
        count -= PIECE


def source_date_epoch() -> int | None:
    """Return `$SOURCE_DATE_EPOCH` in nanoseconds, None if it is not set. Raises `UserError` if it is not a number.

    Source: https://reproducible-builds.org/specs/source-date-epoch/
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return None
    if not seconds.isdecimal():
        raise UserError(f"SOURCE_DATE_EPOCH is {seconds!r}; set it to seconds since 1970, or unset it")
    return int(seconds) * 1_000_000_000


def unpack_tar(read: Read, root: int, progress: Progress | None = None, merged: bool = False) -> Unpacker:
    """Unpack a plain tar into the empty directory `root`, and read the stream to its end.

    merged: as in `Unpacker`. Returns the unpacker, closed, which counts what could not be kept. Raises `ArchiveError`
    and `UserError`; then the content of the directory is incomplete.
    """
    reader = TarReader(read)
    unpacker = Unpacker(root, merged)
    try:
        for entry in reader:
            unpacker.add(entry, functools.partial(_fill_from_tar, reader, entry, progress))
            if progress is not None:
                progress(reader.position)
        reader.finish()
        unpacker.finish()
    finally:
        unpacker.close()
    return unpacker


def unpack_entries(
    entries: Iterable[EntryWithData], root: int, progress: Progress | None = None, merged: bool = False
) -> Unpacker:
    """Copy entries into the empty directory `root`; data is reflinked where possible, and holes are kept.

    merged: as in `Unpacker`. Returns the unpacker, closed, which counts what could not be kept. Raises `UserError`.
    """
    unpacker = Unpacker(root, merged)
    done = 0
    try:
        for entry, open_data in entries:
            unpacker.add(entry, None if open_data is None else functools.partial(_fill_from_file, open_data))
            done += entry.size
            if progress is not None:
                progress(done)
        unpacker.finish()
    finally:
        unpacker.close()
    return unpacker


def _fill_from_file(open_data: OpenData, target: int) -> None:
    source = open_data()
    try:
        copy_data(source, target)
    finally:
        sysio.close(source)


def _fill_from_tar(reader: TarReader, entry: TarEntry, progress: Progress | None, fd: int) -> None:
    write_pieces(fd, entry, reader.pieces() if progress is None else _with_progress(reader, progress))


def _with_progress(reader: TarReader, progress: Progress) -> Iterator[memoryview]:
    for piece in reader.pieces():
        progress(reader.position)
        yield piece
