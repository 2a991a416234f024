"""What can be done with the space of a file and with the file as such: holes, ranges, flags, birth.

All of it goes to the real file, so it is as good as its file system. A file that is changed must be in the upper
already, with its data.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.files import FileHandle, Files
from overlayfs.fs.nodes import Node

R = TypeVar("R")

FS_IOC_GETFLAGS = 0x8008_6601
FS_IOC_SETFLAGS = 0x4008_6602
FS_IOC_GETVERSION = 0x8008_7601
FS_IOC_FSGETXATTR = 0x801C_581F
FS_IOC_FSSETXATTR = 0x401C_5820

# ioctl(2) requests about a file's flags, with the size of what they read or take (linux/fs.h). The kernel's headers
# say "long" for the first two, and every file system reads and writes an int.
READING_REQUESTS = {FS_IOC_GETFLAGS: 4, FS_IOC_GETVERSION: 4, FS_IOC_FSGETXATTR: 28}
CHANGING_REQUESTS = {FS_IOC_SETFLAGS: 4, FS_IOC_FSSETXATTR: 28}


class Space(Verbs):
    """These verbs, on nodes and on the handles of `Files`."""

    def __init__(self, core: Core, files: Files) -> None:
        super().__init__(core)
        self._files = files

    def seek(self, handle: FileHandle, offset: int, whence: int) -> int:
        """Return where data or a hole begins at or after `offset` (SEEK_DATA, SEEK_HOLE); ENXIO beyond the end."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise oserror(errno.EINVAL)
        return sysio.seek_data(self._files.readable(handle), offset, whence)

    def allocate(self, handle: FileHandle, mode: int, offset: int, length: int) -> None:
        """Do fallocate(2) on a file open for writing: all modes that the upper's file system has."""
        sysio.fallocate(self._files.writable(handle), mode, offset, length)

    def prepare_copy(
        self, source: FileHandle, offset: int, target: FileHandle, target_offset: int, length: int
    ) -> Callable[[], int]:
        """Return the call that copies a range between two open files and returns its length; any thread may make it."""
        write_to = os.dup(self._files.writable(target))
        try:
            read_from = os.dup(self._files.readable(source))
        except BaseException:
            sysio.close(write_to)
            raise

        def copy() -> int:
            try:
                return sysio.copy_range(read_from, offset, write_to, target_offset, length)
            finally:
                sysio.close(read_from)
                sysio.close(write_to)

        return copy

    def birth(self, node: Node) -> int | None:
        """Return when the real object was made, in nanoseconds since 1970, None where that is not recorded."""
        _, dirfd, name = self._objects.locate(node)
        return sysio.birth_time(dirfd, name)

    def read_flags(self, node: Node, request: int) -> bytes:
        """Return the answer to one of READING_REQUESTS; ENOTTY for any other."""
        size = READING_REQUESTS.get(request)
        if size is None:
            raise oserror(errno.ENOTTY)
        return self._with_object(node, lambda fd: sysio.get_file_attributes(fd, request, size))

    def change_flags(self, node: Node, request: int, value: bytes) -> None:
        """Carry out one of CHANGING_REQUESTS on a node in the upper; EINVAL for a value that is too short."""
        size = CHANGING_REQUESTS[request]
        if len(value) < size:
            raise oserror(errno.EINVAL)
        self._with_object(node, lambda fd: sysio.set_file_attributes(fd, request, value[:size]))

    def _with_object(self, node: Node, act: Callable[[int], R]) -> R:
        if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise oserror(errno.ENOTTY)  # the others have no flags of their own, and opening some of them acts
        _, dirfd, name = self._objects.locate(node)
        fd = sysio.open_child(dirfd, name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return act(fd)
        finally:
            sysio.close(fd)
