"""The connection to the kernel: the descriptor of /dev/fuse, and what is said on it besides replies."""

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
    """A mount that somebody has made: its descriptor of /dev/fuse, non-blocking."""

    fd: int

    def read_ahead(self, size: int) -> None:
        """Let the kernel read up to `size` bytes ahead, if it may be told; after the handshake."""

    def detach(self) -> None:
        """Unmount if it is still there, and close the descriptor."""

    def close(self) -> None:
        """Only close the descriptor."""


class Attacher(Protocol):
    """Makes a mount; MountError with the reason."""

    def __call__(self, mountpoint: bytes, settings: MountSettings) -> Attachment: ...


class Connection:
    """What an engine says to the kernel unasked. Any thread may, but see each method."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def forget_attributes(self, nodeid: int) -> None:
        """Make the kernel ask for the attributes of a node again. From the loop too: no lock is waited for."""
        self._notify(Notify.INVAL_INODE, LAYOUTS["inval_inode"].pack(nodeid, _ATTRIBUTES_ONLY, 0))

    def drop_pages(self, nodeid: int) -> None:
        """Make the kernel write out and drop the pages of a node, and return when it has.

        Never from the loop: it waits for pages that the loop is to fill or to take.
        """
        self._notify(Notify.INVAL_INODE, LAYOUTS["inval_inode"].pack(nodeid, 0, 0))

    def store(self, nodeid: int, data: bytes) -> None:
        """Give the kernel the first pages of a node. From the loop only while nobody has the node open."""
        header = LAYOUTS["store"].pack(nodeid, 0, len(data), 0)
        self._notify(Notify.STORE, header, data)

    def _notify(self, kind: Notify, *parts: bytes) -> None:
        length = OUT_HEADER.size + sum(map(len, parts))
        # ENOENT: the kernel has forgotten the node, so there is nothing to tell.
        with contextlib.suppress(FileNotFoundError):
            _write(self.fd, (OUT_HEADER.pack(length, kind, 0), *parts))


class BackingFiles:
    """Files of layers that the kernel reads and writes by itself (FUSE passthrough, since Linux 6.9)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._without_fsetid = sysio.WithoutCapability(sysio.CAP_FSETID)

    def open(self, fd: int) -> int:
        """Return the id under which the kernel knows an open file; OSError where it will not have it.

        The kernel opens the file anew with our credentials. Without CAP_FSETID among them it drops set-id bits at
        writes, which with FUSE_HANDLE_KILLPRIV_V2 nobody else would (docs/engine.md).
        """
        request = bytearray(LAYOUTS["backing_map"].pack(fd, 0, 0))  # changeable: only then the call's value is returned
        with self._without_fsetid:
            number: int = fcntl.ioctl(self._fd, DEV_IOC_BACKING_OPEN, request)
        return number

    def close(self, number: int) -> None:
        """Take an id back. Opens that were answered with it stay as they are."""
        with contextlib.suppress(OSError):  # the connection has gone, and the id with it
            fcntl.ioctl(self._fd, DEV_IOC_BACKING_CLOSE, _ID.pack(number))


def _write(fd: int, parts: Sequence[bytes]) -> None:
    while True:
        try:
            os.writev(fd, parts)
            return
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
