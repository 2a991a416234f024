"""Origins: the lower object that an upper one was copied from, identified by its file handle.

Value: ``00 FB LENGTH FLAGS TYPE UUID[16] FID[LENGTH - 21]``, integers inside the handle in the byte order of
the host.  The same bytes in hexadecimal name the entries of the kernel's index directory.

Source: kernel ``struct ovl_fb`` of ``fs/overlayfs/overlayfs.h``, ovl_check_fb_len and ovl_get_index_name_fh of
``fs/overlayfs/namei.c``; handle types in ``include/linux/exportfs.h``, their layout in ``fs/libfs.c``,
``mm/shmem.c`` (shmem_encode_fh), ``fs/xfs/xfs_export.h``, ``fs/btrfs/export.h``.
"""

import struct
import sys
from dataclasses import dataclass

_HEADER = struct.Struct("BBBBB16s")
_MAGIC = 0xFB
_LONGEST_FID = 128  # MAX_HANDLE_SZ
_BIG_ENDIAN = 1
_ANY_ENDIAN = 2
_PATH_UPPER = 4
_KNOWN_FLAGS = _BIG_ENDIAN | _ANY_ENDIAN | _PATH_UPPER
_HOST_ENDIAN = _BIG_ENDIAN if sys.byteorder == "big" else 0
_NO_UUID = bytes(16)


@dataclass(frozen=True)
class Origin:
    """A file handle: the 16 bytes of the file system's uuid, the handle's type (0 to 255) and its bytes (up to 128).

    `upper` marks the handle of an upper object, which occurs only in the index.
    """

    uuid: bytes
    fid_type: int
    fid: bytes
    upper: bool = False


def encode(origin: Origin) -> bytes:
    """Return the value of ``PREFIXorigin``."""
    flags = _HOST_ENDIAN | (_PATH_UPPER if origin.upper else 0)
    length = _HEADER.size + len(origin.fid)
    return _HEADER.pack(0, _MAGIC, length, flags, origin.fid_type, origin.uuid) + origin.fid


def decode(value: bytes) -> Origin | None:
    """Return the origin, or None when it is unknown.

    Unknown: an empty value (copied up from an unknown object), a malformed one, a later version, unknown
    flags, a handle made by a host of the other byte order.
    """
    if len(value) < _HEADER.size:
        return None
    version, magic, length, flags, kind, uuid = _HEADER.unpack_from(value)
    if magic != _MAGIC or version != 0 or not _HEADER.size <= length <= len(value) or flags & ~_KNOWN_FLAGS:
        return None
    if not flags & _ANY_ENDIAN and flags & _BIG_ENDIAN != _HOST_ENDIAN:
        return None
    fid = value[_HEADER.size : length]
    return Origin(uuid, kind, fid, bool(flags & _PATH_UPPER)) if len(fid) <= _LONGEST_FID else None


def index_name(origin: Origin) -> bytes:
    """Return the name of the entry for this lower object in the kernel's index directory."""
    return encode(origin).hex().encode("ascii")


# (type, length of the handle) -> layout, and whether the fields are (inode, ...), tmpfs or btrfs.
_INODE_32 = struct.Struct("=I")
_INODE_64 = struct.Struct("=Q")
_TMPFS = struct.Struct("=III")  # generation, low and high half of the inode number
_BTRFS = struct.Struct("=QQ")  # inode number, subvolume

_PLAIN = {
    (0x01, 8): _INODE_32,  # FILEID_INO32_GEN: ext4 and most others
    (0x02, 16): _INODE_32,  # FILEID_INO32_GEN_PARENT
    (0x81, 12): _INODE_64,  # xfs: the same two with XFS_FILEID_TYPE_64FLAG
    (0x82, 24): _INODE_64,
}
_BTRFS_TYPES = {(0x4D, 20), (0x4E, 32), (0x4F, 40)}


def inode(origin: Origin) -> tuple[int, int] | None:
    """Return (inode number, subvolume or 0) of the lower object, or None for a handle of unknown layout.

    A FUSE file system uses the types of xfs for other contents; it has no uuid, so a handle of these types
    without one is unknown.
    """
    shape = (origin.fid_type, len(origin.fid))
    if shape == (0x01, _TMPFS.size):
        _, low, high = _TMPFS.unpack(origin.fid)
        return high << 32 | low, 0
    if shape in _BTRFS_TYPES:
        number, subvolume = _BTRFS.unpack_from(origin.fid)
        return number, subvolume
    layout = _PLAIN.get(shape)
    if layout is None or (layout is _INODE_64 and origin.uuid == _NO_UUID):
        return None
    return layout.unpack_from(origin.fid)[0], 0
