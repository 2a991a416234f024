"""Reading tar archives as streams, in bounded memory: ustar, PAX, GNU and old formats, sparse files of all kinds.

Where the formats are ambiguous, this follows Go's archive/tar, which nearly all other programs use for layers: a second
interpretation of an archive would be a way to hide files. So global PAX headers have no effect, only regular files have
data, a GNU long name takes precedence over a PAX path, and a block of zeros that is not followed by another one is an
error. Any damage raises `ArchiveError`.

Sources: POSIX pax(1), "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Sparse Formats";
libarchive's tar(5); Go ``archive/tar`` (reader.go, strconv.go) for the choices above.
"""

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlayfs.oci.tar_entry import ArchiveError, Extents, Kind, TarEntry, safe_path, shown

BLOCK = 512
MAX_HEADER = 8 << 20
"""Bytes of one extended header or long name; 128 extended attributes of the largest size fit."""
MAX_EXTENTS = 1 << 18
MAX_EXTENDED_HEADERS = 64
"""How many extended headers may precede one entry."""

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_ZEROS = bytes(BLOCK)
_CHECKSUM = slice(148, 156)
_GNU_SPARSE = struct.Struct("12s12s")
_XATTR = b"SCHILY.xattr."
_MAX_SIZE = (1 << 63) - 1
_MAX_ID = (1 << 32) - 2  # -1 means "keep" to chown(2)
_MAX_TIME = 1 << 40  # seconds from 1970: beyond what any file system can hold

_KINDS = {
    b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"S": Kind.FILE, b"1": Kind.HARDLINK, b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER, b"4": Kind.BLOCK, b"5": Kind.DIRECTORY, b"6": Kind.FIFO,
}  # fmt: skip

Read = Callable[[int], bytes]
Skip = Callable[[int], object]
"""`skip(bytes)` moves a seekable stream forward, possibly beyond the end of the file."""


class InputStream:
    """A buffered stream that counts its bytes; `read(size)` returns at most `size` bytes, ``b""`` at the end."""

    def __init__(self, read: Read, skip: Skip | None = None) -> None:
        self._read = read
        self._skip = skip
        self._chunk = memoryview(b"")
        self.position = 0

    def piece(self, limit: int) -> memoryview:
        """Return at most `limit` bytes, as many as are buffered; none at the end."""
        if not self._chunk:
            self._chunk = memoryview(self._read(min(max(limit, 1 << 16), 1 << 20)))
        found, self._chunk = self._chunk[:limit], self._chunk[limit:]
        self.position += len(found)
        return found

    def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes. Raises `ArchiveError` when the stream ends before."""
        first = self.piece(size)
        if len(first) == size:
            return bytes(first)
        return self._gather(bytes(first), size)

    def _gather(self, first: bytes, size: int) -> bytes:
        parts, missing = [first], size - len(first)
        while missing and (more := self.piece(missing)):
            parts.append(bytes(more))
            missing -= len(more)
        if missing:
            raise ArchiveError("the archive ends too early: it is not complete")
        return b"".join(parts)

    def block(self) -> bytes:
        """Return the next block, ``b""`` at the end of the stream."""
        first = self.piece(BLOCK)
        if len(first) == BLOCK:
            return bytes(first)
        return self._gather(bytes(first), BLOCK) if first else b""

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yield `size` bytes in pieces. Raises `ArchiveError` when the stream ends before."""
        while size:
            found = self.piece(size)
            if not found:
                raise ArchiveError("the archive ends too early: it is not complete")
            size -= len(found)
            yield found

    def skip(self, size: int) -> None:
        """Skip `size` bytes."""
        if self._skip is not None and size > len(self._chunk):
            size -= len(self._chunk)
            self.position += len(self._chunk) + size
            self._chunk = memoryview(b"")
            self._skip(size)
            return
        for _ in self.pieces(size):
            pass

    def read_to_end(self) -> None:
        """Read to the end: what follows the archive belongs to its digest."""
        while self.piece(1 << 20):
            pass


class _RawHeader(NamedTuple):
    """The fields of one header block; only the size is decoded, which every kind of entry needs."""

    block: bytes
    name: bytes
    mode: bytes
    uid: bytes
    gid: bytes
    size: int
    mtime: bytes
    flag: bytes
    linkname: bytes
    magic: bytes
    major: bytes
    minor: bytes
    prefix: bytes


class _ExtendedHeaders(NamedTuple):
    """What the extended headers say about the entry that follows them."""

    pax: dict[bytes, bytes]
    sparse: Extents | None
    long_name: bytes
    long_link: bytes


class TarReader:
    """The entries of an archive in their order; `pieces` yields the data of the entry that was returned last.

    `read(size)` returns at most `size` bytes; `skip(bytes)`, for seekable streams, moves forward. Every method raises
    `ArchiveError`. stored: how many bytes of data the last entry has in the archive.
    """

    def __init__(self, read: Read, skip: Skip | None = None) -> None:
        self._input = InputStream(read, skip)
        self._unread = 0
        self._padding = 0
        self.stored = 0

    @property
    def position(self) -> int:
        """How many bytes of the archive have been read or skipped."""
        return self._input.position

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self.next()) is not None:
            yield entry

    def next(self) -> TarEntry | None:
        """Return the next entry, None at the end of the archive; data that was not read is skipped."""
        self._finish_data()
        extended, raw = self._headers()
        return None if raw is None else self._entry(raw, extended)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the data of the last entry, or what has not been read of it."""
        while self._unread:
            found = self._input.piece(self._unread)
            if not found:
                raise ArchiveError("the archive ends too early: it is not complete")
            self._unread -= len(found)
            yield found

    def finish(self) -> None:
        """Read to the end of the stream, beyond the end of the archive."""
        self._finish_data()
        self._input.read_to_end()

    def _finish_data(self) -> None:
        if self._unread or self._padding:
            self._input.skip(self._unread + self._padding)
            self._unread = self._padding = 0

    def _start_data(self, size: int) -> None:
        self.stored = self._unread = size
        self._padding = -size % BLOCK

    # --- headers ---------------------------------------------------------------------------------------

    def _headers(self) -> tuple[_ExtendedHeaders, _RawHeader | None]:
        pax: dict[bytes, bytes] = {}
        sparse: list[bytes] = []
        long_name = long_link = b""
        for _ in range(MAX_EXTENDED_HEADERS):
            raw = self._next_raw()
            if raw is None:
                if pax or long_name or long_link:
                    raise ArchiveError("the archive ends after a header that announces another entry")
                return _ExtendedHeaders(pax, None, b"", b""), None
            if raw.flag in b"xX":
                pax, sparse = parse_pax(self._extended(raw))
            elif raw.flag == b"g":
                self._extended(raw)
            elif raw.flag == b"L":
                long_name = self._extended(raw).split(b"\0", 1)[0]
            elif raw.flag == b"K":
                long_link = self._extended(raw).split(b"\0", 1)[0]
            else:
                return _ExtendedHeaders(pax, _sparse_pairs(sparse), long_name, long_link), raw
        raise ArchiveError("the archive has too many extended headers before one entry")

    def _next_raw(self) -> _RawHeader | None:
        block = self._input.block()
        if not block:
            return None
        if block == _ZEROS:
            if self._input.block() not in (_ZEROS, b""):
                raise ArchiveError("the archive is damaged: its end mark is followed by something else")
            return None
        fields = _HEADER.unpack(block)
        _verify_checksum(block, fields[6])
        name, mode, uid, gid, size, mtime, _, flag, link, magic, _, _, major, minor, prefix, _ = fields
        name = _text(name)
        return _RawHeader(
            block, name, mode, uid, gid, _size(size, name), mtime, flag, _text(link), magic, major, minor, prefix
        )

    def _extended(self, raw: _RawHeader) -> bytes:
        if raw.size > MAX_HEADER:
            raise ArchiveError(f"the entry {shown(raw.name)} has an extended header of {raw.size} bytes")
        data = self._input.read_exactly(raw.size)
        self._input.skip(-raw.size % BLOCK)
        return data

    # --- entries ---------------------------------------------------------------------------------------

    def _entry(self, raw: _RawHeader, extended: _ExtendedHeaders) -> TarEntry:
        pax = extended.pax
        name = extended.long_name or pax.get(b"GNU.sparse.name") or pax.get(b"path") or _ustar_name(raw)
        kind = _kind(raw, name)
        path = _path(name, kind)
        size, extents = self._data(raw, extended, kind, name)
        target = extended.long_link or pax.get(b"linkpath") or raw.linkname
        return TarEntry(
            path,
            kind,
            _number(raw.mode, b"mode", name) & 0o7777,
            _id(pax.get(b"uid"), raw.uid, name),
            _id(pax.get(b"gid"), raw.gid, name),
            _mtime(pax.get(b"mtime"), raw.mtime, name),
            size,
            _target(target, kind, name) if kind in (Kind.HARDLINK, Kind.SYMLINK) else b"",
            _device(raw, name) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0),
            {key[len(_XATTR) :]: value for key, value in pax.items() if key.startswith(_XATTR)} if pax else {},
            extents,
        )

    def _data(self, raw: _RawHeader, extended: _ExtendedHeaders, kind: Kind, name: bytes) -> tuple[int, Extents | None]:
        if kind is not Kind.FILE:
            self._start_data(0)
            return 0, None
        stored = _pax_number(extended.pax, b"size", name)
        self._start_data(raw.size if stored is None else stored)
        if raw.flag == b"S":
            return self._gnu_sparse(raw, name)
        if extended.pax.get(b"GNU.sparse.major") == b"1" and extended.pax.get(b"GNU.sparse.minor") == b"0":
            extents: Extents | None = self._sparse_map(name)
        elif b"GNU.sparse.map" in extended.pax:
            extents = _sparse_pairs(extended.pax[b"GNU.sparse.map"].split(b","))
        else:
            extents = extended.sparse
        if extents is None:
            return self.stored, None
        size = _pax_number(extended.pax, b"GNU.sparse.realsize", name)
        size = _pax_number(extended.pax, b"GNU.sparse.size", name) if size is None else size
        return self._checked(extents, self.stored if size is None else size, name)

    def _checked(self, extents: Extents, size: int, name: bytes) -> tuple[int, Extents]:
        """Return size and extents of a sparse file. Raises `ArchiveError` unless they ascend, fit and have data."""
        end = 0
        for offset, length in extents:
            if offset < end or length < 0 or offset + length > size:
                raise ArchiveError(f"the sparse file {shown(name)} has an impossible map")
            end = offset + length
        if sum(length for _, length in extents) != self._unread:
            raise ArchiveError(f"the sparse file {shown(name)} has a map that does not fit its data")
        return size, tuple(extent for extent in extents if extent[1])

    def _gnu_sparse(self, raw: _RawHeader, name: bytes) -> tuple[int, Extents]:
        found = list(_gnu_extents(raw.block[386:482], name))
        more = raw.block[482]
        while more:
            block = self._input.read_exactly(BLOCK)
            found += _gnu_extents(block[:504], name)
            more = block[504]
            if len(found) > MAX_EXTENTS:
                raise ArchiveError(f"the sparse file {shown(name)} has too many pieces")
        return self._checked(tuple(found), _number(raw.block[483:495], b"size", name), name)

    def _sparse_map(self, name: bytes) -> Extents:
        """Read a sparse map of version 1.0: decimal numbers, one per line, in whole blocks before the data."""
        numbers = self._map_numbers(name)
        count = next(numbers)
        if count > MAX_EXTENTS:
            raise ArchiveError(f"the sparse file {shown(name)} has too many pieces")
        return tuple((next(numbers), next(numbers)) for _ in range(count))

    def _map_numbers(self, name: bytes) -> Iterator[int]:
        rest = b""
        while True:
            if self._unread < BLOCK:
                raise ArchiveError(f"the sparse file {shown(name)} has a map that does not end")
            rest += self._input.read_exactly(BLOCK)
            self._unread -= BLOCK
            *lines, rest = rest.split(b"\n")
            if len(rest) > BLOCK:
                raise ArchiveError(f"the sparse file {shown(name)} has a damaged map")
            yield from (_decimal(line, name) for line in lines)


# --- fields --------------------------------------------------------------------------------------------------


def _text(field: bytes) -> bytes:
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def _verify_checksum(block: bytes, field: bytes) -> None:
    stored = _octal(field)
    blanked = block[: _CHECKSUM.start] + b" " * 8 + block[_CHECKSUM.stop :]
    plain = sum(blanked)
    # Some old programs added signed characters.
    if stored != plain and stored != plain - 256 * sum(byte > 127 for byte in blanked):
        raise ArchiveError("the archive is damaged, or this is not a tar archive: the sum of a header is wrong")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    if not digits:
        return 0
    digits = digits.split(b"\0", 1)[0]
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _number(field: bytes, what: bytes, name: bytes) -> int:
    """Decode a number: octal digits, or, if the first bit is set, base 256 in two's complement."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & (1 << bits) - 1
        return value - (1 << bits) if field[0] & 0x40 else value
    found = _octal(field)
    if found is None:
        raise ArchiveError(f"the entry {shown(name)} has a damaged {what.decode()}")
    return found


def _size(field: bytes, name: bytes) -> int:
    size = _number(field, b"size", name)
    if not 0 <= size <= _MAX_SIZE:
        raise ArchiveError(f"the entry {shown(name)} has the impossible size {size}")
    return size


def _id(record: bytes | None, field: bytes, name: bytes) -> int:
    value = _number(field, b"owner", name) if record is None else _decimal(record, name)
    if not 0 <= value <= _MAX_ID:
        raise ArchiveError(f"the entry {shown(name)} belongs to the impossible user or group {value}")
    return value


_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


def _mtime(record: bytes | None, field: bytes, name: bytes) -> int:
    if record is not None:
        return parse_time(record, name)
    seconds = _number(field, b"time", name)
    if abs(seconds) > _MAX_TIME:
        raise ArchiveError(f"the entry {shown(name)} has the impossible time {seconds}")
    return seconds * 1_000_000_000


def parse_time(text: bytes, name: bytes) -> int:
    """Return the nanoseconds of a PAX time: decimal seconds with a fraction, of which nine digits count.

    Raises `ArchiveError` with the `name` of the entry.
    """
    form = _TIME.fullmatch(text)
    if form is None or int(form[2]) > _MAX_TIME:
        raise ArchiveError(f"the entry {shown(name)} has the impossible time {shown(text)}")
    value = int(form[2]) * 1_000_000_000 + int(((form[3] or b"") + b"0" * 9)[:9])
    return -value if form[1] else value


def _decimal(text: bytes, name: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ArchiveError(f"the entry {shown(name)} has the damaged number {shown(text[:40])}")
    return int(text)


def _pax_number(pax: dict[bytes, bytes], key: bytes, name: bytes) -> int | None:
    if key not in pax:
        return None
    value = _decimal(pax[key], name)
    if value > _MAX_SIZE:
        raise ArchiveError(f"the entry {shown(name)} has the impossible size {value}")
    return value


def _ustar_name(raw: _RawHeader) -> bytes:
    # GNU tar has times and a sparse map in place of ustar's prefix; star has times in its last 24 bytes.
    if raw.magic[:6] != b"ustar\0":
        return raw.name
    prefix = raw.prefix[:131] if raw.block[508:512] == b"tar\0" else raw.prefix
    prefix = _text(prefix)
    return prefix + b"/" + raw.name if prefix else raw.name


def _kind(raw: _RawHeader, name: bytes) -> Kind:
    kind = _KINDS.get(raw.flag)
    if kind is None:
        raise ArchiveError(f"the entry {shown(name)} is of the unknown type {raw.flag!r}")
    return Kind.DIRECTORY if raw.flag == b"\0" and name.endswith(b"/") else kind


def _path(name: bytes, kind: Kind) -> bytes:
    path = safe_path(name)
    if not path and (kind is not Kind.DIRECTORY or not name):
        raise ArchiveError(f"the entry {shown(name)!r} would replace the root by a {kind.value}")
    return path


def _target(target: bytes, kind: Kind, name: bytes) -> bytes:
    if b"\0" in target or not target or len(target) > 4095:
        raise ArchiveError(f"the {kind.value} {shown(name)} has an impossible target")
    if kind is Kind.SYMLINK:
        return target
    try:
        return safe_path(target)
    except ArchiveError:
        raise ArchiveError(f"the hard link {shown(name)} leads out of the archive's root, to {shown(target)}") from None


def _device(raw: _RawHeader, name: bytes) -> tuple[int, int]:
    major, minor = _number(raw.major, b"device", name), _number(raw.minor, b"device", name)
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):  # the kernel's dev_t
        raise ArchiveError(f"the device {shown(name)} has the impossible number {major}:{minor}")
    return major, minor


def _gnu_extents(area: bytes, name: bytes) -> Iterator[tuple[int, int]]:
    for offset, length in _GNU_SPARSE.iter_unpack(area):
        if not offset.strip(b"\0") and not length.strip(b"\0"):
            return
        yield _number(offset, b"map", name), _number(length, b"map", name)


def _sparse_pairs(numbers: list[bytes]) -> Extents | None:
    if not numbers:
        return None
    if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS or not all(n.isdigit() and len(n) < 20 for n in numbers):
        raise ArchiveError("the archive has a sparse file with a damaged map")
    values = list(map(int, numbers))
    return tuple(zip(values[::2], values[1::2], strict=True))


def parse_pax(data: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Return the records of an extended header, and the numbers of a sparse map of version 0.0, which repeats its keys.

    The last record of a key counts; an empty value removes the key.
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(data):
        key, value, at = _record(data, at)
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse.append(value)
        elif value:
            records[key] = value
        else:
            records.pop(key, None)
    return records, sparse


def _record(data: bytes, at: int) -> tuple[bytes, bytes, int]:
    """Return the key and the value of the record ``LENGTH KEY=VALUE\\n`` at a position, and the position after it."""
    space = data.find(b" ", at, at + 20)
    digits = data[at:space]
    if space < 0 or not digits.isdigit():
        raise ArchiveError("the archive has a damaged extended header")
    end = at + int(digits)
    equals = data.find(b"=", space, end)
    if end > len(data) or equals < 0 or data[end - 1 : end] != b"\n":
        raise ArchiveError("the archive has a damaged extended header")
    key = data[space + 1 : equals]
    if not key or b"\0" in key:
        raise ArchiveError("the archive has an extended header with a damaged key")
    return key, data[equals + 1 : end - 1], end
