"""POSIX ACLs as extended attributes: what an object inherits from the default ACL of its directory.

The kernel applies a default ACL by itself, but not to an object that was made elsewhere and moved in.

Value: u32 version 2, then entries of u16 tag, u16 permissions, u32 id, little-endian. Sources: acl(5), section
"Object creation and default ACLs"; include/uapi/linux/posix_acl_xattr.h; fs/posix_acl.c, posix_acl_create_masq.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20
_NAMED = (0x02, 0x08)


class Inherited(NamedTuple):
    """`access`: the value of the access ACL, None when the mode expresses all of it; `mode`: permission bits."""

    access: bytes | None
    mode: int


def inherit(default: bytes, mode: int) -> Inherited:
    """Return what an object of a requested mode gets from a default ACL; ValueError if that is malformed."""
    entries = list(_parse(default))
    group_tag = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    shifts = {_USER_OBJ: 6, group_tag: 3, _OTHER: 0}
    masked, bits = [], mode & ~0o777
    for tag, allowed, identifier in entries:
        if tag in shifts:
            allowed &= mode >> shifts[tag] & 7
            bits |= allowed << shifts[tag]
        masked.append((tag, allowed, identifier))
    minimal = not any(tag in _NAMED or tag == _MASK for tag, _, _ in entries)
    return Inherited(None if minimal else _VERSION + b"".join(_ENTRY.pack(*entry) for entry in masked), bits)


def _parse(value: bytes) -> Iterator[tuple[int, int, int]]:
    if value[:4] != _VERSION or (len(value) - 4) % _ENTRY.size:
        raise ValueError("not a POSIX ACL")
    yield from _ENTRY.iter_unpack(value[4:])
