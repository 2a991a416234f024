"""The operations of `overlayfs.Overlay` by path, with the path walk that the kernel does for a mount."""

import os
import stat as modes
from collections.abc import Callable
from contextlib import suppress
from errno import EEXIST, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOTDIR, ENOTEMPTY, ENXIO, ESPIPE
from typing import Any, TypeVar

from overlayfs.errors import oserror
from overlayfs.fs import Caller, Changes, Overlay, StackConfig
from overlayfs.fs.files import FileHandle
from overlayfs.store.copy_upper import commit_mounted
from tests.support.drivers.base import Tree
from tests.support.drivers.raw import Handle, Listed, Raw, Stat
from tests.support.syscalls import EXCHANGE, NOREPLACE
from tests.support.users import User

T = TypeVar("T")
Node = Any


class FsHandle:
    """An open file of the overlay."""

    def __init__(self, raw: "FsRaw", node: Node, fh: FileHandle) -> None:
        self.raw, self.node, self.fh = raw, node, fh
        raw.open_handles.add(self)

    def read(self, offset: int = 0, size: int = 1 << 20) -> bytes:
        return self.raw.overlay.files.read(self.fh, offset, size)

    def write(self, data: bytes, offset: int = 0) -> int:
        return self.raw.overlay.files.write(self.fh, offset, data)

    def truncate(self, size: int) -> None:
        self.raw.overlay.set_attributes(self.node, Changes(size=size))

    def stat(self) -> Stat:
        return _stat(self.raw.overlay.attributes(self.node))

    def chmod(self, mode: int) -> None:
        self.raw.overlay.set_attributes(self.node, Changes(mode=mode))

    def setxattr(self, name: str, value: bytes) -> None:
        self.raw.overlay.setxattr(self.node, os.fsencode(name), value)

    def getxattr(self, name: str) -> bytes:
        return self.raw.overlay.metadata.getxattr(self.node, os.fsencode(name))

    def fsync(self, datasync: bool = False) -> None:
        self.raw.overlay.fsync(self.fh, datasync)

    def close(self) -> None:
        if self in self.raw.open_handles:
            self.raw.open_handles.remove(self)
            self.raw.overlay.files.release(self.fh)
            self.raw.overlay.nodes.forget(self.node.number, 1)


def _stat(found: Any) -> Stat:
    return Stat(
        found.ino, found.mode, found.nlink, found.uid, found.gid, found.rdev, found.size, found.blocks,
        found.atime_ns, found.mtime_ns, found.ctime_ns,
    )  # fmt: skip


class FsRaw:
    """Paths over nodes: a node is remembered while an operation or handle uses it, then forgotten, as by the kernel."""

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self.caller = Caller(0, 0)
        self.open_handles: set[FsHandle] = set()

    def close(self) -> None:
        for handle in list(self.open_handles):
            handle.close()

    # Walking

    def _with(self, path: bytes, act: Callable[[Node], T]) -> T:
        node = self._walk(path)
        try:
            return act(node)
        finally:
            self._forget(node)

    def _walk(self, path: bytes) -> Node:
        node = self.overlay.root
        for name in path.split(b"/"):
            if name:
                node = self._step(node, name)
        return node

    def _step(self, parent: Node, name: bytes) -> Node:
        try:
            self._check_directory(parent, name)
            child = self.overlay.lookup(parent, name)
            self.overlay.nodes.remember(child)
            return child
        finally:
            self._forget(parent)

    def _check_directory(self, parent: Node, name: bytes) -> None:
        mode = self.overlay.attributes(parent).mode
        if not modes.S_ISDIR(mode):
            raise oserror(ELOOP if modes.S_ISLNK(mode) else ENOTDIR)
        if len(name) > 255:
            raise oserror(ENAMETOOLONG)

    def _forget(self, node: Node) -> None:
        if node is not self.overlay.root:
            self.overlay.nodes.forget(node.number, 1)

    def _below(self, path: bytes, act: Callable[[Node, bytes], T]) -> T:
        """Call with the parent's node and the last name."""
        parent, _, name = path.rpartition(b"/")

        def checked(node: Node) -> T:
            self._check_directory(node, name)
            return act(node, name)

        return self._with(parent, checked)

    def _absent(self, parent: Node, name: bytes) -> None:
        """Raise EEXIST if the name exists: the kernel looks a name up before it sends a request to create it."""
        with suppress(FileNotFoundError):
            self.overlay.lookup(parent, name)
            raise oserror(EEXIST)

    # Looking

    def stat(self, path: bytes) -> Stat:
        return self._with(path, lambda node: _stat(self.overlay.attributes(node)))

    def scan(self, path: bytes) -> list[Listed]:
        return self._with(path, self._scan)

    def _scan(self, node: Node) -> list[Listed]:
        if not modes.S_ISDIR(self.overlay.attributes(node).mode):
            raise oserror(ENOTDIR)
        fh = self.overlay.files.open_dir(node)
        try:
            return [self._listed(name, child) for name, child, *_ in self.overlay.files.read_dir(fh, 0)]
        finally:
            self.overlay.files.release(fh)

    def _listed(self, name: bytes, child: Node | None) -> Listed:
        if child is None:
            return Listed(name, 0, 0)
        found = self.overlay.attributes(child)
        return Listed(name, modes.S_IFMT(found.mode), found.ino)

    def readlink(self, path: bytes) -> bytes:
        return self._with(path, self._readlink)

    def _readlink(self, node: Node) -> bytes:
        if not modes.S_ISLNK(self.overlay.attributes(node).mode):
            raise oserror(EINVAL)
        return self.overlay.metadata.readlink(node)

    def statvfs(self) -> os.statvfs_result:
        return self.overlay.metadata.statfs()

    # Names

    def mkdir(self, path: bytes, mode: int) -> None:
        def make(parent: Node, name: bytes) -> None:
            self._absent(parent, name)
            self.overlay.names.mkdir(parent, name, mode & ~self.caller.umask, self.caller)

        self._below(path, make)

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        def make(parent: Node, name: bytes) -> None:
            self._absent(parent, name)
            self.overlay.names.mknod(parent, name, mode & ~self.caller.umask, rdev, self.caller)

        self._below(path, make)

    def symlink(self, target: bytes, path: bytes) -> None:
        def make(parent: Node, name: bytes) -> None:
            self._absent(parent, name)
            self.overlay.names.symlink(parent, name, target, self.caller)

        self._below(path, make)

    def link(self, old: bytes, new: bytes) -> None:
        def make(node: Node, parent: Node, name: bytes) -> None:
            self._absent(parent, name)
            self.overlay.names.link(node, parent, name)

        self._with(old, lambda node: self._below(new, lambda parent, name: make(node, parent, name)))

    def unlink(self, path: bytes) -> None:
        self._below(path, self.overlay.names.unlink)

    def rmdir(self, path: bytes) -> None:
        self._below(path, self.overlay.names.rmdir)

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        """Rename, after the checks that do_renameat2() of the kernel makes before it calls the file system."""

        def move(parent: Node, name: bytes, target: Node, last: bytes) -> None:
            self.overlay.lookup(parent, name)
            if flags == NOREPLACE:
                self._absent(target, last)
            if flags == EXCHANGE:
                self.overlay.lookup(target, last)
            if new.startswith(old + b"/") or (flags == EXCHANGE and old.startswith(new + b"/")):
                raise oserror(EINVAL)
            if old.startswith(new + b"/"):
                raise oserror(ENOTEMPTY)
            self.overlay.names.rename(parent, name, target, last, flags)

        self._below(old, lambda parent, name: self._below(new, lambda target, last: move(parent, name, target, last)))

    # Attributes

    def _change(self, path: bytes, changes: Changes) -> None:
        self._with(path, lambda node: self.overlay.set_attributes(node, changes))

    def chmod(self, path: bytes, mode: int) -> None:
        self._change(path, Changes(mode=mode))

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        """Change the owner and, as the kernel does in the same request, drop set-id bits of a file."""
        mode = self.stat(path).mode
        kept = mode & (~0o6000 if mode & 0o010 else ~0o4000)
        stripped = None if modes.S_ISDIR(mode) or kept == mode else modes.S_IMODE(kept)
        self._change(path, Changes(stripped, None if uid < 0 else uid, None if gid < 0 else gid))

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        self._change(path, Changes(atime_ns=atime_ns, mtime_ns=mtime_ns))

    def truncate(self, path: bytes, size: int) -> None:
        def cut(node: Node) -> None:
            kind = modes.S_IFMT(self.overlay.attributes(node).mode)
            if kind != modes.S_IFREG:
                raise oserror(EISDIR if kind == modes.S_IFDIR else EINVAL)
            self.overlay.set_attributes(node, Changes(size=size))

        self._with(path, cut)

    def getxattr(self, path: bytes, name: str) -> bytes:
        return self._with(path, lambda node: self.overlay.metadata.getxattr(node, os.fsencode(name)))

    def setxattr(self, path: bytes, name: str, value: bytes, flags: int) -> None:
        self._with(path, lambda node: self.overlay.setxattr(node, os.fsencode(name), value, flags))

    def removexattr(self, path: bytes, name: str) -> None:
        self._with(path, lambda node: self.overlay.removexattr(node, os.fsencode(name)))

    def listxattr(self, path: bytes) -> list[str]:
        names = self._with(path, self.overlay.metadata.listxattr)
        return [os.fsdecode(name) for name in names]

    # Data

    def open(self, path: bytes, flags: int, mode: int) -> Handle:
        if flags & os.O_CREAT:
            made = self._below(path, lambda parent, name: self._create(parent, name, flags, mode))
            if made is not None:
                return made
        node = self._walk(path)
        try:
            self._check_openable(node, flags)
            return FsHandle(self, node, self.overlay.files.open(node, flags & ~os.O_CREAT, strip=self.caller.uid != 0))
        except BaseException:
            self._forget(node)
            raise

    def _create(self, parent: Node, name: bytes, flags: int, mode: int) -> Handle | None:
        try:
            self.overlay.lookup(parent, name)
        except FileNotFoundError:
            (node, _), fh = self.overlay.create(parent, name, mode & ~self.caller.umask, flags, self.caller)
            self.overlay.nodes.remember(node)
            return FsHandle(self, node, fh)
        if flags & os.O_EXCL:
            raise oserror(EEXIST)
        return None

    def _check_openable(self, node: Node, flags: int) -> None:
        mode = self.overlay.attributes(node).mode
        if modes.S_ISLNK(mode):
            raise oserror(ELOOP)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if modes.S_ISDIR(mode) and writing:
            raise oserror(EISDIR)
        if modes.S_ISFIFO(mode):
            raise oserror(ENXIO if writing else ESPIPE)  # as the kernel does if only one end is open


class FsDriver(Tree):
    """`overlayfs.Overlay` used directly; options are fields of its configuration."""

    name = "fs"
    can_rotate = True

    def _start(self) -> Raw:
        stack = self.stack
        config = StackConfig(
            lower=tuple(os.fsencode(layer) for layer in stack.lower),
            upper=None if stack.upper is None else os.fsencode(stack.upper),
            work=None if stack.work is None else os.fsencode(stack.work),
            **self._choices(),
        )
        self.overlay = Overlay(config)
        return FsRaw(self.overlay)

    def _choices(self) -> dict[str, Any]:
        return {name: {None: True, "on": True, "off": False}.get(value, value) for name, value in self.options.items()}

    def _stop(self) -> None:
        self.overlay.close()

    def commit(self, layer: os.PathLike[str]) -> None:
        commit_mounted(self.overlay, os.fsencode(layer))

    def rotation(self) -> None:
        """Make the upper a layer and continue with a new one, as a live commit does; handles and numbers are kept."""
        stack = self.stack
        assert stack.upper is not None
        layer, upcoming = stack.next_layer(), stack.base / "u.next"
        upcoming.mkdir()
        upper = os.fsencode(stack.upper)

        def move() -> None:
            os.rename(upper, layer)
            os.rename(upcoming, upper)

        self.overlay.rotation().rotate(os.fsencode(upcoming), os.fsencode(layer), move)
        stack.add_layer(layer)

    def run_as(self, user: User, act: Callable[[], T]) -> T:
        raw = self.raw
        assert isinstance(raw, FsRaw)
        before, raw.caller = raw.caller, Caller(user.uid, user.gid, user.umask, tuple(user.groups))
        try:
            return act()
        finally:
            raw.caller = before
