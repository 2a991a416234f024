"""Whiteouts: how a layer says that a name of the layers below is gone.

Three forms are read in every layer: a character device 0:0; a regular file ``.wh.NAME`` beside the name; an
empty regular file with the attribute ``PREFIXwhiteout`` (`xattrs.WHITEOUT`).  Names that begin ``.wh.`` are
never shown, whatever they are.

Sources: kernel ``Documentation/filesystems/overlayfs.rst``, "whiteouts and opaque directories"; OCI
image-spec ``layer.md``, "Whiteouts"; containers/storage ``pkg/archive/whiteouts.go`` for the aufs names.
"""

import stat

PREFIX = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
"""A regular file of this name makes its directory opaque (`format.opaque`)."""

_AUFS_METADATA = b".wh..wh."


def is_reserved(name: bytes) -> bool:
    """Whether a name belongs to the format: never listed, ENOENT to look up, EINVAL to create."""
    return name.startswith(PREFIX)


def target(name: bytes) -> bytes | None:
    """Return the name that a regular file `name` deletes, or None if it deletes nothing.

    Nothing: ordinary names, ``.wh.`` alone, and aufs metadata ``.wh..wh.*`` with the opaque mark.  Nor may
    ``.wh..`` and ``.wh...`` name the directory itself or its parent.
    """
    if not name.startswith(PREFIX) or name.startswith(_AUFS_METADATA):
        return None
    deleted = name[len(PREFIX) :]
    return None if deleted in (b"", b".", b"..") else deleted


def name_for(deleted: bytes) -> bytes:
    """Return the name of the regular file that deletes `deleted`; four bytes longer, so 251 is the longest."""
    return PREFIX + deleted


def is_device_whiteout(mode: int, rdev: int) -> bool:
    """Whether an object is a whiteout by its type: a character device 0:0, of any permissions and links."""
    return rdev == 0 and stat.S_ISCHR(mode)
