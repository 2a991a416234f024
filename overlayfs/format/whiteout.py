"""Whiteouts: marks that delete a name of the layers below.

Three forms are read in every layer: a character device 0:0; a regular file ``.wh.NAME`` beside the name; an
empty regular file with the attribute ``PREFIXwhiteout`` (`xattrs.WHITEOUT`).  Names that begin with ``.wh.`` are
never shown, whatever the type of the object.

Sources: kernel ``Documentation/filesystems/overlayfs.rst``, "whiteouts and opaque directories"; OCI
image-spec ``layer.md``, "Whiteouts"; containers/storage ``pkg/archive/whiteouts.go`` for the aufs names.
"""

import stat

PREFIX = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
"""A regular file of this name makes its directory opaque (`format.opaque`)."""

_AUFS_METADATA = b".wh..wh."


def is_reserved(name: bytes) -> bool:
    """Return whether a name belongs to the format: never listed, ENOENT to look up, EINVAL to create."""
    return name.startswith(PREFIX)


def target(name: bytes) -> bytes | None:
    """Return the name that a regular file `name` deletes, or None if it deletes nothing.

    These delete nothing: ordinary names, the bare ``.wh.``, aufs metadata ``.wh..wh.*`` (which includes the opaque
    mark), and ``.wh..`` and ``.wh...``, which would name the directory itself or its parent.
    """
    if not name.startswith(PREFIX) or name.startswith(_AUFS_METADATA):
        return None
    deleted = name[len(PREFIX) :]
    return None if deleted in (b"", b".", b"..") else deleted


def name_for(deleted: bytes) -> bytes:
    """Return the name of the regular file that deletes `deleted`; four bytes longer, so 251 is the longest."""
    return PREFIX + deleted


def is_device_whiteout(mode: int, rdev: int) -> bool:
    """Return whether an object is a whiteout by its type: a character device 0:0, of any permissions and link count."""
    return rdev == 0 and stat.S_ISCHR(mode)
