"""Opaque directories: what lies below this path in lower layers does not count.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "whiteouts and opaque directories" and "Nesting
overlayfs mounts", ``fs/overlayfs/namei.c``; containers/fuse-overlayfs ``main.c`` for its own attribute.
"""

from enum import Enum


class Opacity(Enum):
    """What the attribute ``PREFIXopaque`` says of a directory."""

    NONE = "none"
    OPAQUE = "opaque"
    XWHITEOUTS = "xwhiteouts"
    """Not opaque, but it may hold whiteouts of the attribute form."""


OPAQUE_VALUE = b"y"

_MEANINGS = {OPAQUE_VALUE: Opacity.OPAQUE, b"x": Opacity.XWHITEOUTS}


def decode(value: bytes | None) -> Opacity:
    """Return the meaning of ``PREFIXopaque``.  Exactly one byte counts: the kernel ignores ``yes``."""
    return Opacity.NONE if value is None else _MEANINGS.get(value, Opacity.NONE)


def decode_fuseoverlayfs(value: bytes | None) -> bool:
    """Whether ``user.fuseoverlayfs.opaque`` makes the directory opaque; its writer looks at the first byte."""
    return value is not None and value.startswith(OPAQUE_VALUE)
