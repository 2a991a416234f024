"""Opaque directories: entries of lower layers below this path are not part of the merged directory.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "whiteouts and opaque directories" and "Nesting
overlayfs mounts", ``fs/overlayfs/namei.c``; containers/fuse-overlayfs ``main.c`` for its own attribute.
"""

OPAQUE_VALUE = b"y"


def is_opaque(value: bytes | None) -> bool:
    """Return whether the attribute ``PREFIXopaque`` makes a directory opaque; None if it has no such attribute.

    The value must be exactly ``y``: the kernel ignores ``yes``.  ``x`` only announces whiteouts of the attribute form,
    which are looked for in every directory.
    """
    return value == OPAQUE_VALUE


def is_opaque_fuseoverlayfs(value: bytes | None) -> bool:
    """Return whether ``user.fuseoverlayfs.opaque`` makes a directory opaque; fuse-overlayfs tests the first byte."""
    return value is not None and value.startswith(OPAQUE_VALUE)
