"""What the debug lines of requests need of the kernel engine: when each request came, and which reply answers it.

A reply may be sent by the handler, or later by a task or a thread; it carries the unique number of its request.
"""

import errno
from collections.abc import Callable

from overlayfs.fuse import request_log
from overlayfs.fuse.kernel.protocol import LAYOUTS, OUT_HEADER, UNANSWERED, Op
from overlayfs.fuse.kernel.request import KINDS, Reply, Request

# How many bytes come before the names in the body of a request, and how many names there are.
_NAMES: dict[int, tuple[int, int]] = {
    op: (LAYOUTS[layout].size if layout else 0, count)
    for op, layout, count in (
        (Op.LOOKUP, "", 1),
        (Op.UNLINK, "", 1),
        (Op.RMDIR, "", 1),
        (Op.SYMLINK, "", 2),
        (Op.REMOVEXATTR, "", 1),
        (Op.MKNOD, "mknod_in", 1),
        (Op.MKDIR, "mkdir_in", 1),
        (Op.RENAME, "rename_in", 2),
        (Op.RENAME2, "rename2_in", 2),
        (Op.LINK, "link_in", 1),
        (Op.CREATE, "create_in", 1),
        (Op.GETXATTR, "getxattr_in", 1),
        (Op.SETXATTR, "setxattr_in", 1),
    )
}
_NO_NODE = bytes(8)


class RequestTrace:
    """Wraps the `dispatch` of requests and the `send` of replies."""

    def __init__(self, dispatch: Callable[[Request], None], send: Callable[[Reply], None]) -> None:
        self._dispatch = dispatch
        self._send = send
        self._pending: dict[int, tuple[str, int, list[bytes], float]] = {}  # by unique number

    def dispatch(self, request: Request) -> None:
        """Note a request and have it handled."""
        kind = KINDS.get(request.op, str(request.op))
        self._pending[request.unique] = (kind, request.nodeid, _names(request), request_log.clock())
        self._dispatch(request)
        if request.op in UNANSWERED:
            self._write(request.unique, 0)

    def send(self, reply: Reply) -> None:
        """Send a reply and log its request. Any thread may."""
        self._send(reply)
        if reply is not None:
            header = reply if isinstance(reply, bytes) else reply[0]
            _, error, unique = OUT_HEADER.unpack_from(header)
            self._write(unique, -error, header[OUT_HEADER.size :])

    def _write(self, unique: int, code: int, body: bytes = b"") -> None:
        request = self._pending.pop(unique, None)
        if request is not None:
            kind, nodeid, names, began = request
            if kind == "LOOKUP" and not code and body.startswith(_NO_NODE):
                code = errno.ENOENT  # an entry without a node: the kernel remembers the absence
            request_log.write(kind, nodeid, names, code, began)


def _names(request: Request) -> list[bytes]:
    """Return the names in a request's body, as far as it is well-formed."""
    start, count = _NAMES.get(request.op, (0, 0))
    return bytes(request.body[start:]).split(b"\0", count)[:count] if count else []
