"""A client that records what was acknowledged: it changes directories of its own and checks that all of it is there.

Run as `python -m tests.crash.worker PARENT SEED ACKS`; ACKS is a descriptor that gets a byte for each change that
returned. On standard input, one word a line: the name of a directory in PARENT makes it work there until a call fails;
`check` and `check-all` are answered with a line of JSON, a list of what is wrong in that directory, or in all so far.
What was in flight may be done or not; nothing else may.
"""

import hashlib
import json
import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field

FILES = 6  # in each directory of the layer
CONTENT = b"o" * 9000
PAGE = 4096  # a write within one page is never done by half, also when the writer is killed
MANY = 12

Change = Callable[[], None]


@dataclass
class Object:
    """A file or an empty directory."""

    mode: int
    data: bytes = b""
    mark: bytes = b""


@dataclass
class Directory:
    """What a directory holds: objects by number, and names for them."""

    names: dict[str, int] = field(default_factory=dict)
    objects: dict[int, Object] = field(default_factory=dict)

    def add(self, name: str, made: Object) -> None:
        """Add an object under a name."""
        number = max(self.objects, default=0) + 1
        self.objects[number] = made
        self.names[name] = number

    def get(self, name: str) -> Object:
        """Return the object under a name."""
        return self.objects[self.names[name]]

    def picture(self) -> dict[str, tuple[object, ...]]:
        """Return what can be compared."""
        counts = list(self.names.values())
        return {name: _picture(self.objects[number], counts.count(number)) for name, number in self.names.items()}

    def of_mode(self, kind: int) -> list[str]:
        """Return the names of files, or of directories."""
        return sorted(name for name in self.names if stat.S_IFMT(self.get(name).mode) == kind)


def _picture(found: Object, links: int) -> tuple[object, ...]:
    if stat.S_ISDIR(found.mode):
        return (found.mode,)
    return found.mode, links, len(found.data), hashlib.sha256(found.data).hexdigest(), found.mark


def as_in_the_layer() -> Directory:
    """Return the initial content of each directory."""
    made = Directory()
    for number in range(FILES):
        made.add(f"old{number}", Object(0o100644, CONTENT))
    return made


def seen(path: str) -> dict[str, tuple[object, ...]]:
    """Return the same picture of a real directory."""
    return {name: _seen(f"{path}/{name}") for name in os.listdir(path)}


def _seen(path: str) -> tuple[object, ...]:
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode):
        return (found.st_mode,)
    with open(path, "rb") as file:
        data = file.read()
    mark = os.getxattr(path, "user.mark") if "user.mark" in os.listxattr(path) else b""
    return _picture(Object(found.st_mode, data, mark), found.st_nlink)


class Worker:
    """Works in one directory at a time. `sure`: what it must hold; `flight`: or this, if the last call was done."""

    def __init__(self, parent: str, seed: int, acks: int) -> None:
        self._parent = parent
        self._chance = random.Random(seed)
        self._acks = acks
        self._made = 0
        self._all: dict[str, Directory] = {}
        self._name = ""
        self._flight: Directory | None = None

    @property
    def _sure(self) -> Directory:
        return self._all[self._name]

    def work_in(self, name: str) -> None:
        """Change this directory until a call fails."""
        self._name = name
        self._all.setdefault(name, as_in_the_layer())
        self._flight = None
        while self._flight is None:
            self._step()

    def _step(self) -> None:
        wanted = deepcopy(self._sure)
        call = self._chance.choice(self._possible(wanted))(wanted)
        try:
            call()
        except OSError:
            self._flight = wanted
            return
        self._all[self._name] = wanted
        os.write(self._acks, b".")

    def check(self) -> list[str]:
        """Return what is wrong with the directory that was worked in last."""
        found = seen(self._path(""))
        if self._flight is not None and found == self._flight.picture():
            self._all[self._name] = self._flight
        return self._differences(self._name, found)

    def check_all(self) -> list[str]:
        """Return what is wrong with all of them."""
        return [line for name in self._all for line in self._differences(name, seen(f"{self._parent}/{name}"))]

    def _differences(self, name: str, found: dict[str, tuple[object, ...]]) -> list[str]:
        wanted = self._all[name].picture()
        keys = sorted(found.keys() | wanted.keys())
        return [f"{name}/{each}: {found.get(each)}, not {wanted.get(each)}"
                for each in keys if found.get(each) != wanted.get(each)]  # fmt: skip

    # --- changes: each is made in the model, and the call that makes it is returned ------------------------

    def _possible(self, wanted: Directory) -> list[Callable[[Directory], Change]]:
        if len(wanted.of_mode(stat.S_IFREG)) > MANY:
            return [self._unlink]
        found: list[Callable[[Directory], Change]] = [self._create, self._mkdir]
        if wanted.of_mode(stat.S_IFREG):
            found += [self._write, self._write, self._chmod, self._truncate, self._mark, self._link]
            found += [self._rename, self._rename, self._unlink]
        if wanted.of_mode(stat.S_IFDIR):
            found += [self._rmdir, self._rename_directory]
        return found

    def _path(self, name: str) -> str:
        return f"{self._parent}/{self._name}/{name}"

    def _fresh(self) -> str:
        self._made += 1
        return f"new{self._made}"

    def _file(self, wanted: Directory) -> str:
        return self._chance.choice(wanted.of_mode(stat.S_IFREG))

    def _create(self, wanted: Directory) -> Change:
        name = self._fresh()
        wanted.add(name, Object(0o100640))
        return lambda: os.close(os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640))

    def _mkdir(self, wanted: Directory) -> Change:
        name = self._fresh()
        wanted.add(name, Object(0o040755))
        return lambda: os.mkdir(self._path(name), 0o755)

    def _write(self, wanted: Directory) -> Change:
        name = self._file(wanted)
        start = PAGE * self._chance.randrange(3) + self._chance.randrange(PAGE // 2)
        data = self._chance.randbytes(self._chance.randrange(1, PAGE // 2))
        changed = wanted.get(name)
        changed.data = changed.data[:start].ljust(start, b"\0") + data + changed.data[start + len(data) :]
        return lambda: self._pwrite(name, data, start)

    def _pwrite(self, name: str, data: bytes, start: int) -> None:
        with _opened(self._path(name), os.O_WRONLY) as fd:
            os.pwrite(fd, data, start)

    def _chmod(self, wanted: Directory) -> Change:
        name, mode = self._file(wanted), self._chance.randrange(0o400, 0o777)
        wanted.get(name).mode = stat.S_IFREG | mode
        return lambda: os.chmod(self._path(name), mode)

    def _truncate(self, wanted: Directory) -> Change:
        name, size = self._file(wanted), self._chance.choice((0, 100, PAGE, 20_000))
        changed = wanted.get(name)
        changed.data = changed.data[:size].ljust(size, b"\0")
        return lambda: os.truncate(self._path(name), size)

    def _mark(self, wanted: Directory) -> Change:
        name, mark = self._file(wanted), self._chance.randbytes(8).hex().encode()
        wanted.get(name).mark = mark
        return lambda: os.setxattr(self._path(name), "user.mark", mark)

    def _link(self, wanted: Directory) -> Change:
        name, new = self._file(wanted), self._fresh()
        wanted.names[new] = wanted.names[name]
        return lambda: os.link(self._path(name), self._path(new))

    def _rename(self, wanted: Directory) -> Change:
        """To a new name, or over another file, even one that is the same."""
        name = self._file(wanted)
        new = self._chance.choice((self._fresh(), self._file(wanted)))
        if wanted.names[name] != wanted.names.get(new):
            wanted.names[new] = wanted.names.pop(name)
        return lambda: os.rename(self._path(name), self._path(new))

    def _unlink(self, wanted: Directory) -> Change:
        name = self._file(wanted)
        del wanted.names[name]
        return lambda: os.unlink(self._path(name))

    def _rmdir(self, wanted: Directory) -> Change:
        name = self._chance.choice(wanted.of_mode(stat.S_IFDIR))
        del wanted.names[name]
        return lambda: os.rmdir(self._path(name))

    def _rename_directory(self, wanted: Directory) -> Change:
        name, new = self._chance.choice(wanted.of_mode(stat.S_IFDIR)), self._fresh()
        wanted.names[new] = wanted.names.pop(name)
        return lambda: os.rename(self._path(name), self._path(new))


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def main(parent: str, seed: str, acks: str) -> None:
    """Execute commands until the input ends."""
    worker = Worker(parent, int(seed), int(acks))
    for line in sys.stdin:
        word = line.strip()
        if word == "check":
            print(json.dumps(worker.check()), flush=True)
        elif word == "check-all":
            print(json.dumps(worker.check_all()), flush=True)
        else:
            worker.work_in(word)
            print("stopped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
