"""POSIX ACLs in the kernel's form, as the value of `system.posix_acl_access` and `system.posix_acl_default`."""

import struct

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF


def acl(owner: int, group: int, other: int, *, users: dict[int, int] | None = None, mask: int | None = None) -> bytes:
    """Return the value for permissions (three bits each) of the owner, group, others, named users and the mask."""
    entries = [(USER_OBJ, owner, _NO_ID)]
    entries += [(USER, bits, uid) for uid, bits in sorted((users or {}).items())]
    entries.append((GROUP_OBJ, group, _NO_ID))
    if users or mask is not None:
        entries.append((MASK, 7 if mask is None else mask, _NO_ID))
    entries.append((OTHER, other, _NO_ID))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *item) for item in entries)
