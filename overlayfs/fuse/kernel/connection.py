"""The connection to the kernel: the descriptor of /dev/fuse, and what is sent on it apart from replies."""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Protocol

from overlayfs import sysio
from overlayfs.fuse.engine import MountSettings
from overlayfs.fuse.kernel.protocol import DEV_IOC_BACKING_CLOSE, DEV_IOC_BACKING_OPEN, LAYOUTS, OUT_HEADER, Notify

_ATTRIBUTES_ONLY = -1
_ID = struct.Struct("<I")


class Attachment(Protocol):
    """A mount: its descriptor of /dev/fuse, non-blocking."""

    fd: int

    def read_ahead(self, size: int) -> None:
        """Let the kernel read up to `size` bytes ahead, where that can be set; after the handshake."""

    def detach(self) -> None:
        """Unmount if still mounted, and close the descriptor."""

    def close(self) -> None:
        """Only close the descriptor."""


class Attacher(Protocol):
    """Makes a mount; MountError with the reason."""

    def __call__(self, mountpoint: bytes, settings: MountSettings) -> Attachment: ...


class Connection:
    """Sends notifications to the kernel (FUSE_NOTIFY_*). Any thread may, except where a method says otherwise."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def forget_attributes(self, nodeid: int) -> None:
        """Make the kernel send a GETATTR before it uses the attributes of a node again. It waits for no lock."""
        self._notify(Notify.INVAL_INODE, LAYOUTS["inval_inode"].pack(nodeid, _ATTRIBUTES_ONLY, 0))

    def drop_pages(self, nodeid: int) -> None:
        """Make the kernel write back and drop the pages of a node, and return when it has.

        Never on the loop: the call waits for READ and WRITE requests that the loop answers.
        """
        self._notify(Notify.INVAL_INODE, LAYOUTS["inval_inode"].pack(nodeid, 0, 0))

    def store(self, nodeid: int, data: bytes) -> None:
        """Store the first pages of a node in the page cache. On the loop only while the node is not open."""
        header = LAYOUTS["store"].pack(nodeid, 0, len(data), 0)
        self._notify(Notify.STORE, header, data)

    def _notify(self, kind: Notify, *parts: bytes) -> None:
        length = OUT_HEADER.size + sum(map(len, parts))
        # ENOENT: the kernel has forgotten the node.
        with contextlib.suppress(FileNotFoundError):
            _write(self.fd, (OUT_HEADER.pack(length, kind, 0), *parts))


class BackingFiles:
    """Real files that the kernel reads and writes by itself (FUSE passthrough, since Linux 6.9)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._without_fsetid = sysio.WithoutCapability(sysio.CAP_FSETID)

    def open(self, fd: int) -> int:
        """Register an open file and return its backing id; OSError where the kernel refuses it.

        The kernel opens the file again with our credentials. Without CAP_FSETID among them its writes clear set-id
        bits, which is left to us by FUSE_HANDLE_KILLPRIV_V2 (docs/engine.md).
        """
        request = bytearray(LAYOUTS["backing_map"].pack(fd, 0, 0))  # mutable: else ioctl() hides the call's value
        with self._without_fsetid:
            number: int = fcntl.ioctl(self._fd, DEV_IOC_BACKING_OPEN, request)
        return number

    def close(self, number: int) -> None:
        """Release a backing id. Opens that were answered with it keep their backing file."""
        with contextlib.suppress(OSError):  # the connection is gone, and the id with it
            fcntl.ioctl(self._fd, DEV_IOC_BACKING_CLOSE, _ID.pack(number))


def _write(fd: int, parts: Sequence[bytes]) -> None:
    while True:
        try:
            os.writev(fd, parts)
            return
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
