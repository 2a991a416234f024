"""Redirects: the path of the lower parts of a renamed directory (or metadata-only file).

A value is either one component, which replaces the object's own name in the parent's lower directory, or a path
from the root of the stack that begins with a slash.

Source: kernel ``Documentation/filesystems/overlayfs.rst``, "redirect_dir"; ``fs/overlayfs/util.c``
(ovl_get_redirect_xattr); parameter ``redirect_max``.
"""

import errno

from overlayfs.errors import oserror

MAX = 256
"""Longest value that is written, in bytes: the kernel's default for ``redirect_max``.  Longer values are read."""

_LONGEST_NAME = 255
_LONGEST_PATH = 4095


def _is_name(component: bytes) -> bool:
    return 0 < len(component) <= _LONGEST_NAME and component not in (b".", b"..")


def parse(value: bytes) -> bytes | None:
    """Return the redirect to follow, or None for a malformed value, which has no effect.

    Malformed: empty, NUL inside, an empty component, ``.`` or ``..``, a component longer than a name can be,
    a relative value with a slash.
    """
    if b"\0" in value or len(value) > _LONGEST_PATH:
        return None
    components = value[1:].split(b"/") if value.startswith(b"/") else [value]
    if any(b"/" in component or not _is_name(component) for component in components):
        return None
    return value


def encode(path: bytes) -> bytes:
    """Return the value for one component, or for an absolute path that begins with a slash.

    OSError EXDEV when it is too long to be written, which makes programs fall back to copying; EINVAL when it is
    malformed.
    """
    if parse(path) is None:
        raise oserror(errno.EINVAL)
    if len(path) > MAX:
        raise oserror(errno.EXDEV)
    return path
