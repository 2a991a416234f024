"""Short loads made from a seed, in the manner of CrashMonkey: up to three changes, some made durable, then a sync.

Every load has a directory of its own with the same objects: lower ones of each kind, and some that were changed and
made durable before the load begins (SETUP).
"""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath
from random import Random

from tests.crash.power.history import Reference, Snapshot
from tests.crash.power.steps import Step

LONGEST = 3  # changes
FILES = {
    "big": 60_000,
    "small": 5_000,
    "empty": 0,
    "one": 9_000,
    "meta": 20_000,
    "d/x": 5_000,
    "d/y": 3_000,
    "t/s/z": 7_000,
}
SETUP = (
    Step("create", "upper"),
    Step("write", "upper", size=12_000, tag=201),
    Step("mkdir", "made"),
    Step("create", "made/w"),
    Step("write", "made/w", size=4_000, tag=202),
    Step("chmod", "meta", size=0o604),
)
NEW = ("n1", "n2", "d/n3", "made/n4", "bare/n5", "t/s/n6")
SIZES = (1, 100, 4_096, 10_000)
MODES = (0o600, 0o644, 0o755, 0o711)
DURABLE = ("fsync", "fsync", "fsync-writer", "fdatasync", "fsync-dir", "sync")


def build(base: Path) -> None:
    """Make the lower objects of one load."""
    for directory in ("d", "bare", "t/s"):
        (base / directory).mkdir(parents=True)
    for number, (name, size) in enumerate(FILES.items()):
        (base / name).write_bytes(bytes([97 + number]) * size)
    os.link(base / "one", base / "two")
    os.symlink("big", base / "link")


class Load:
    """The steps of one seed, found while they are performed on a reference: a step that fails there is skipped."""

    setup = SETUP

    def __init__(self, seed: int) -> None:
        self.name = f"load{seed}"
        self._random = Random(seed)
        self._tag = 0

    def build(self, base: Path) -> None:
        """Make the lower objects."""
        build(base)

    def run(self, reference: Reference) -> Iterator[Step]:
        """Yield each step after it was performed on the reference."""
        random = self._random
        held = random.choice(("big", "small", "meta", "upper")) if random.random() < 0.25 else None
        if held is not None:
            yield from self._take(reference, Step("hold", held))
        for _ in range(random.randint(1, LONGEST)):
            touched = yield from self._change(reference)
            if random.random() < 0.6:
                yield from self._make_durable(reference, touched)
        if held is not None:
            yield from self._take(reference, Step("fsync-held", held))
        yield from self._change(reference)
        yield from self._take(reference, Step("sync", ""))

    def _take(self, reference: Reference, *steps: Step) -> Iterator[Step]:
        for step in steps:
            try:
                reference.perform(step)
            except OSError:
                return
            yield step

    def _change(self, reference: Reference) -> Generator[Step, None, str]:
        """Yield the steps of one change, and return the path that it touched."""
        while True:
            steps = self._draw(reference.snapshots[-1])
            done = [step for each in steps for step in self._take(reference, each)]
            yield from done
            if done:
                return done[-1].other or done[-1].path

    def _make_durable(self, reference: Reference, path: str) -> Iterator[Step]:
        verb = self._random.choice(DURABLE)
        parent = str(PurePosixPath(path).parent).strip(".")
        is_file = path in _paths(reference.snapshots[-1], directories=False)
        if not is_file and verb != "sync":
            verb = "fsync-dir"
        yield from self._take(reference, Step(verb, "" if verb == "sync" else parent if verb == "fsync-dir" else path))

    def _draw(self, tree: Snapshot) -> tuple[Step, ...]:
        return self._random.choice(_KINDS)(self, tree)

    def _file(self, tree: Snapshot) -> str:
        return self._random.choice(_paths(tree, directories=False))

    def _directory(self, tree: Snapshot) -> str:
        return self._random.choice(_paths(tree, directories=True))

    def _new(self) -> str:
        return self._random.choice(NEW)

    def _next_tag(self) -> int:
        self._tag += 1
        return self._tag

    def _create(self, tree: Snapshot) -> tuple[Step, ...]:
        path, size = self._new(), self._random.choice(SIZES)
        return Step("create", path), Step("write", path, size=size, tag=self._next_tag())

    def _write(self, tree: Snapshot) -> tuple[Step, ...]:
        at, size = self._random.choice((0, 0, 100, 4_096, 6_000)), self._random.choice(SIZES)
        return (Step("write", self._file(tree), at=at, size=size, tag=self._next_tag()),)

    def _append(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("append", self._file(tree), size=self._random.choice(SIZES), tag=self._next_tag()),)

    def _rewrite(self, tree: Snapshot) -> tuple[Step, ...]:
        path = self._file(tree)
        return Step("cut", path), Step("write", path, size=self._random.choice(SIZES), tag=self._next_tag())

    def _truncate(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("truncate", self._file(tree), size=self._random.choice((0, 1, 4_096, 5_500, 70_000))),)

    def _chmod(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("chmod", self._random.choice(_all(tree)), size=self._random.choice(MODES)),)

    def _attribute(self, tree: Snapshot) -> tuple[Step, ...]:
        verb = self._random.choice(("setxattr", "setxattr", "unsetxattr"))
        return (Step(verb, self._random.choice(_all(tree)), tag=self._next_tag()),)

    def _rename(self, tree: Snapshot) -> tuple[Step, ...]:
        target = self._random.choice((*NEW, self._file(tree), self._directory(tree)))
        return (Step("rename", self._random.choice(_all(tree)), target),)

    def _exchange(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("exchange", self._random.choice(_all(tree)), self._random.choice(_all(tree))),)

    def _save(self, tree: Snapshot) -> tuple[Step, ...]:
        """Save as editors do: write the new content under another name, make it durable, rename it over the old one."""
        name, old = self._new(), self._file(tree)
        written = Step("write", name, size=self._random.choice(SIZES), tag=self._next_tag())
        return Step("create", name), written, Step("fsync-writer", name), Step("rename", name, old)

    def _link(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("link", self._file(tree), self._new()),)

    def _unlink(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("unlink", self._file(tree)),)

    def _mkdir(self, tree: Snapshot) -> tuple[Step, ...]:
        path = self._new()
        return Step("mkdir", path), Step("create", f"{path}/in")

    def _rmdir(self, tree: Snapshot) -> tuple[Step, ...]:
        return (Step("rmdir", self._directory(tree)),)

    def _replace(self, tree: Snapshot) -> tuple[Step, ...]:
        path = self._file(tree)
        return Step("unlink", path), Step("create", path), Step("write", path, size=100, tag=self._next_tag())


_KINDS: tuple[Callable[[Load, Snapshot], tuple[Step, ...]], ...] = (
    Load._create, Load._write, Load._write, Load._append, Load._rewrite, Load._truncate, Load._chmod, Load._attribute,
    Load._rename, Load._rename, Load._exchange, Load._save, Load._link, Load._unlink, Load._mkdir, Load._rmdir,
    Load._replace,
)  # fmt: skip


def _paths(tree: Snapshot, directories: bool) -> list[str]:
    """Return the paths of all directories but the first, or of all regular files."""
    found, pending = [], [("", tree.root)]
    while pending:
        path, number = pending.pop()
        thing = tree.things[number]
        if path and bool(thing.kind == 0o040000) == directories and thing.kind != 0o120000:
            found.append(path)
        pending += [(f"{path}/{name}".strip("/"), child) for name, child in thing.entries.items()]
    return sorted(found)


def _all(tree: Snapshot) -> list[str]:
    return _paths(tree, directories=False) + _paths(tree, directories=True)
