"""Names of extended attributes: those of the format, those of users, and the escaping between them.

The format owns every name under ``trusted.overlay.`` or, for mounts without privilege, ``user.overlay.``.
A user's attribute with such a name (an overlay nested on our mount writes them) is stored one level deeper, as
``PREFIXoverlay.REST``, and shown without that level.  Both prefixes are escaped in both modes, so that a
rootless overlay can be nested on a privileged one and the reverse.  Prefixes match with their final dot:
``trusted.overlayfsrz`` is an ordinary attribute.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, sections "User xattr" and "Nesting overlayfs
mounts", and ``fs/overlayfs/xattrs.c``.
"""

import errno
from enum import Enum

from overlayfs.errors import oserror


class Mode(Enum):
    """The prefix that a mount writes; it reads both."""

    TRUSTED = "trusted"
    USER = "user"


_PREFIXES = {Mode.TRUSTED: b"trusted.overlay.", Mode.USER: b"user.overlay."}
_EVERY_PREFIX = tuple(_PREFIXES.values())
_ESCAPE = b"overlay."

# What follows the prefix.
OPAQUE = b"opaque"
WHITEOUT = b"whiteout"
REDIRECT = b"redirect"
METACOPY = b"metacopy"
ORIGIN = b"origin"
IMPURE = b"impure"
NLINK = b"nlink"
UUID = b"uuid"

FUSEOVERLAYFS_OPAQUE = b"user.fuseoverlayfs.opaque"

RESERVED_PREFIXES = (b"trusted.overlaypy.", b"user.overlaypy.")
"""Reserved for marks that only this program understands.  None is written yet, but a layer or archive must not be able
to bring one along for a later version to trust.  Not ``trusted.overlayfs.``: the kernel's documentation misspells its
own prefix that way once, and unionmount-testsuite expects ``trusted.overlayfsrz`` to be an ordinary attribute."""

_PRIVATE = (*RESERVED_PREFIXES, b"user.fuseoverlayfs.")
_PRIVATE_WITH_OVERRIDE = (*_PRIVATE, b"security.fuseoverlayfs.", b"user.containers.override_")

LONGEST = 255  # XATTR_NAME_MAX


def prefix(mode: Mode) -> bytes:
    """Return the prefix of the marks that a mount of this mode writes, with its final dot."""
    return _PREFIXES[mode]


def _private(name: bytes, override_active: bool) -> bool:
    return name.startswith(_PRIVATE_WITH_OVERRIDE if override_active else _PRIVATE)


def _kernel_prefix(name: bytes) -> bytes | None:
    return next((known for known in _EVERY_PREFIX if name.startswith(known)), None)


def stored_name(name: bytes, override_active: bool = False) -> bytes:
    """Return the name under which a user's attribute is stored in a layer.

    OSError EPERM for a private name: it can be neither set nor removed, and reading it is ENODATA.
    EOPNOTSUPP when the escaped name is longer than 255 bytes, as in the kernel.
    `override_active`: the layer keeps owners in attributes (`format.override`), whose names are private too.
    """
    if _private(name, override_active):
        raise oserror(errno.EPERM)
    found = _kernel_prefix(name)
    if found is None:
        return name
    stored = found + _ESCAPE + name[len(found) :]
    if len(stored) > LONGEST:
        raise oserror(errno.EOPNOTSUPP)
    return stored


def shown_name(stored: bytes, override_active: bool = False) -> bytes | None:
    """Return the name that a user of the mount sees, or None for an attribute that is hidden."""
    if _private(stored, override_active):
        return None
    found = _kernel_prefix(stored)
    if found is None:
        return stored
    if not stored.startswith(_ESCAPE, len(found)):
        return None
    return found + stored[len(found) + len(_ESCAPE) :]


def is_private(stored: bytes, override_active: bool = False) -> bool:
    """Return whether an attribute describes the object's place in a layer: hidden, and not copied by copy-up.

    Escaped attributes belong to users and are copied unchanged.
    """
    return shown_name(stored, override_active) is None
