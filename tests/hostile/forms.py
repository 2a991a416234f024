"""The forms of an entry of the hostile corpus: an archive, a directory to import, or layers made by hand."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.outcome import errno_of

REDIRECT, OPAQUE, METACOPY = "trusted.overlay.redirect", "trusted.overlay.opaque", "trusted.overlay.metacopy"


class Outside(NamedTuple):
    """What must not be reached: the path of the canary tree, its secret, and whether the run is a full one."""

    canary: bytes
    full: bool

    @property
    def climbing(self) -> bytes:
        """The same path as a relative one that works from any depth."""
        return b"../" * 40 + self.canary.lstrip(b"/")

    def size(self, quick: int, full: int) -> int:
        """Return the size for this run."""
        return full if self.full else quick


Pieces = Callable[[], Iterable[bytes]]
Build = Callable[[Path], None]
"""Fills an existing, empty directory."""


@dataclass(frozen=True)
class Archive:
    """An archive to import. refused: part of the message, None if it must be accepted. name: identifies the form.

    is_image: an image of several layers, not one layer.
    """

    name: str
    pieces: Pieces
    refused: str | None = None


@dataclass(frozen=True)
class Directory:
    """A directory to import."""

    name: str
    build: Build
    refused: str | None = None


@dataclass(frozen=True)
class Stack:
    """Layers made by hand, top first.

    shows: what must be seen through the mount: content of a file, None for what must be absent. reaches: a file of the
    canary is a member of the layer itself, by a hard link, so that its content may be seen; it must not be changed.
    hashed False: too large to be hashed. thin: a file of it has no data, so that a commit which needs that is refused.
    """

    layers: tuple[Build, ...]
    shows: Mapping[str, bytes | None] = field(default_factory=dict)
    reaches: bool = False
    hashed: bool = True
    thin: bool = False


Form = Archive | Directory | Stack


def archive(name: str, *parts: bytes, refused: str | None = None) -> Archive:
    """Return an archive of these entries, with its end mark."""
    return Archive(name, lambda: (*parts, bytes(1024)), refused)


def taken(name: str, *parts: bytes) -> Archive:
    """Return an archive that must be accepted."""
    return archive(name, *parts)


def each_refused(sentence: str, **archives: bytes) -> Iterator[Archive]:
    """Yield archives that must all be refused for the same reason."""
    for name, entries in archives.items():
        yield archive(name.replace("_", " "), entries, refused=sentence)


# --- making directories ------------------------------------------------------------------------------------


def put(root: Path, files: Mapping[str, bytes]) -> None:
    """Write files, with the directories they need."""
    for path, content in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def files(**contents: bytes) -> Build:
    """A layer of files; ``__`` in a name stands for a slash."""
    return lambda root: put(root, {name.replace("__", "/"): content for name, content in contents.items()})


def marked(name: str, attribute: str, value: bytes) -> Build:
    """A layer with a directory that has an attribute."""

    def build(root: Path) -> None:
        (root / name).mkdir()
        os.setxattr(root / name, attribute, value)

    return build


def redirected(value: bytes) -> Stack:
    """A directory `d` with a redirect, over a layer in which it might lead somewhere."""
    return Stack((marked("d", REDIRECT, value), files(t__f=b"below")))


def linked(name: str, target: bytes) -> Build:
    """A layer with one symbolic link."""
    return lambda root: os.symlink(target, os.fsencode(root / name))


def whiteout(path: Path) -> None:
    """Make a device 0:0."""
    os.mknod(path, stat.S_IFCHR, 0)


def deep(root: Path, depth: int, name: bytes) -> None:
    """Make nested directories, deeper than PATH_MAX, and a file in the last one."""
    at = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=at)
        inner = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    fd = os.open(b"f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=at)
    os.write(fd, b"deep")
    os.close(fd)
    os.close(at)


def widest(path: Path, value: bytes) -> None:
    """Give a file as many xattrs with this value as the file system allows."""
    number = 0
    while errno_of(os.setxattr, path, f"user.{number}", value) is None:
        number += 1


def largest(path: Path) -> None:
    """Make a sparse file as large as the file system allows, data at both ends."""
    with open(path, "wb", buffering=0) as stream:
        size = (1 << 63) - 1
        while errno_of(stream.truncate, size) == errno.EFBIG:
            size >>= 1
        os.pwrite(stream.fileno(), b"first", 0)
        os.pwrite(stream.fileno(), b"last", size - 4)
