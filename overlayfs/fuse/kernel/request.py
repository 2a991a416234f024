"""One request as it was received, and what a reply and a handler are."""

import errno
from collections.abc import Callable
from typing import TypeAlias

from overlayfs.errors import oserror
from overlayfs.fs.names import Caller
from overlayfs.fuse.kernel.protocol import IN_HEADER, Op

Reply: TypeAlias = bytes | tuple[bytes, bytes | memoryview] | None
Handler: TypeAlias = Callable[["Request"], Reply]

KINDS = {op.value: op.name for op in Op}


class Request:
    """One request: the header's fields and the body, which is in the receive buffer until the handler returns.

    EPROTO when the header says another length than `received`, the request as it was read.
    """

    __slots__ = ("body", "gid", "nodeid", "op", "pid", "uid", "unique")

    def __init__(self, received: memoryview) -> None:
        size, self.op, self.unique, self.nodeid, self.uid, self.gid, self.pid, _, _ = IN_HEADER.unpack_from(received)
        if size != len(received):
            raise oserror(errno.EPROTO)
        self.body = received[IN_HEADER.size :]

    def caller(self, umask: int = 0) -> Caller:
        """Return the user on whose behalf the request is made."""
        return Caller(self.uid, self.gid, umask)

    def name(self, start: int = 0) -> bytes:
        """Return the one name that the body ends with, without its NUL; EINVAL for none."""
        raw = bytes(self.body[start:])
        if raw[-1:] != b"\0" or raw.count(b"\0") != 1:
            raise oserror(errno.EINVAL)
        return raw[:-1]

    def two_names(self, start: int = 0) -> tuple[bytes, bytes]:
        """Return the two names that the body ends with; EINVAL for fewer."""
        first, between, rest = bytes(self.body[start:]).partition(b"\0")
        if not between or rest[-1:] != b"\0" or rest.count(b"\0") != 1:
            raise oserror(errno.EINVAL)
        return first, rest[:-1]
