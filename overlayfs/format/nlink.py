"""The link count of an indexed inode in the union, relative to the count of a real one.

``U+1``: one more than the upper inode has; ``L-2``: two fewer than the lower inode has.

Source: kernel ``fs/overlayfs/inode.c`` (ovl_set_nlink_common, ovl_get_nlink).
"""

import re
from typing import Literal

_FORM = re.compile(rb"([UL])([+-][0-9]{1,10})")


def encode(base: Literal["U", "L"], delta: int) -> bytes:
    """Return the value of ``PREFIXnlink``."""
    return b"%b%+d" % (base.encode("ascii"), delta)


def decode(value: bytes) -> tuple[str, int] | None:
    """Return (base, delta), or None for a malformed value; the real count is used then."""
    form = _FORM.fullmatch(value)
    return None if form is None else (form[1].decode("ascii"), int(form[2]))
