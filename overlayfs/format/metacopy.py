"""Metadata-only files: attributes and size in this layer, data in the next layer below.

The value is empty, or ``u8 version=0, u8 length, u8 flags, u8 digest_algo, u8 digest[length - 4]`` with the
fs-verity digest of the data.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "Metadata only copy up" and "fs-verity support";
``fs/overlayfs/util.c`` (ovl_check_metacopy_xattr), ``struct ovl_metacopy`` of ``fs/overlayfs/overlayfs.h``.
"""

import errno
import struct
from dataclasses import dataclass

from overlayfs.errors import oserror

VALUE = b""
"""What is written: no digest."""

_HEADER = struct.Struct("BBBB")
_LONGEST_DIGEST = 64


@dataclass(frozen=True)
class Metacopy:
    """A metadata-only mark.  `digest_algo` is 0 and `digest` empty when the data is not bound to a digest."""

    digest_algo: int = 0
    digest: bytes = b""
    flags: int = 0


def parse(value: bytes) -> Metacopy:
    """Return the mark; OSError EIO for a value that the kernel refuses, since its data cannot be trusted."""
    if not value:
        return Metacopy()
    if len(value) < _HEADER.size:
        raise oserror(errno.EIO)
    version, length, flags, algorithm = _HEADER.unpack_from(value)
    if version != 0 or length != len(value) or length > _HEADER.size + _LONGEST_DIGEST:
        raise oserror(errno.EIO)
    return Metacopy(algorithm, value[_HEADER.size :], flags)


def encode(mark: Metacopy) -> bytes:
    """Return the value of a mark, in the short form when it says nothing."""
    if mark == Metacopy():
        return VALUE
    return _HEADER.pack(0, _HEADER.size + len(mark.digest), mark.flags, mark.digest_algo) + mark.digest
