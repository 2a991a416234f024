"""The file system of a layer, and the inode numbers that its objects have in the overlay.

An object keeps its number over copy-up, rename and remount (docs/deviations.md). The number is the file system's own
inode number for the file system of the upper (or of the top layer when there is none); for any other it has a tag in
its high bits, as with the kernel's xino, so that numbers of two file systems do not collide.
"""

from dataclasses import dataclass

import xxhash

from overlayfs import sysio
from overlayfs.format import origin as origin_format
from overlayfs.format.origin import Origin

_NUMBER_BITS = 48
_IN_MEMORY = frozenset((0x0102_1994, 0x8584_58F6))  # TMPFS_MAGIC, RAMFS_MAGIC (linux/magic.h)
_TAG_MASK = 0x7FFF


@dataclass(frozen=True)
class FileSystem:
    """The file system of a layer: st_dev, the 16 bytes of its uuid or None, the btrfs subvolume or 0, and a tag."""

    dev: int
    uuid: bytes | None
    subvolume: int
    tag: int

    @classmethod
    def of(cls, root: int) -> "FileSystem":
        """Return the file system of an open directory."""
        uuid = sysio.fs_uuid(root)
        subvolume = _subvolume(root, uuid)
        return cls(sysio.stat_at(root, b"").st_dev, uuid, subvolume, _tag(root, uuid, subvolume))

    def number(self, inode: int, reference: "FileSystem") -> int:
        """Return the overlay's number for an inode of this file system: 64 bits, the highest clear."""
        if self.tag == reference.tag:
            return inode
        return (self.tag << _NUMBER_BITS) | (inode & ((1 << _NUMBER_BITS) - 1)) ^ (inode >> _NUMBER_BITS)

    def origin(self, handle: tuple[int, bytes] | None) -> Origin | None:
        """Return the origin mark for a file handle of this file system, None if it cannot be made."""
        if handle is None or self.uuid is None:
            return None
        return Origin(self.uuid, *handle)

    def inode_of(self, origin: Origin) -> int | None:
        """Return the inode number in `origin`, or None if it is of another file system."""
        if origin.uuid != self.uuid or (found := origin_format.inode(origin)) is None:
            return None
        inode, subvolume = found
        return inode if subvolume in (0, self.subvolume) else None


def is_in_memory(root: int) -> bool:
    """Return whether an open directory is on a file system without a disk, where no call blocks."""
    return sysio.fs_type(root) in _IN_MEMORY


def _subvolume(root: int, uuid: bytes | None) -> int:
    handle = sysio.file_handle(root, b"")
    found = handle and origin_format.inode(Origin(uuid or bytes(16), *handle))
    return found[1] if found else 0


def _tag(root: int, uuid: bytes | None, subvolume: int) -> int:
    # f_fsid of xfs is the device number, which may change at boot: the uuid is preferred.
    name = uuid if uuid is not None and any(uuid) else sysio.fs_id(root).to_bytes(8, "little")
    return (xxhash.xxh64_intdigest(name + subvolume.to_bytes(8, "little")) & _TAG_MASK) or 1
