"""Writing tar headers, in one form for each entry, so that the same layer always gives the same bytes.

An entry is a ustar header, preceded by a PAX header with sorted records for what ustar cannot express. Owners are
numbers, user and group names are empty, and there are no access times. Times keep their nanoseconds.

Sources: POSIX pax(1), "ustar Interchange Format" and "pax Extended Header"; docs/images.md, "A layer that goes out".
"""

import struct
from collections.abc import Iterator

from overlayfs.oci.tar_entry import Kind, TarEntry
from overlayfs.oci.tar_reader import BLOCK

END = bytes(2 * BLOCK)

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_MAX_OCTAL_SIZE = 8**11 - 1
_MAX_OCTAL_ID = 8**7 - 1
_NANO = 1_000_000_000
_FLAGS = {
    Kind.FILE: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.CHARACTER: b"3", Kind.BLOCK: b"4",
    Kind.DIRECTORY: b"5", Kind.FIFO: b"6",
}  # fmt: skip


def padding(size: int) -> bytes:
    """Return the zeros after `size` bytes of data, which fill the last block."""
    return bytes(-size % BLOCK)


def header(entry: TarEntry) -> bytes:
    """Return the headers of an entry. Its extents are ignored: holes are written as zeros."""
    name = (entry.path or b".") + b"/" if entry.kind is Kind.DIRECTORY else entry.path
    records = dict(_records(entry, name))
    ustar = _ustar(entry, name, records)
    return _pax_header(entry.path, records) + ustar if records else ustar


def file_header(name: bytes, size: int, mode: int = 0o644) -> bytes:
    """Return the header of a file in an archive: always one block, so that it can be filled in after the data.

    A size that does not fit the octal digits is written in base 256, a GNU extension that all current readers know.
    """
    block = bytearray(header(TarEntry(name, Kind.FILE, mode, size=min(size, _MAX_OCTAL_SIZE))))
    if size > _MAX_OCTAL_SIZE:
        block[124:136] = (1 << 95 | size).to_bytes(12, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _records(entry: TarEntry, name: bytes) -> Iterator[tuple[bytes, bytes]]:
    if _split(name) is None or not _is_plain(name):
        yield b"path", name
    if len(entry.target) > 100 or not _is_plain(entry.target):
        yield b"linkpath", entry.target
    if entry.size > _MAX_OCTAL_SIZE:
        yield b"size", b"%d" % entry.size
    for key, number in ((b"uid", entry.uid), (b"gid", entry.gid)):
        if number > _MAX_OCTAL_ID:
            yield key, b"%d" % number
    if entry.mtime_ns % _NANO or not 0 <= entry.mtime_ns // _NANO <= _MAX_OCTAL_SIZE:
        yield b"mtime", time_text(entry.mtime_ns)
    for key, value in entry.xattrs.items():
        yield b"SCHILY.xattr." + key, value


def _is_plain(name: bytes) -> bool:
    """Return whether ustar may hold a name: the encoding of other characters than ASCII is undefined there."""
    return name.isascii() or not _is_utf8(name)


def _is_utf8(name: bytes) -> bool:
    # PAX records are UTF-8 by definition; a name that is not goes into the ustar field, which has no encoding.
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """Return the prefix and name fields for a name, None if it does not fit."""
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101, min(156, len(name) - 1))
    return (name[:cut], name[cut + 1 :]) if cut > 0 else None


def time_text(nanoseconds: int) -> bytes:
    """Return a time in PAX form: decimal seconds, with a fraction only if it is not zero."""
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), _NANO)
    text = b"%b%d.%09d" % (sign, seconds, fraction)
    return text.rstrip(b"0").rstrip(b".")


def _ustar(entry: TarEntry, name: bytes, records: dict[bytes, bytes]) -> bytes:
    prefix, field = _split(name) or (b"", name[:100])
    major, minor = entry.device
    return _header_block(
        field,
        entry.mode & 0o7777,
        min(entry.uid, _MAX_OCTAL_ID),
        min(entry.gid, _MAX_OCTAL_ID),
        0 if b"size" in records else entry.size,
        min(max(entry.mtime_ns // _NANO, 0), _MAX_OCTAL_SIZE),
        _FLAGS[entry.kind],
        entry.target[:100],
        major,
        minor,
        prefix,
    )


def _header_block(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    seconds: int,
    flag: bytes,
    target: bytes,
    major: int,
    minor: int,
    prefix: bytes,
) -> bytes:
    block = _HEADER.pack(
        name, b"%07o" % mode, b"%07o" % uid, b"%07o" % gid, b"%011o" % size, b"%011o" % seconds, b" " * 8, flag,
        target, b"ustar\x0000", b"", b"", b"%07o" % major, b"%07o" % minor, prefix,
    )  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _pax_header(path: bytes, records: dict[bytes, bytes]) -> bytes:
    data = b"".join(_record(key, records[key]) for key in sorted(records))
    name = b"PaxHeaders/" + (path.rsplit(b"/", 1)[-1] or b".")[:80]
    return _header_block(name, 0o644, 0, 0, len(data), 0, b"x", b"", 0, 0, b"") + data + padding(len(data))


def _record(key: bytes, value: bytes) -> bytes:
    """Return ``LENGTH KEY=VALUE\\n``; the length includes its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)
