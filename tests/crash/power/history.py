"""What a load's directory should hold after each of its steps, and what has been promised by then."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.crash.power.steps import Held, Step, close_all, perform

MARK = "user.mark"


@dataclass(frozen=True)
class Thing:
    """One object: type, permission bits, the attribute `user.mark`, content or target, and a directory's entries."""

    kind: int
    mode: int
    mark: bytes | None
    data: bytes = b""
    entries: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A whole tree: its objects by number, which stays with an object over renames and links."""

    root: int
    things: dict[int, Thing]

    def at(self, path: str) -> int:
        """Return the number of the object at a path."""
        number = self.root
        for name in PurePosixPath(path).parts:
            number = self.things[number].entries[name]
        return number

    def path(self, number: int) -> PurePosixPath:
        """Return one path of an object."""
        path = PurePosixPath()
        while number != self.root:
            at, name = next(
                (at, name) for at, thing in self.things.items() for name, of in thing.entries.items() if of == number
            )
            number, path = at, name / path
        return path

    def names(self) -> dict[int, int]:
        """Return how many names each object has."""
        counted = dict.fromkeys(self.things, 0)
        for thing in self.things.values():
            for number in thing.entries.values():
                counted[number] += 1
        return counted


def snapshot(base: Path) -> Snapshot:
    """Look at a plain directory."""
    things: dict[int, Thing] = {}
    pending = [base]
    while pending:
        path = pending.pop()
        found = os.lstat(path)
        names = os.listdir(path) if stat.S_ISDIR(found.st_mode) else []
        pending += [path / name for name in names]
        entries = {name: os.lstat(path / name).st_ino for name in names}
        mode = stat.S_IMODE(found.st_mode)
        things[found.st_ino] = Thing(stat.S_IFMT(found.st_mode), mode, _mark(path), _data(path, found), entries)
    return Snapshot(os.lstat(base).st_ino, things)


def _mark(path: Path) -> bytes | None:
    attributes = os.listxattr(path, follow_symlinks=False)
    return os.getxattr(path, MARK, follow_symlinks=False) if MARK in attributes else None


def _data(path: Path, found: os.stat_result) -> bytes:
    if stat.S_ISLNK(found.st_mode):
        return os.fsencode(os.readlink(path))
    return path.read_bytes() if stat.S_ISREG(found.st_mode) else b""


class Reference:
    """A plain directory in which a load is performed as well; `snapshots[n]` is what it holds after n steps."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.steps: list[Step] = []
        self.snapshots = [snapshot(base)]
        self.held: dict[str, int] = {}  # by path, the number of an object that was opened
        self._open: Held = {}

    def perform(self, step: Step) -> None:
        """Do a step here; OSError, and nothing has happened, where it makes no sense."""
        perform(self.base, step, self._open)
        if step.verb == "hold":
            self.held[step.path] = self.snapshots[-1].at(step.path)
        self.steps.append(step)
        self.snapshots.append(snapshot(self.base))

    def close(self) -> None:
        """Close what the steps have kept open."""
        close_all(self._open)


class Promises:
    """From which snapshot on the state of something counts: earlier states must not come back.

    names: by directory and name; data, meta: by object; lives: by object, its existence under any name.
    """

    def __init__(self) -> None:
        self.names: dict[tuple[int, str], int] = {}
        self.data: dict[int, int] = {}
        self.meta: dict[int, int] = {}
        self.lives: dict[int, int] = {}

    def keep(self, reference: Reference, done: int) -> None:
        """Record what the first `done` steps have made durable, at first everything that the load began with."""
        self._everything(reference, 0)
        for number, step in enumerate(reference.steps[:done], 1):
            if step.verb == "sync":
                self._everything(reference, number)
            elif step.verb == "fsync-dir":
                self._directory(reference, number, step.path)
            elif step.verb.startswith(("fsync", "fdatasync")):
                self._file(reference, number, step)

    def _everything(self, reference: Reference, number: int) -> None:
        tree = reference.snapshots[number]
        self.data = dict.fromkeys(tree.things, number)
        self.meta = dict.fromkeys(tree.things, number)
        self.lives = dict.fromkeys(tree.things, number)
        self.names = dict.fromkeys(_places(reference, number), number)

    def _file(self, reference: Reference, number: int, step: Step) -> None:
        tree = reference.snapshots[number]
        file = reference.held[step.path] if step.verb == "fsync-held" else tree.at(step.path)
        if file in tree.things:
            self.data[file] = number
            if step.verb != "fdatasync":
                self.meta[file] = number
            self._chain(tree, number, tree.path(file) if step.verb == "fsync-held" else PurePosixPath(step.path))

    def _directory(self, reference: Reference, number: int, path: str) -> None:
        tree = reference.snapshots[number]
        directory = tree.at(path)
        self.meta[directory] = number
        self.names |= {(at, name): number for at, name in _places(reference, number) if at == directory}
        self.lives |= dict.fromkeys(tree.things[directory].entries.values(), number)
        self._chain(tree, number, PurePosixPath(path))

    def _chain(self, tree: Snapshot, number: int, path: PurePosixPath) -> None:
        """The name that was used is durable, and so are those that lead to it."""
        while path.name:
            self.lives[tree.at(str(path))] = number
            self.names[tree.at(str(path.parent)), path.name] = number
            path = path.parent


def _places(reference: Reference, number: int) -> Iterator[tuple[int, str]]:
    """Yield every directory with every name that it has had up to a snapshot, gone ones too."""
    for tree in reference.snapshots[: number + 1]:
        for at, thing in tree.things.items():
            yield from ((at, name) for name in thing.entries)
