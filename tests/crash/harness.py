"""Stops or fails the n-th changing system call of an operation, and looks at what is left."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from overlayfs import Overlay, StackConfig, sysio
from overlayfs.errors import oserror
from overlayfs.fs import Caller, Changes, Node

ROOT = Caller(0, 0)
SOMEBODY = Caller(1000, 1000)
Operation = Callable[[Overlay], object]
View = dict[bytes, tuple[object, ...]]


class Stopped(BaseException):
    """The process is dead: nothing catches this, and nothing changes any more."""


@dataclass
class Fuse:
    """Counts changing calls; at number `at` it raises: `errno` once, or Stopped for ever."""

    at: int = -1
    errno: int = 0
    calls: list[str] = field(default_factory=list)

    def __call__(self, call: str) -> None:
        self.calls.append(call)
        if self.errno and len(self.calls) == self.at:
            raise oserror(self.errno)
        if not self.errno and 0 < self.at <= len(self.calls):
            raise Stopped(call)

    def __enter__(self) -> Self:
        sysio.fuse = self
        return self

    def __exit__(self, *_: object) -> None:
        sysio.fuse = None


class Site:
    """A fresh stack: two layers under an upper that has changed something of each kind already."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("top", "base", "up", "work"):
            (place / name).mkdir(parents=True)
        _build_layers(place)
        overlay = self.open()
        _change_upper(overlay)
        overlay.close()

    def open(self, lock_wait: float = 0.0) -> Overlay:
        """Open the stack."""
        top, base, up, work = (os.fsencode(self.place / name) for name in ("top", "base", "up", "work"))
        return Overlay(StackConfig(lower=(top, base), upper=up, work=work, lock_wait=lock_wait))

    def view(self) -> View:
        """Return what a mount of the stack shows now."""
        overlay = self.open()
        try:
            return view(overlay)
        finally:
            overlay.close()

    def staged(self) -> list[str]:
        """Return what lies in the work directory's staging place."""
        return os.listdir(self.place / "work" / "work")


def _build_layers(place: Path) -> None:
    base, top = place / "base", place / "top"
    for directory in (base / "merged", base / "lower" / "inner", top / "merged", base / "gone", base / "empty"):
        directory.mkdir(parents=True)
    (base / "file").write_bytes(b"content of a lower file" * 300)
    (base / "merged" / "deep").write_bytes(b"deep")
    (top / "merged" / "shallow").write_bytes(b"shallow")
    (base / "lower" / "inner" / "leaf").write_bytes(b"leaf")
    (base / "hidden").write_bytes(b"to be deleted")
    (base / "one").write_bytes(b"two names")
    os.link(base / "one", base / "two")
    os.symlink("file", base / "link")
    os.setxattr(base / "file", "user.kept", b"value")


def _change_upper(overlay: Overlay) -> None:
    root = overlay.root
    overlay.unlink(root, b"hidden")
    overlay.rmdir(root, b"gone")
    overlay.mkdir(root, b"made", 0o755, ROOT)
    write(overlay, b"fresh", b"fresh", create=True)
    overlay.set_attributes(overlay.lookup(root, b"link"), Changes(uid=7), ROOT)


def write(overlay: Overlay, name: bytes, data: bytes, create: bool = False, flags: int = os.O_WRONLY) -> None:
    """Write at the start of a file in the root."""
    if create:
        _, fh = overlay.create(overlay.root, name, 0o640, os.O_CREAT | os.O_EXCL | os.O_RDWR, SOMEBODY)
    else:
        fh = overlay.open(overlay.lookup(overlay.root, name), flags, ROOT)
    try:
        if data:
            overlay.write(fh, 0, data)
    finally:
        overlay.release(fh)


def view(overlay: Overlay, top: Node | None = None) -> View:
    """Return all that a user can tell of a tree, or of a part, apart from times of directories and access times."""
    found: View = {}
    pending: list[tuple[Node, bytes]] = [(top or overlay.root, b"")]
    while pending:
        node, path = pending.pop()
        found[path] = _facts(overlay, node)
        if stat.S_ISDIR(overlay.attributes(node).mode):
            pending += [(overlay.lookup(node, name), path + b"/" + name) for name in overlay.list_names(node)]
    return found


def _facts(overlay: Overlay, node: Node) -> tuple[object, ...]:
    at = overlay.attributes(node)
    attributes = {name: overlay.getxattr(node, name) for name in overlay.listxattr(node)}
    common = (at.mode, at.uid, at.gid, at.rdev, tuple(sorted(attributes.items())))
    if stat.S_ISREG(at.mode):
        fh = overlay.open(node, os.O_RDONLY, ROOT)
        try:
            return *common, at.nlink, at.size, overlay.read(fh, 0, at.size + 1)
        finally:
            overlay.release(fh)
    return (*common, overlay.readlink(node)) if stat.S_ISLNK(at.mode) else common


def abandon(overlay: Overlay) -> None:
    """Let go of everything as the kernel does for a process that was killed: descriptors close, nothing else."""
    overlay.nodes.close()
    overlay._stack.close(clean=False)
