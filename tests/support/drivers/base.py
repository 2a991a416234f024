"""The interface that tests use: operations by path, each with the errno that is expected."""

import os
import stat as modes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from tests.support.drivers.raw import Handle, Listed, Raw, Stat
from tests.support.drivers.stack import Stack
from tests.support.outcome import expect
from tests.support.users import User, run_as

Path = str | bytes
Options = Mapping[str, str | None]
T = TypeVar("T")

__all__ = ["Handle", "Listed", "Options", "Path", "Raw", "Stat", "Tree"]


def encoded(path: Path) -> bytes:
    """The bytes of a path, without a leading slash."""
    return os.fsencode(path).lstrip(b"/")


class Tree(ABC):
    """A union tree in use. Paths are relative to its root; `err` is the errno expected instead of a result."""

    name: ClassVar[str]
    can_rotate: ClassVar[bool] = False

    def __init__(self, stack: Stack, options: Options | None = None) -> None:
        self.stack = stack
        self.options = dict(options or {})
        self.raw = self._start()
        self.in_use = True

    @abstractmethod
    def _start(self) -> Raw:
        """Make the tree usable."""

    @abstractmethod
    def _stop(self) -> None:
        """Undo `_start`."""

    def close(self) -> None:
        """Unmount, if still in use, and wait until no process uses the layers."""
        if self.in_use:
            self.in_use = False
            self.raw.close()
            self._stop()

    def reopen(self) -> None:
        """Open again after `close`."""
        self.raw = self._start()
        self.in_use = True

    def remount(self) -> None:
        """Close and reopen over the same directories."""
        self.close()
        self.reopen()

    def rotate(self) -> None:
        """Commit the upper: it becomes the topmost lower layer, and the tree continues with a new upper."""
        layer = self.stack.next_layer()
        self.commit(layer)
        self.close()
        self.stack.adopt(layer)
        self.reopen()

    @abstractmethod
    def commit(self, layer: "os.PathLike[str]") -> None:
        """Make the upper a new layer directory."""

    def rotation(self) -> None:
        """Commit the upper while the tree is in use, open files included."""
        raise AssertionError(f"{self.name} cannot do that")

    def run_as(self, user: User, act: Callable[[], T]) -> T:
        """Call `act` as another user."""
        return run_as(user, act)

    # Looking

    def stat(self, path: Path, err: int | None = None) -> Stat:
        return expect(err, self.raw.stat, encoded(path))

    def exists(self, path: Path) -> bool:
        try:
            self.raw.stat(encoded(path))
        except FileNotFoundError:
            return False
        return True

    def mode(self, path: Path) -> int:
        """The permission bits, suid, sgid and sticky included."""
        return modes.S_IMODE(self.stat(path).mode)

    def scan(self, path: Path = "", err: int | None = None) -> list[Listed]:
        return expect(err, self.raw.scan, encoded(path))

    def names(self, path: Path = "", err: int | None = None) -> list[str]:
        """The sorted names."""
        listed = expect(err, self.raw.scan, encoded(path))
        return [] if err else sorted(os.fsdecode(item.name) for item in listed)

    def readlink(self, path: Path, err: int | None = None) -> str:
        target = expect(err, self.raw.readlink, encoded(path))
        return "" if err else os.fsdecode(target)

    def statvfs(self) -> os.statvfs_result:
        return self.raw.statvfs()

    # Names

    def mkdir(self, path: Path, mode: int = 0o755, err: int | None = None) -> None:
        expect(err, self.raw.mkdir, encoded(path), mode)

    def mknod(self, path: Path, mode: int, rdev: int = 0, err: int | None = None) -> None:
        expect(err, self.raw.mknod, encoded(path), mode, rdev)

    def mkfifo(self, path: Path, mode: int = 0o644, err: int | None = None) -> None:
        self.mknod(path, modes.S_IFIFO | mode, err=err)

    def symlink(self, target: Path, path: Path, err: int | None = None) -> None:
        expect(err, self.raw.symlink, os.fsencode(target), encoded(path))

    def link(self, old: Path, new: Path, err: int | None = None) -> None:
        expect(err, self.raw.link, encoded(old), encoded(new))

    def unlink(self, path: Path, err: int | None = None) -> None:
        expect(err, self.raw.unlink, encoded(path))

    def rmdir(self, path: Path, err: int | None = None) -> None:
        expect(err, self.raw.rmdir, encoded(path))

    def rename(self, old: Path, new: Path, flags: int = 0, err: int | None = None) -> None:
        expect(err, self.raw.rename, encoded(old), encoded(new), flags)

    def remove_tree(self, path: Path) -> None:
        """As `rm -r`."""
        if not modes.S_ISDIR(self.stat(path).mode):
            self.unlink(path)
            return
        for item in self.scan(path):
            self.remove_tree(encoded(path) + b"/" + item.name)
        self.rmdir(path)

    # Attributes

    def chmod(self, path: Path, mode: int, err: int | None = None) -> None:
        expect(err, self.raw.chmod, encoded(path), mode)

    def chown(self, path: Path, uid: int, gid: int, err: int | None = None) -> None:
        expect(err, self.raw.chown, encoded(path), uid, gid)

    def utime(self, path: Path, atime_ns: int, mtime_ns: int, err: int | None = None) -> None:
        expect(err, self.raw.utime, encoded(path), atime_ns, mtime_ns)

    def getxattr(self, path: Path, name: str, err: int | None = None) -> bytes:
        return expect(err, self.raw.getxattr, encoded(path), name)

    def setxattr(self, path: Path, name: str, value: bytes, flags: int = 0, err: int | None = None) -> None:
        expect(err, self.raw.setxattr, encoded(path), name, value, flags)

    def removexattr(self, path: Path, name: str, err: int | None = None) -> None:
        expect(err, self.raw.removexattr, encoded(path), name)

    def listxattr(self, path: Path, err: int | None = None) -> list[str]:
        """The sorted names, `security.selinux` left out."""
        names = expect(err, self.raw.listxattr, encoded(path))
        return [] if err else sorted(name for name in names if name != "security.selinux")

    # Data

    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o644, err: int | None = None) -> Handle:
        return expect(err, self.raw.open, encoded(path), flags, mode)

    def create(self, path: Path, data: bytes = b"", mode: int = 0o644, err: int | None = None) -> None:
        """Make a new file; EEXIST if the name is taken."""
        handle = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, err=err)
        if err is None:
            _put(handle, data, 0)

    def read(self, path: Path, err: int | None = None) -> bytes:
        handle = self.open(path, os.O_RDONLY, err=err)
        return b"" if err else _get(handle)

    def write(self, path: Path, data: bytes, offset: int = 0, err: int | None = None) -> None:
        """Write into an existing file without truncating it."""
        handle = self.open(path, os.O_WRONLY, err=err)
        if err is None:
            _put(handle, data, offset)

    def replace(self, path: Path, data: bytes, err: int | None = None) -> None:
        """Truncate an existing file on opening and write."""
        handle = self.open(path, os.O_WRONLY | os.O_TRUNC, err=err)
        if err is None:
            _put(handle, data, 0)

    def truncate(self, path: Path, size: int, err: int | None = None) -> None:
        expect(err, self.raw.truncate, encoded(path), size)


def _put(handle: Handle, data: bytes, offset: int) -> None:
    try:
        done = handle.write(data, offset) if data else 0
        assert done == len(data), "a short write"
    finally:
        handle.close()


def _get(handle: Handle) -> bytes:
    try:
        pieces: list[bytes] = []
        offset = 0
        while piece := handle.read(offset):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)
    finally:
        handle.close()
