"""The manifest of a layer: every entry of its tree, with its attributes and the hash of its content.

The same layer has the same manifest wherever it is stored, so the sha256 of the manifest names the layer's content. Not
part of it are access and change times, inode numbers, the size of directories, attributes that belong to the place
(`entries.is_portable`), and everything but the name of a whiteout device. docs/on-disk-format.md, "Manifest", specifies
the format.

Entries are in the order of a walk: a directory, then its entries, names sorted as bytes. The file is read and written
one block at a time, so memory does not grow with the layer.
"""

import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import scan
from overlayfs.store.entries import FLAGS, Entry, Type
from overlayfs.store.scan import Progress
from overlayfs.tree.staging import copy_data

_HEADER = b"overlayfs manifest 1\n"
_LENGTH = struct.Struct("<I")
_ARRAY = struct.Struct(">BI")  # msgpack "array 32": always this form, so that the encoding is unique
_ARRAY_32 = 0xDD
_BLOCK_ENTRIES = 512
_BLOCK_BYTES = 256 * 1024
_MAX_BLOCK = 64 << 20  # one entry with all attributes that a file system can store is far shorter
_PIECE = 1 << 20
_UNNAMED = os.O_RDWR | os.O_TMPFILE


class _Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An entry as it is written: depth and name instead of the path, which would repeat all names above."""

    depth: int
    name: bytes
    type: Type
    mode: int
    uid: int
    gid: int
    size: int
    seconds: int
    nanoseconds: int
    rdev: int
    target: bytes | None
    xattrs: tuple[tuple[bytes, bytes], ...]
    link: bytes | None
    xxh3: str | None


class Totals(NamedTuple):
    """The sums of a manifest; `size` and `flags` as in `Manifest`."""

    entries: int
    size: int
    flags: tuple[str, ...]


class DamagedError(UserError):
    """The manifest is not what was written."""


class Manifest:
    """A manifest in an open file, which it owns; a context manager. Several threads may read it at once."""

    def __init__(self, fd: int, where: str, totals: Totals | None = None) -> None:
        self._fd = fd
        self._where = where
        self._totals = totals
        self._digest: str | None = None

    @classmethod
    def open(cls, fd: int, where: str = "the manifest") -> Self:
        """Take over an open manifest file; `where` names it in messages."""
        return cls(fd, where)

    @classmethod
    def build(
        cls, tree: int, threads: int | None = None, progress: Progress | None = None, temp_dir: int | None = None
    ) -> Self:
        """Read the layer behind the descriptor `tree` and return its manifest, an unnamed file in `temp_dir`.

        `temp_dir` is a directory's descriptor; None means the system's directory for temporary files.
        `progress(entries, bytes)` is called periodically; `threads` None means as many as fit the machine. Raises
        OSError, with the path, if the layer cannot be read or changes meanwhile.
        """
        with contextlib.closing(scan.scan(tree, threads, progress)) as scanning:
            return cls.of(map(scan.required, scanning), temp_dir)

    @classmethod
    def of(cls, entries: Iterable[Entry], temp_dir: int | None = None) -> Self:
        """Write entries, which must be in order, to an unnamed file in `temp_dir`, as in `build`."""
        fd = _unnamed(temp_dir)
        try:
            return cls(fd, "the manifest", _write(fd, entries))
        except BaseException:
            sysio.close(fd)
            raise

    def close(self) -> None:
        """Close the file."""
        sysio.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def digest(self) -> str:
        """``sha256:HEX`` of the file's bytes."""
        if self._digest is None:
            found = hashlib.sha256()
            for piece in self._pieces():
                found.update(piece)
            self._digest = "sha256:" + found.hexdigest()
        return self._digest

    @property
    def size(self) -> int:
        """Bytes of regular files, hard links once."""
        return self.totals.size

    @property
    def flags(self) -> tuple[str, ...]:
        """Which of "metacopy" and "redirect" occur: these are valid only over the layers they were made on."""
        return self.totals.flags

    @property
    def totals(self) -> Totals:
        """The sums; an opened manifest is read once to compute them."""
        if self._totals is None:
            self._totals = _sum(self.read())
        return self._totals

    @property
    def entries(self) -> "Entries":
        """All entries, in order; each iteration starts at the first."""
        return Entries(self)

    def read(self) -> Iterator[Entry]:
        """Yield all entries in order; raises `DamagedError` if the file is not what was written."""
        try:
            yield from _decode(self._blocks())
        except (msgspec.DecodeError, ValueError) as error:
            raise DamagedError(f"{self._where} is damaged: {error}") from None

    def write(self, fd: int) -> None:
        """Write the manifest to an open, empty file."""
        copy_data(self._fd, fd)

    def _pieces(self) -> Iterator[bytes]:
        offset = 0
        while piece := sysio.read_at(self._fd, offset, _PIECE):
            yield piece
            offset += len(piece)

    def _blocks(self) -> Iterator[bytes]:
        if sysio.read_at(self._fd, 0, len(_HEADER)) != _HEADER:
            raise ValueError("it does not begin like a manifest")
        offset = len(_HEADER)
        while head := sysio.read_at(self._fd, offset, _LENGTH.size):
            length = _LENGTH.unpack(head.ljust(_LENGTH.size, b"\xff"))[0]
            block = sysio.read_at(self._fd, offset + _LENGTH.size, length) if length <= _MAX_BLOCK else b""
            if len(block) != length:
                raise ValueError("it is cut short")
            yield block
            offset += _LENGTH.size + length


class Entries:
    """The entries of a manifest: iterable, with a length."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __iter__(self) -> Iterator[Entry]:
        return self._manifest.read()

    def __len__(self) -> int:
        return self._manifest.totals.entries


def _unnamed(temp_dir: int | None) -> int:
    if temp_dir is not None:
        with contextlib.suppress(OSError):  # the file system may not support O_TMPFILE
            return sysio.open_child(temp_dir, b"", _UNNAMED, 0o600)
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())


# --- writing -----------------------------------------------------------------------------------------------


def _write(fd: int, entries: Iterable[Entry]) -> Totals:
    counted = _Sum()
    offset = sysio.write_at(fd, 0, _HEADER)
    for block in _encode(map(counted.add, entries)):
        offset += sysio.write_at(fd, offset, block)
    return counted.totals


def _encode(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield blocks: the length, then a msgpack array of rows. A block ends at a number of rows or of bytes."""
    encoder = msgspec.msgpack.Encoder()
    block = bytearray()
    count = 0
    for entry in entries:
        encoder.encode_into(_row(entry), block, -1)
        count += 1
        if count == _BLOCK_ENTRIES or len(block) >= _BLOCK_BYTES:
            yield _block(block, count)
            block.clear()
            count = 0
    if count:
        yield _block(block, count)


def _block(rows: bytearray, count: int) -> bytes:
    return _LENGTH.pack(_ARRAY.size + len(rows)) + _ARRAY.pack(_ARRAY_32, count) + rows


def _row(entry: Entry) -> _Row:
    path = entry.path
    return _Row(
        path.count(b"/") + 1 if path else 0,
        path[path.rfind(b"/") + 1 :],
        entry.type,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.size,
        *divmod(entry.mtime_ns, 1_000_000_000),  # nanoseconds since 1970 do not fit into 64 bits after 2554
        entry.rdev,
        entry.target,
        entry.xattrs,
        entry.link,
        entry.xxh3,
    )


class _Sum:
    """Counts the entries that pass through."""

    def __init__(self) -> None:
        self._count = 0
        self._size = 0
        self._flags: set[str] = set()

    def add(self, entry: Entry) -> Entry:
        self._count += 1
        if entry.link is None:
            self._size += entry.size
        self._flags.update(FLAGS[name] for name, _ in entry.xattrs if name in FLAGS)
        return entry

    @property
    def totals(self) -> Totals:
        return Totals(self._count, self._size, tuple(sorted(self._flags)))


def _sum(entries: Iterable[Entry]) -> Totals:
    counted = _Sum()
    for entry in entries:
        counted.add(entry)
    return counted.totals


# --- reading -----------------------------------------------------------------------------------------------


def _decode(blocks: Iterable[bytes]) -> Iterator[Entry]:
    decoder = msgspec.msgpack.Decoder(list[_Row])
    above: list[bytes] = []  # the path of the last entry at each depth
    for block in blocks:
        for row in decoder.decode(block):
            _check(row, above)
            path = above[-1] + b"/" + row.name if row.depth > 1 else row.name
            above.append(path)
            yield _entry(row, path)


def _check(row: _Row, above: list[bytes]) -> None:
    """Cut `above` back to the directory of the row; raises ValueError if no walk would give this row."""
    if not 0 <= row.depth <= len(above) or (row.depth == 0 and above):
        raise ValueError("its entries are out of order")
    if row.depth == 0 and row.name:
        raise ValueError("its root has a name")
    if row.depth > 0 and (not row.name or b"/" in row.name or b"\0" in row.name or row.name in (b".", b"..")):
        raise ValueError("it contains something that is not a name")
    if row.depth < len(above) and row.name <= above[row.depth][above[row.depth].rfind(b"/") + 1 :]:
        raise ValueError("its names are out of order")
    del above[row.depth :]


def _entry(row: _Row, path: bytes) -> Entry:
    return Entry(
        path=path,
        type=row.type,
        mode=row.mode,
        uid=row.uid,
        gid=row.gid,
        size=row.size,
        mtime_ns=row.seconds * 1_000_000_000 + row.nanoseconds,
        rdev=row.rdev,
        target=row.target,
        xattrs=row.xattrs,
        link=row.link,
        xxh3=row.xxh3,
    )
