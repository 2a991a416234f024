"""Operations through system calls, for plain directories and mounts."""

import os
from contextlib import suppress

from tests.support import syscalls
from tests.support.drivers.raw import Handle, Listed, Stat


def posix_stat(found: os.stat_result) -> Stat:
    """The attributes that drivers share."""
    return Stat(
        found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, found.st_size,
        found.st_blocks, found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns,
    )  # fmt: skip


class PosixHandle:
    """An open file, by its descriptor `fd`."""

    def __init__(self, fd: int, owner: "PosixRaw") -> None:
        self.fd = fd
        self.owner = owner
        owner.handles.add(self)

    def read(self, offset: int = 0, size: int = 1 << 20) -> bytes:
        return os.pread(self.fd, size, offset)

    def write(self, data: bytes, offset: int = 0) -> int:
        return os.pwrite(self.fd, data, offset)

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def stat(self) -> Stat:
        return posix_stat(os.fstat(self.fd))

    def chmod(self, mode: int) -> None:
        os.fchmod(self.fd, mode)

    def setxattr(self, name: str, value: bytes) -> None:
        os.setxattr(self.fd, name, value)

    def getxattr(self, name: str) -> bytes:
        return os.getxattr(self.fd, name)

    def fsync(self, datasync: bool = False) -> None:
        (os.fdatasync if datasync else os.fsync)(self.fd)

    def close(self) -> None:
        if self in self.owner.handles:
            self.owner.handles.remove(self)
            os.close(self.fd)


class PosixRaw:
    """Operations below `root`, relative to its descriptor, so that its path does not count for PATH_MAX."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self.handles: set[PosixHandle] = set()

    def close(self) -> None:
        """Close all files, so that a failed test does not keep the mount busy."""
        for handle in list(self.handles):
            handle.close()
        os.close(self.fd)

    def full(self, path: bytes) -> bytes:
        """The path from outside, for calls that take no descriptor."""
        return os.path.join(self.root, path) if path else self.root

    def stat(self, path: bytes) -> Stat:
        return posix_stat(os.stat(path or b".", dir_fd=self.fd, follow_symlinks=False))

    def scan(self, path: bytes) -> list[Listed]:
        fd = os.open(path or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            with os.scandir(fd) as entries:
                return [Listed(os.fsencode(item.name), _kind(item), item.inode()) for item in entries]
        finally:
            os.close(fd)

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(path, dir_fd=self.fd)

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(path, mode, dir_fd=self.fd)

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        os.mknod(path, mode, rdev, dir_fd=self.fd)

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, path, dir_fd=self.fd)

    def link(self, old: bytes, new: bytes) -> None:
        os.link(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(path, dir_fd=self.fd)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(path, dir_fd=self.fd)

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        syscalls.renameat2(self.fd, old, self.fd, new, flags)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(path or b".", mode, dir_fd=self.fd)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(path or b".", uid, gid, dir_fd=self.fd, follow_symlinks=False)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        os.utime(path or b".", ns=(atime_ns, mtime_ns), dir_fd=self.fd, follow_symlinks=False)

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(self.full(path), size)

    def getxattr(self, path: bytes, name: str) -> bytes:
        return os.getxattr(self.full(path), name, follow_symlinks=False)

    def setxattr(self, path: bytes, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.full(path), name, value, flags, follow_symlinks=False)

    def removexattr(self, path: bytes, name: str) -> None:
        os.removexattr(self.full(path), name, follow_symlinks=False)

    def listxattr(self, path: bytes) -> list[str]:
        return os.listxattr(self.full(path), follow_symlinks=False)

    def open(self, path: bytes, flags: int, mode: int) -> Handle:
        """Open without following a symlink and without blocking on a FIFO."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        return PosixHandle(os.open(path or b".", flags, mode, dir_fd=self.fd), self)

    def statvfs(self) -> os.statvfs_result:
        return os.statvfs(self.fd)


def _kind(item: "os.DirEntry[str]") -> int:
    with suppress(OSError):  # unknown type, and the stat fails
        if item.is_symlink():
            return 0o120000
        if item.is_dir(follow_symlinks=False):
            return 0o040000
        if item.is_file(follow_symlinks=False):
            return 0o100000
    return 0
