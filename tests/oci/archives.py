"""Tar archives for tests, made block by block, so that they can be invalid in any way."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

from overlayfs.oci.layer_tar import unpack_tar
from overlayfs.oci.unpack import Unpacker
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, dump

END = bytes(1024)
EPOCH = 1_600_000_000


def field(value: int | bytes, width: int) -> bytes:
    """Return a number as octal digits, or bytes unchanged."""
    return value.ljust(width, b"\0") if isinstance(value, bytes) else b"%0*o\0" % (width - 1, value)


def sealed(block: bytes) -> bytes:
    """A header with its checksum."""
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def header(
    name: bytes,
    flag: bytes = b"0",
    *,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    size: int | bytes = 0,
    mtime: int | bytes = EPOCH,
    target: bytes = b"",
    magic: bytes = b"ustar\x0000",
    major: int | bytes = 0,
    minor: int | bytes = 0,
    prefix: bytes = b"",
) -> bytes:
    """One header block; numbers may be given as raw bytes."""
    block = b"".join((
        field(name, 100), field(mode, 8), field(uid, 8), field(gid, 8), field(size, 12), field(mtime, 12), b" " * 8,
        flag, field(target, 100), magic, bytes(64), field(major, 8), field(minor, 8), field(prefix, 155), bytes(12),
    ))  # fmt: skip
    assert len(block) == 512
    return sealed(block)


def padded(data: bytes) -> bytes:
    """Data in whole blocks."""
    return data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d%b" % (length, rest)


def pax(records: Mapping[bytes, bytes] | bytes, flag: bytes = b"x") -> bytes:
    """An extended header."""
    data = records if isinstance(records, bytes) else b"".join(record(*each) for each in records.items())
    return header(b"PaxHeaders/x", flag, size=len(data)) + padded(data)


def file(name: bytes, data: bytes = b"", **fields: int | bytes) -> bytes:
    """A regular file."""
    return header(name, b"0", size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def directory(name: bytes, **fields: int | bytes) -> bytes:
    """A directory."""
    return header(name, b"5", **{"mode": 0o755, **fields})  # type: ignore[arg-type]


def symlink(name: bytes, target: bytes) -> bytes:
    """A symbolic link."""
    return header(name, b"2", target=target, mode=0o777)


def hardlink(name: bytes, target: bytes) -> bytes:
    """A hard link."""
    return header(name, b"1", target=target)


def device(name: bytes, major: int, minor: int, flag: bytes = b"3") -> bytes:
    """A device."""
    return header(name, flag, major=major, minor=minor, mode=0o600)


def unpack(archive: bytes, root: Path) -> Unpacker:
    """Unpack an archive into a new directory."""
    root.mkdir()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack_tar(io.BytesIO(archive).read, fd)
    finally:
        os.close(fd)


def picture(root: Path) -> Dump:
    """Everything that is visible of a tree but the mtime of its root."""
    raw = PosixRaw(os.fsencode(root))
    try:
        found = dump(raw)
    finally:
        raw.close()
    found[b""] = found[b""]._replace(mtime_ns=0)
    return found
