"""Metadata-only files: attributes and size are in this layer, the data is in a layer below.

The value is empty, or ``u8 version=0, u8 length, u8 flags, u8 digest_algo, u8 digest[length - 4]`` with the
fs-verity digest of the data.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "Metadata only copy up" and "fs-verity support";
``fs/overlayfs/util.c`` (ovl_check_metacopy_xattr), ``struct ovl_metacopy`` of ``fs/overlayfs/overlayfs.h``.
"""

import errno
import struct

from overlayfs.errors import oserror

VALUE = b""
"""The value that is written: no digest."""

_HEADER = struct.Struct("BBBB")
_LONGEST_DIGEST = 64


def check(value: bytes) -> None:
    """Raise OSError EIO for a value that the kernel refuses, since its data cannot be trusted.

    A digest is not compared with the data: that is what the kernel does with ``verity=off``, its default.
    """
    if not value:
        return
    if len(value) < _HEADER.size:
        raise oserror(errno.EIO)
    version, length, _flags, _algorithm = _HEADER.unpack_from(value)
    if version != 0 or length != len(value) or length > _HEADER.size + _LONGEST_DIGEST:
        raise oserror(errno.EIO)
