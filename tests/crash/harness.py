"""Stops or fails the n-th changing system call of an operation, and checks the resulting state."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from unittest import mock

from overlayfs import Overlay, StackConfig, sysio
from overlayfs.errors import oserror
from overlayfs.fs import Caller, Changes, Node
from tests.support.campaign import Campaign
from tests.support.points import chosen

ROOT = Caller(0, 0)
USER = Caller(1000, 1000)
Operation = Callable[[Overlay], object]
View = dict[bytes, tuple[object, ...]]


class Stopped(BaseException):
    """The process is dead: nothing catches this, and nothing changes any more."""


TEARABLE = ("write_at", "copy_data", "copy_range")
"""The changing calls that write data and may have written a part of it when the process ends."""


LOOKING = (
    *("open_beneath", "open_child", "stat_at", "exists_at", "list_dir"),
    *("readlink_at", "getxattr_at", "find_xattr", "listxattr_at"),
    *("file_handle", "open_by_handle", "statvfs_fd"),
)
"""Calls of `sysio` that look, or open what is to be looked at."""


@dataclass
class Fuse:
    """Counts changing calls and fails or stops at number `at`.

    That call fails with `errno`, as does every later one if `lasting`, until the fuse is removed. Without `errno` the
    process is dead from there on (Stopped); `torn`: after half of the data of that call.
    """

    at: int = -1
    errno: int = 0
    lasting: bool = False
    torn: bool = False
    calls: list[str] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack)

    def __call__(self, call: str) -> None:
        self.calls.append(call)
        number = len(self.calls)
        if not 0 < self.at <= number:
            return
        if self.torn and number == self.at:
            self._tear(call)
        elif not self.errno:
            raise Stopped(call)
        elif self.lasting or number == self.at:
            raise oserror(self.errno)

    def _tear(self, call: str) -> None:
        """Let the next call that writes data write half of it; it is the last call."""
        pwrite, copy_file_range = os.pwrite, os.copy_file_range

        def write_half(fd: int, data: bytes | memoryview, offset: int) -> int:
            pwrite(fd, memoryview(data)[: len(memoryview(data)) // 2], offset)
            raise Stopped(call)

        def copy_half(source: int, target: int, size: int, *offsets: int) -> int:
            copy_file_range(source, target, size // 2, *offsets)
            raise Stopped(call)

        self._undo.enter_context(mock.patch.object(os, "pwrite", write_half))
        self._undo.enter_context(mock.patch.object(os, "copy_file_range", copy_half))

    def __enter__(self) -> Self:
        sysio.fault_hook = self
        return self

    def __exit__(self, *_: object) -> None:
        sysio.fault_hook = None
        self._undo.close()

    @property
    def where(self) -> str:
        """The name of the call, for a message."""
        return f"at {self.calls[self.at - 1]}, call {self.at}" if self.at <= len(self.calls) else f"before {self.at}"


class Blindness(Fuse):
    """Fails number `at` of the calls that only look, with `errno`."""

    def __enter__(self) -> Self:
        for name in LOOKING:
            self._undo.enter_context(mock.patch.object(sysio, name, self._guarded(name, getattr(sysio, name))))
        return self

    def _guarded(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def guarded(*words: object, **more: object) -> object:
            self(name)
            return call(*words, **more)

        return guarded


@contextmanager
def closed_again() -> Iterator[None]:
    """Descriptors opened within the context are closed at its end."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = set(os.listdir("/proc/self/fd")) - before
    assert not left, f"{len(left)} descriptors are left open"


class Site:
    """A fresh stack: two layers under an upper that has changed something of each kind already."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("top", "base", "up", "work"):
            (place / name).mkdir(parents=True)
        build_layers(place / "base", place / "top")
        overlay = self.open()
        change_upper(overlay)
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
        """Return the names in the work directory's staging directory."""
        return os.listdir(self.place / "work" / "work")


def build_layers(base: Path, top: Path) -> None:
    """Fill two layers with something of each kind."""
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


def change_upper(overlay: Overlay) -> None:
    """Change something of each kind."""
    root = overlay.root
    overlay.names.unlink(root, b"hidden")
    overlay.names.rmdir(root, b"gone")
    overlay.names.mkdir(root, b"made", 0o755, ROOT)
    write(overlay, b"fresh", b"fresh", create=True)
    overlay.set_attributes(overlay.lookup(root, b"link"), Changes(uid=7))


def write(overlay: Overlay, name: bytes, data: bytes, create: bool = False, flags: int = os.O_WRONLY) -> None:
    """Write at the start of a file in the root."""
    if create:
        _, fh = overlay.create(overlay.root, name, 0o640, os.O_CREAT | os.O_EXCL | os.O_RDWR, USER)
    else:
        fh = overlay.files.open(overlay.lookup(overlay.root, name), flags)
    try:
        if data:
            overlay.files.write(fh, 0, data)
    finally:
        overlay.files.release(fh)


def view(overlay: Overlay, top: Node | None = None) -> View:
    """Return everything visible of a tree, or of a part, except times of directories and access times."""
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
    attributes = {name: overlay.metadata.getxattr(node, name) for name in overlay.metadata.listxattr(node)}
    common = (at.mode, at.uid, at.gid, at.rdev, tuple(sorted(attributes.items())))
    if stat.S_ISREG(at.mode):
        fh = overlay.files.open(node, os.O_RDONLY)
        try:
            return *common, at.nlink, at.size, overlay.files.read(fh, 0, at.size + 1)
        finally:
            overlay.files.release(fh)
    return (*common, overlay.metadata.readlink(node)) if stat.S_ISLNK(at.mode) else common


def abandon(overlay: Overlay) -> None:
    """Close all descriptors, as the kernel does for a killed process, and do nothing else."""
    overlay.nodes.close()
    overlay._stack.close(clean=False)


def torn(campaign: Campaign, calls: list[str], quick: int) -> Iterator[Fuse]:
    """Yield fuses that stop in the middle of a write, for each of `calls` that writes: `quick` of them, or all."""
    writes = [at for at, call in enumerate(calls, 1) if call in TEARABLE]
    return (Fuse(writes[number - 1], torn=True) for number in chosen(campaign, len(writes), quick))
