"""Aimed faults of the real daemon: scenes to mount, operations of clients, and what must hold after a fault.

A scene has rooms, equal directories with something of each kind in the layers and in the upper; each act is done in an
unused room, so that one mount serves many acts.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from tests.crash.harness import build_layers
from tests.support import launcher, syscalls
from tests.support.campaign import Campaign
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, differences, dump
from tests.support.launcher import Launcher
from tests.support.tracer import LOOKING, Tracer

LONG_AGO = 10**18  # ns since 1970: the mtime of everything that exists before an act
LATER = 15 * 10**17
HUNG = 20.0  # seconds after which an act has hung: the daemon is killed, so that the act ends

Act = Callable[[Path], object]


def _write(path: Path, data: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _write_and_sync(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b"written")
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(room: Path, one: bytes, other: bytes) -> None:
    fd = os.open(room, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syscalls.renameat2(fd, one, fd, other, syscalls.EXCHANGE)
    finally:
        os.close(fd)


def _change_upper(room: Path) -> None:
    (room / "hidden").unlink()
    (room / "gone").rmdir()
    (room / "made").mkdir()
    (room / "fresh").write_bytes(b"fresh")
    os.chown(room / "link", 7, 7, follow_symlinks=False)


def _clear_merged(room: Path) -> None:
    for name in ("deep", "shallow"):
        (room / "merged" / name).unlink()


BEFORE: dict[str, Act] = {
    "write to a metadata-only copy": lambda room: os.chmod(room / "file", 0o600),
    "truncate a metadata-only copy": lambda room: os.chmod(room / "file", 0o600),
    "rmdir of a merged directory": _clear_merged,
    "rename onto emptied": _clear_merged,
}
"""What happens without a fault before the act of this name; the mount ends between the two."""

WRITES: dict[str, Act] = {
    "write": lambda room: _write(room / "file", b"written"),
    "write to a metadata-only copy": lambda room: _write(room / "file", b"written"),
    "write and fsync": lambda room: _write_and_sync(room / "file"),
    "truncate": lambda room: os.truncate(room / "file", 10),
    "truncate a metadata-only copy": lambda room: _write(room / "file", b"", os.O_TRUNC),
    "create over a whiteout": lambda room: os.close(os.open(room / "hidden", os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
}
ATTRIBUTES: dict[str, Act] = {
    "chmod": lambda room: os.chmod(room / "file", 0o600),
    "chmod deep in a layer": lambda room: os.chmod(room / "lower" / "inner" / "leaf", 0o600),
    "setxattr": lambda room: os.setxattr(room / "file", "user.new", b"1"),
    "link": lambda room: os.link(room / "file", room / "made" / "again"),
    "unlink": lambda room: os.unlink(room / "file"),
    "unlink a twin": lambda room: os.unlink(room / "two"),
}
NAMES: dict[str, Act] = {
    "rename a file": lambda room: os.rename(room / "file", room / "moved"),
    "rename over a file": lambda room: os.rename(room / "fresh", room / "file"),
    "rename a directory": lambda room: os.rename(room / "merged", room / "moved"),
    "rename onto emptied": lambda room: os.rename(room / "made", room / "merged"),
    "exchange": lambda room: _exchange(room, b"merged", b"made"),
    "rmdir of a merged directory": lambda room: os.rmdir(room / "merged"),
    "mkdir over a whiteout": lambda room: os.mkdir(room / "gone"),
}
ACTS = {**WRITES, **ATTRIBUTES, **NAMES}
GROUPS = {"writes": WRITES, "attributes": ATTRIBUTES, "names": NAMES}


COMPOUND = ("write and fsync",)
"""Acts of more than one call: the second one may be the one that fails."""
TOUCHING = ("write to a metadata-only copy", "truncate a metadata-only copy")
"""The mtime moves while the copy gets its data, and is then restored, as in the kernel's overlayfs."""


class Undisturbed(NamedTuple):
    """What a room shows before and after an act, and the daemon's system calls between."""

    old: Dump
    new: Dump
    calls: list[str]

    @property
    def all(self) -> list[int]:
        """The numbers of the calls."""
        return list(range(1, len(self.calls) + 1))

    @property
    def changing(self) -> list[int]:
        """The numbers of those that change something."""
        return [at for at, call in enumerate(self.calls, 1) if call not in LOOKING]


def _timed(tree: Dump, other: Dump) -> Dump:
    """Return a tree with the times of another one."""
    times = {path: entry.mtime_ns for path, entry in other.items()}
    return {path: entry._replace(mtime_ns=times.get(path, entry.mtime_ns)) for path, entry in tree.items()}


class Scene:
    """A stack with rooms for one act, and the daemon that serves it; a context manager that removes both at the end.

    The first two rooms are for `undisturbed`.
    """

    def __init__(self, place: Path, launch: Launcher, engine: str, name: str, rooms: int, mutant: str = "") -> None:
        self.place = place
        self.point = place / "m"
        self.name, self.engine = name, engine
        self.act = ACTS[name]
        self.rooms = [f"room{number}" for number in range(rooms + 2)]
        self._launch = launch
        self._mutant = mutant
        layers = f"lowerdir={place}/top:{place}/base,upperdir={place}/up,workdir={place}/work"
        self._options = f"{layers},engine={engine},spin=0"
        self._make(BEFORE.get(name))
        self.layers = shown(place / "top"), shown(place / "base")

    def _make(self, before: Act | None) -> None:
        for directory in ("top", "base", "up", "work", "m"):
            (self.place / directory).mkdir(parents=True)
        for room in self.rooms:
            build_layers(self.place / "base" / room, self.place / "top" / room)
        self.start("")
        for room in self.rooms:
            _change_upper(self.point / room)
        self.stop()
        if before is not None:
            self.start("")
            for room in self.rooms:
                before(self.point / room)
            self.stop()
        self._age()

    def _age(self) -> None:
        """Set all times far back, so that the changes by an act can be recognized."""
        for layer in ("top", "base", "up"):
            for path in (self.place / layer).rglob("*"):
                os.utime(path, ns=(LONG_AGO, LONG_AGO), follow_symlinks=False)

    def start(self, mutant: str | None = None) -> None:
        """Mount; a dead mount may be in the way."""
        self.pid = self._launch.mount(
            self.point, "-o", self._options, mutant=self._mutant if mutant is None else mutant
        )

    def stop(self) -> None:
        """Unmount; the daemon must end well."""
        assert launcher.end(self.point, self.pid) == 0, "the daemon did not end well"

    def do(self, room: str) -> OSError | None:
        """Act in a room; return the error that the caller gets, None for success. Kills the daemon if it hangs."""
        limit = threading.Timer(HUNG, os.kill, (self.pid, signal.SIGKILL))
        limit.start()
        try:
            self.act(self.point / room)
        except OSError as error:
            assert limit.is_alive(), "it hung"
            return error
        finally:
            limit.cancel()
        return None

    def undisturbed(self) -> Undisturbed:
        """Act once, so that what it does is known, and leave the scene mounted."""
        _, room = self.rooms[:2]
        self.start()
        old = self.view(room)
        self.stop()
        self.start()
        self.view(self.rooms[0])  # other rooms are looked at before later acts as well
        with Tracer(self.pid) as tracer:
            error = self.do(room)
        assert error is None, repr(error)
        return Undisturbed(old, self.view(room), tracer.calls)

    def check(self, room: str, first: Undisturbed) -> bool:
        """A room shows one of the two trees; return whether it is the new one."""
        trees = {"old": first.old}
        if self.name in TOUCHING:
            trees["touched"] = _timed(first.old, first.new)
        return is_one_of(self.view(room), new=first.new, **trees) == "new"

    def free(self, count: int) -> list[str]:
        """Return `count` rooms that have not been used."""
        assert count <= len(self.rooms) - 2, f"{self.name} needs {count} rooms"
        return self.rooms[2 : count + 2]

    def view(self, room: str) -> Dump:
        """Return what a room shows."""
        return shown(self.point / room)

    @property
    def staged(self) -> list[str]:
        """Return the names in the work directory's staging directory."""
        return os.listdir(self.place / "work" / "work")

    def check_layers(self) -> None:
        """The layers are what they were."""
        assert (shown(self.place / "top"), shown(self.place / "base")) == self.layers, "a layer has changed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        launcher.clear(self.point, self.pid)
        shutil.rmtree(self.place)


def shown(root: Path) -> Dump:
    """Return everything that a tree shows, except times of directories; times after LATER count as equal."""
    raw = PosixRaw(os.fsencode(root))
    try:
        found = dump(raw, times_before=LATER)
    finally:
        raw.close()
    return {path: entry._replace(mtime_ns=0) if entry.kind == "dir" else entry for path, entry in found.items()}


def is_one_of(found: Dump, **trees: Dump) -> str:
    """Return the name of the tree that was found; AssertionError with what differs when it is none."""
    for name, tree in trees.items():
        if found == tree:
            return name
    lines = (f"not {name}: {', '.join(differences(found, tree))}" for name, tree in trees.items())
    raise AssertionError("; ".join(lines))


def acts(campaign: Campaign, group: str, quick: int) -> list[str]:
    """Return the names of the acts of a group to try: all in a full run, else `quick` evenly spaced ones."""
    names = list(GROUPS[group])
    return names if campaign.full else names[:: len(names) // quick][:quick]
