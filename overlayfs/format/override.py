"""Owner, mode and type kept in an attribute, for layers whose files cannot have the real ones.

``UID:GID:MODE[:TYPE[:ignored...]]``: decimal, decimal, octal permission bits; TYPE is ``file``, ``dir``,
``symlink``, ``pipe``, ``socket``, ``block-MAJ-MIN`` or ``char-MAJ-MIN``, matched as a prefix.  Only regular files
and directories have it; without TYPE the real type is used.

Sources: containers/fuse-overlayfs ``utils.h`` and ``main.c`` (option xattr_permissions), containers/storage
``pkg/idtools/idtools.go``.
"""

import errno
import os
import re
import stat
from dataclasses import dataclass

from overlayfs.errors import oserror

ATTRIBUTES = (
    b"security.fuseoverlayfs.override_stat",
    b"user.containers.override_stat",
    b"user.fuseoverlayfs.override_stat",
)
"""The first of these that the root of a layer has is used in the whole layer."""

_COVER = b"user.containers.override_"
_LONGEST_NAME = 255
_LARGEST_ID = 2**32 - 2
_FORM = re.compile(rb"([0-9]{1,10}):([0-9]{1,10}):([0-7]{1,7})(?::([^:]*)(?::.*)?)?", re.DOTALL)
_DEVICE = re.compile(rb"(block|char)-+([0-9]{1,10})-+([0-9]{1,10})")

_WORDS = {
    b"file": stat.S_IFREG,
    b"dir": stat.S_IFDIR,
    b"symlink": stat.S_IFLNK,
    b"pipe": stat.S_IFIFO,
    b"socket": stat.S_IFSOCK,
}
_KINDS = {kind: word for word, kind in _WORDS.items()}
_DEVICE_WORDS = {b"block": stat.S_IFBLK, b"char": stat.S_IFCHR}
_DEVICE_KINDS = {kind: word for word, kind in _DEVICE_WORDS.items()}


@dataclass(frozen=True)
class Override:
    """The attributes to present: `mode` has permission bits, `kind` is an S_IFMT value or None for the real type."""

    uid: int
    gid: int
    mode: int
    kind: int | None = None
    rdev: int = 0


def parse(value: bytes) -> Override:
    """Return the decoded value; OSError EINVAL if it is malformed."""
    form = _FORM.fullmatch(value)
    if form is None:
        raise oserror(errno.EINVAL)
    uid, gid, mode = int(form[1]), int(form[2]), int(form[3], 8)
    if max(uid, gid) > _LARGEST_ID:
        raise oserror(errno.EINVAL)
    kind, rdev = (None, 0) if form[4] is None else _parse_type(form[4])
    return Override(uid, gid, mode & 0o7777, kind, rdev)


def _parse_type(text: bytes) -> tuple[int, int]:
    device = _DEVICE.match(text)
    if device is not None:
        return _DEVICE_WORDS[device[1]], _device_number(int(device[2]), int(device[3]))
    for word, kind in _WORDS.items():
        if text.startswith(word):
            return kind, 0
    raise oserror(errno.EINVAL)


def _device_number(major: int, minor: int) -> int:
    if major >= 1 << 12 or minor >= 1 << 20:  # the limits of dev_t in the kernel
        raise oserror(errno.EINVAL)
    return os.makedev(major, minor)


def encode(override: Override) -> bytes:
    """Return the value of the attribute."""
    text = b"%d:%d:%o" % (override.uid, override.gid, override.mode)
    return text if override.kind is None else text + b":" + _type(override.kind, override.rdev)


def _type(kind: int, rdev: int) -> bytes:
    if kind in _DEVICE_KINDS:
        return b"%b-%d-%d" % (_DEVICE_KINDS[kind], os.major(rdev), os.minor(rdev))
    return _KINDS[kind]


def covered_name(name: bytes) -> bytes:
    """Return the name under which an attribute is stored that the file system would not accept.

    fuse-overlayfs with ``xattr_permissions=2`` stores ``security.*`` this way.  EOPNOTSUPP beyond 255 bytes.
    """
    if len(_COVER) + len(name) > _LONGEST_NAME:
        raise oserror(errno.EOPNOTSUPP)
    return _COVER + name


def uncovered_name(stored: bytes) -> bytes | None:
    """Return the attribute that `stored` stands for, or None if it is not a covered one."""
    if not stored.startswith(_COVER) or stored == b"user.containers.override_stat":
        return None
    return stored[len(_COVER) :] or None
