"""A disk that remembers and misbehaves: `python -m tests.support.diskserver IMAGE LOG CONTROL POINT`.

A FUSE file system of one file, `disk`, which shows IMAGE and belongs under a loop device with direct I/O. All writes
and flushes of the kernel are appended to LOG (tests/support/writelog.py) in the order in which they become part of the
image, so that the state after a power cut at any moment can be rebuilt. The file CONTROL sets the behaviour from the
next request on: empty (normal), `error` (writes and flushes fail), `drop` (writes succeed and are lost), `slow SECONDS`
(flushes take that long), `stuck` (writes and flushes block until the file has other content).
"""

import errno
import os
import stat
import sys
import time
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, InodeT, RequestContext, SetattrFields

from tests.support import writelog

NAME = b"disk"
_FILE = InodeT(2)
_POLL = 0.01  # seconds between two looks at the control file while requests are held


class Disk(pyfuse3.Operations):
    """The file system. `image` is open for reading and writing, `log` for appending."""

    def __init__(self, image: int, log: int, control: Path) -> None:
        super().__init__()
        self._image = image
        self._log = log
        self._control = control

    async def getattr(self, inode: InodeT, ctx: RequestContext | None = None) -> EntryAttributes:
        """Return the attributes of the directory, or of the file with the size of the image."""
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o600 if inode == _FILE else stat.S_IFDIR | 0o700
        entry.st_size = os.fstat(self._image).st_size if inode == _FILE else 0
        return entry

    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Return unchanged attributes: times are not kept."""
        return await self.getattr(inode, ctx)

    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Look up the only name."""
        if name != NAME:
            raise FUSEError(errno.ENOENT)
        return await self.getattr(_FILE, ctx)

    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        """Open with direct I/O: a write that has returned is in the log."""
        return FileInfo(fh=1, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read from the image; reads never fail."""
        return os.pread(self._image, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to the image and the log."""
        mode = await self._behaviour()
        if mode == "error":
            raise FUSEError(errno.EIO)
        if mode != "drop":
            writelog.append(self._log, writelog.WRITE, off, bytes(buf))
            os.pwrite(self._image, buf, off)
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Log a flush."""
        mode = await self._behaviour()
        if mode == "error":
            raise FUSEError(errno.EIO)
        if mode.startswith("slow "):
            await trio.sleep(float(mode.split()[1]))
        writelog.append(self._log, writelog.FLUSH, 0, b"")

    async def _behaviour(self) -> str:
        mode = self._control.read_text()
        if mode == "stuck":
            mode = await trio.to_thread.run_sync(self._wait_while_stuck)
        return mode

    def _wait_while_stuck(self) -> str:
        while (mode := self._control.read_text()) == "stuck":
            time.sleep(_POLL)
        return mode


def main(image: str, log: str, control: str, point: str) -> None:
    """Serve until unmounted."""
    image_fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    pyfuse3.init(Disk(image_fd, log_fd, Path(control)), point, {"fsname=watched", "default_permissions"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
