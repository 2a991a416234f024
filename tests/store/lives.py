"""Random stacks with a history: layers with every kind of change, the last one still an upper."""

import os
import stat as modes
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from overlayfs.store.compare import Change, Tree
from tests.differential.operations import Generator
from tests.support.drivers.base import Tree as Driven
from tests.support.drivers.overlay import FsDriver
from tests.support.drivers.stack import Stack

STEPS = 25


def live(place: Path, seed: int, generations: int) -> FsDriver:
    """A tree after random changes; each generation but the last becomes a layer, as after a live commit.

    Even generations are taken as they are, with redirects and metadata-only copies; odd ones are copied.
    """
    generator = Generator(seed)
    tree = FsDriver(Stack(place, list(generator.layers()), {}))
    for generation in range(generations):
        if generation % 2:
            tree.rotate()
        elif generation:
            tree.rotation()
        for _ in range(STEPS):
            generator.operation().run(tree)
    return tree


def tree_of(layers: Iterable[Path]) -> Tree:
    """Layers, top first, as a value to compare."""
    return Tree(tuple(map(os.fsencode, layers)))


def tree_with_upper(stack: Stack) -> Tree:
    """The same with the upper on top."""
    assert stack.upper is not None and stack.work is not None
    return Tree(tuple(map(os.fsencode, (stack.upper, *stack.lower))), link_index=os.fsencode(stack.work / "index"))


# --- applying


def apply(changes: list[Change], target: Driven, source: Driven) -> None:
    """Make `target` equal to `source`, touching only the paths of the changes."""
    touched = {change.path for change in changes if change.kind != "D"}
    others = _links(source)
    for change in changes:
        _remove(target, change.path, source, keep=change.kind != "D")
    done: set[bytes] = set()
    for path in sorted(touched, key=lambda each: each.split(b"/")):
        siblings = [name for name in others.get(source.raw.stat(path).ino, ()) if name not in touched or name in done]
        _make(target, path, source, siblings)
        done.add(path)
    # The root too: it is listed only if it differs, and its time has changed by now.
    for path in sorted(touched | {b""}, key=lambda each: (each != b"", each.count(b"/")), reverse=True):
        _apply_attributes(target, path, source)


def _links(source: Driven) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        for item in source.raw.scan(path):
            child = path + b"/" + item.name if path else item.name
            if item.kind == modes.S_IFDIR:
                pending.append(child)
            else:
                found.setdefault(item.ino, []).append(child)
    return found


def _remove(target: Driven, path: bytes, source: Driven, keep: bool) -> None:
    """Remove what is in the way: everything except a directory that remains a directory."""
    try:
        found = target.raw.stat(path)
    except FileNotFoundError:
        return
    if modes.S_ISDIR(found.mode):
        if keep and modes.S_ISDIR(source.raw.stat(path).mode):
            return
        target.remove_tree(path)
    else:
        target.raw.unlink(path)


def _make(target: Driven, path: bytes, source: Driven, siblings: list[bytes]) -> None:
    found = source.raw.stat(path)
    if modes.S_ISDIR(found.mode):
        with suppress(FileExistsError):
            target.raw.mkdir(path, 0o700)
    elif siblings:
        target.raw.link(siblings[0], path)
    elif modes.S_ISLNK(found.mode):
        target.raw.symlink(source.raw.readlink(path), path)
    else:
        target.raw.mknod(path, modes.S_IFMT(found.mode) | 0o600, found.rdev)
        if modes.S_ISREG(found.mode):
            _copy(target, path, source)


def _copy(target: Driven, path: bytes, source: Driven) -> None:
    reading, writing = source.raw.open(path, os.O_RDONLY, 0), target.raw.open(path, os.O_WRONLY, 0)
    offset = 0
    while piece := reading.read(offset):
        writing.write(piece, offset)
        offset += len(piece)
    reading.close()
    writing.close()


def _apply_attributes(target: Driven, path: bytes, source: Driven) -> None:
    found = source.raw.stat(path)
    target.raw.chown(path, found.uid, found.gid)
    for name in set(target.raw.listxattr(path)) - set(source.raw.listxattr(path)):
        target.raw.removexattr(path, name)
    for name in source.raw.listxattr(path):
        target.raw.setxattr(path, name, source.raw.getxattr(path, name), 0)
    if not modes.S_ISLNK(found.mode):
        target.raw.chmod(path, modes.S_IMODE(found.mode))
    target.raw.utime(path, found.atime_ns, found.mtime_ns)
