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
    """One request: the header's fields, and the body, which lies in the receive buffer until the handler returns."""

    __slots__ = ("body", "gid", "nodeid", "op", "pid", "uid", "unique")

    def __init__(self, op: int, unique: int, nodeid: int, uid: int, gid: int, pid: int, body: memoryview) -> None:
        self.op = op
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.body = body

    def caller(self, umask: int = 0) -> Caller:
        """Return who asks."""
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


def received(buffer: bytearray, view: memoryview, length: int) -> Request:
    """Return the request of `length` bytes that lies in a buffer; EPROTO when it says another length."""
    size, op, unique, nodeid, uid, gid, pid, _, _ = IN_HEADER.unpack_from(buffer)
    if size != length:
        raise oserror(errno.EPROTO)
    return Request(op, unique, nodeid, uid, gid, pid, view[IN_HEADER.size : length])
