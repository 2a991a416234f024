"""The steps of a random life: each is performed on a tree and on the model, and the results must be equal.

A step says where its arguments come from: functions of `pick`, which chooses one item of a sequence. Hypothesis
picks in test_machine.py, a seeded generator in walk.py.
"""

import os
import stat as modes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from errno import ENOTDIR
from typing import Any, ParamSpec, Protocol, TypeVar

from tests.model.reference import Folder, Item, Model, Shown, Thing, fail, put, shown
from tests.support.drivers import Handle, Stat, Tree
from tests.support.outcome import name_of
from tests.support.spec import Dir, File, Link, OpaqueForm, Short, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.syscalls import EXCHANGE, NOREPLACE

P = ParamSpec("P")
T = TypeVar("T")


class Pick(Protocol):
    """Chooses one item of a sequence."""

    def __call__(self, values: Sequence[T], /) -> T: ...


Domain = Callable[[Pick], Any]

NAMES = "abcd"
MOST_OPEN = 4  # files at a time
MOST_LAYERS = 12
BIG = bytes(range(256)) * 20
DATA = (b"", b"x", b"hello", BIG)
FILE_MODES = (0o644, 0o600, 0o4755, 0o2711, 0o400)
DIR_MODES = (0o755, 0o700, 0o1777, 0o2750)
IDS = (0, 1, 1000, 65534)
NEW_OWNERS = (*IDS, -1)  # -1 keeps an id; a daemon cannot notice a chown that keeps both (deviations.md)
SECONDS = range(1, 2**31)
XATTR_NAMES = ("user.a", "user.b", "trusted.c")
XATTR_VALUES = (b"", b"1", b"value")
XATTR_FLAGS = (0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)


def one_of(values: Sequence[T]) -> Domain:
    """Any of these."""
    return lambda pick: pick(values)


def a_path(pick: Pick) -> str:
    """One to three names. `x` and `y` are two names of one file of the lowest layer."""
    return "/".join([pick("abcdabcdxy") for _ in range(pick((1, 2, 3)))])


def a_file(pick: Pick) -> str:
    """Where a regular file should be; the step does nothing if there is none."""
    return a_path(pick)


def a_time(pick: Pick) -> int:
    """Nanoseconds since 1970."""
    seconds = pick(SECONDS)
    return seconds * 10**9 + seconds % 10**9


# --- layers to begin with ----------------------------------------------------------------------------------


def layers(pick: Pick) -> list[Spec]:
    """Two to four layers, top first.

    No layer covers `x` and `y`, so that links can be counted.
    """
    above: list[Spec] = [_layer(pick, 2, marks=True) for _ in range(pick((1, 2, 3)))]
    return [*above, {**_layer(pick, 2, marks=False), "x": File(b"twins"), "y": Link("x")}]


def _layer(pick: Pick, depth: int, *, marks: bool) -> dict[str, Short]:
    """One layer, with whiteouts and opaque directories unless it is the lowest."""
    count = pick(range(5 if depth else 4))
    return {pick(NAMES): _entry(pick, depth, marks) for _ in range(count)}


def _entry(pick: Pick, depth: int, marks: bool) -> Short:
    if depth and pick(("dir", "dir", "leaf")) == "dir":
        opaque: OpaqueForm | None = pick((None, None, "trusted")) if marks else None
        children = _layer(pick, depth - 1, marks=marks)
        return Dir(children, mode=pick(DIR_MODES), mtime_ns=a_time(pick), opaque=opaque)
    match pick(("file", "symlink", "fifo", "whiteout") if marks else ("file", "symlink", "fifo")):
        case "file":
            xattrs = {pick(XATTR_NAMES): pick(XATTR_VALUES)} if pick((True, False)) else {}
            made = File(mode=pick(FILE_MODES), uid=pick(IDS), data=pick(DATA), xattrs=xattrs)
            return replace(made, mtime_ns=a_time(pick))
        case "symlink":
            return Symlink(target=a_path(pick))
        case "fifo":
            return Special()
        case _:
            return Whiteout()


# --- what a step is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of step: what it does, where its arguments come from, and when it can be done."""

    act: Callable[..., None]
    domains: Mapping[str, Domain]
    possible: Callable[["Life"], bool]


KINDS: dict[str, Kind] = {}
"""All kinds, by the names of the methods of `Life`."""


def _always(life: "Life") -> bool:
    return True


def _has_open_files(life: "Life") -> bool:
    return bool(life.open_files)


def _has_few_layers(life: "Life") -> bool:
    return len(life.tree.stack.lower) < MOST_LAYERS


def _can_rotate(life: "Life") -> bool:
    return life.tree.can_rotate and _has_few_layers(life)


def step(
    *, possible: Callable[["Life"], bool] = _always, **domains: Domain
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a method of `Life` a kind of step."""

    def note(act: Callable[P, None]) -> Callable[P, None]:
        KINDS[act.__name__] = Kind(act, domains, possible)
        return act

    return note


# --- a life ------------------------------------------------------------------------------------------------


class OpenFile:
    """A handle, and the item of the model that it must show."""

    def __init__(self, handle: Handle, item: Item, *, writes: bool) -> None:
        self.handle, self.item, self.writes = handle, item, writes


class Life:
    """One tree and its model. Steps raise AssertionError when the two differ."""

    tree: Tree
    model: Model
    unseen_writers = False  # writes bypass the daemon and clear set-id bits set after the open (deviations.md)

    def begin(self, tree: Tree, model: Model) -> None:
        """Start with an unchanged tree."""
        self.tree, self.model = tree, model
        self.open_files: list[OpenFile] = []
        self.numbers: dict[Thing, int] = {}
        self.check_tree()

    def end(self) -> None:
        """Compare what is on the disk, and close the tree."""
        try:
            self.check_tree()
            self.remount()
        finally:
            self.tree.close()
        self.tree.stack.check()

    def both(self, real: Callable[[], Any], ideal: Callable[[], Any]) -> Any:
        """The same step on both; equal errors, and the results to compare."""
        got, wanted = outcome(real), outcome(ideal)
        assert got[0] == wanted[0], f"got {name_of(got[0])}, wanted {name_of(wanted[0])}"
        return got[1], wanted[1]

    def regular(self, path: str) -> bool:
        """Whether the path is a regular file, so that opening it means reading or writing data."""
        try:
            item = self.model.find(path)
        except OSError:
            return False
        return isinstance(item, Item) and item.kind == "file"

    # Making
    @step(path=a_path, content=one_of(DATA), mode=one_of(FILE_MODES))
    def create(self, path: str, content: bytes, mode: int) -> None:
        self.both(lambda: self.tree.create(path, content, mode), lambda: self.model.create(path, content, mode))

    @step(path=a_path, mode=one_of(DIR_MODES))
    def mkdir(self, path: str, mode: int) -> None:
        self.both(lambda: self.tree.mkdir(path, mode & ~0o2000), lambda: self.model.mkdir(path, mode & ~0o2000))

    @step(path=a_path, pointing=a_path)
    def symlink(self, path: str, pointing: str) -> None:
        self.both(lambda: self.tree.symlink(pointing, path), lambda: self.model.symlink(pointing, path))

    @step(path=a_path, mode=one_of(FILE_MODES))
    def mkfifo(self, path: str, mode: int) -> None:
        self.both(lambda: self.tree.mkfifo(path, mode), lambda: self.model.mkfifo(path, mode))

    @step(old=a_path, new=a_path)
    def link(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.link(old, new), lambda: self.model.link(old, new))

    # Removing and moving

    @step(path=a_path)
    def unlink(self, path: str) -> None:
        self.both(lambda: self.tree.unlink(path), lambda: self.model.unlink(path))

    @step(path=a_path)
    def rmdir(self, path: str) -> None:
        self.both(lambda: self.tree.rmdir(path), lambda: self.model.rmdir(path))

    @step(path=a_path)
    def remove_tree(self, path: str) -> None:
        self.both(lambda: self.tree.remove_tree(path), lambda: self.model.remove_tree(path))

    @step(old=a_path, new=a_path)
    def rename(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.rename(old, new), lambda: self.model.rename(old, new, 0))

    @step(old=a_path, new=a_path)
    def rename_noreplace(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.rename(old, new, NOREPLACE), lambda: self.model.rename(old, new, NOREPLACE))

    @step(old=a_path, new=a_path)
    def exchange(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.rename(old, new, EXCHANGE), lambda: self.model.rename(old, new, EXCHANGE))

    @step(path=a_path)
    def make_anew(self, path: str) -> None:
        """Replace whatever is at the path by a directory."""
        self.both(lambda: self.tree.remove_tree(path), lambda: self.model.remove_tree(path))
        self.both(lambda: self.tree.mkdir(path, 0o755), lambda: self.model.mkdir(path, 0o755))

    # Data

    @step(path=a_file, content=one_of(DATA), offset=one_of((0, 2, 5000)))
    def write(self, path: str, content: bytes, offset: int) -> None:
        if self.regular(path) and content:
            self.both(lambda: self.tree.write(path, content, offset), lambda: self.model.write(path, content, offset))

    @step(path=a_file, size=one_of((0, 1, 4, 6000)))
    def truncate(self, path: str, size: int) -> None:
        if self.regular(path):
            self.both(lambda: self.tree.truncate(path, size), lambda: self.model.truncate(path, size))

    @step(path=a_file, content=one_of(DATA))
    def replace(self, path: str, content: bytes) -> None:
        if self.regular(path):
            self.both(lambda: self.tree.replace(path, content), lambda: self.model.replace(path, content))

    @step(path=a_file)
    def read(self, path: str) -> None:
        if self.regular(path):
            got, wanted = self.both(lambda: self.tree.read(path), lambda: self.model.read(path))
            assert got == wanted

    # Open files

    @step(path=a_file, writes=one_of((True, False)))
    def open(self, path: str, writes: bool) -> None:
        if self.regular(path) and len(self.open_files) < MOST_OPEN:
            handle = self.tree.open(path, os.O_RDWR if writes else os.O_RDONLY)
            self.open_files.append(OpenFile(handle, self.model.regular(path), writes=writes))

    @step(possible=_has_open_files, which=one_of(range(MOST_OPEN)), content=one_of(DATA), offset=one_of((0, 3, 4096)))
    def write_open(self, which: int, content: bytes, offset: int) -> None:
        file = self.open_files[which % len(self.open_files)]
        if file.writes and content:
            file.handle.write(content, offset)
            put(file.item, content, offset)

    @step(possible=_has_open_files, which=one_of(range(MOST_OPEN)), size=one_of((0, 2, 9000)))
    def truncate_open(self, which: int, size: int) -> None:
        file = self.open_files[which % len(self.open_files)]
        if file.writes:
            file.handle.truncate(size)
            file.item.data, file.item.mtime_ns = file.item.data[:size].ljust(size, b"\0"), None

    @step(possible=_has_open_files, which=one_of(range(MOST_OPEN)), mode=one_of(FILE_MODES))
    def chmod_open(self, which: int, mode: int) -> None:
        file = self.open_files[which % len(self.open_files)]
        mode = self.lasting(file.item, mode)
        file.handle.chmod(mode)
        file.item.mode = mode

    @step(possible=_has_open_files, which=one_of(range(MOST_OPEN)))
    def close(self, which: int) -> None:
        self.open_files.pop(which % len(self.open_files)).handle.close()

    # Attributes

    @step(path=a_path, mode=one_of(FILE_MODES))
    def chmod(self, path: str, mode: int) -> None:
        if self.regular(path):
            mode = self.lasting(self.model.regular(path), mode)
        if not self.is_symlink(path):
            self.both(lambda: self.tree.chmod(path, mode), lambda: self.model.chmod(path, mode))

    def lasting(self, item: Item, mode: int) -> int:
        """The bits of a mode that the next write by root keeps; in passthrough the write does not reach the daemon."""
        passes = self.unseen_writers and any(file.item is item for file in self.open_files)
        return mode & 0o777 if passes else mode

    @step(path=a_path, uid=one_of(NEW_OWNERS), gid=one_of(IDS))
    def chown(self, path: str, uid: int, gid: int) -> None:
        if not self.is_symlink(path):
            self.both(lambda: self.tree.chown(path, uid, gid), lambda: self.model.chown(path, uid, gid))

    @step(path=a_path, mtime_ns=a_time)
    def utime(self, path: str, mtime_ns: int) -> None:
        self.both(lambda: self.tree.utime(path, mtime_ns, mtime_ns), lambda: self.model.utime(path, mtime_ns))

    @step(path=a_path, name=one_of(XATTR_NAMES), value=one_of(XATTR_VALUES), flags=one_of(XATTR_FLAGS))
    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        if self.carries_user_xattrs(path):
            self.both(
                lambda: self.tree.setxattr(path, name, value, flags),
                lambda: self.model.setxattr(path, name, value, flags),
            )

    @step(path=a_path, name=one_of(XATTR_NAMES))
    def removexattr(self, path: str, name: str) -> None:
        if self.carries_user_xattrs(path):
            self.both(lambda: self.tree.removexattr(path, name), lambda: self.model.removexattr(path, name))

    def is_symlink(self, path: str) -> bool:
        try:
            item = self.model.find(path)
        except OSError:
            return False
        return isinstance(item, Item) and item.kind == "symlink"

    def carries_user_xattrs(self, path: str) -> bool:
        """Symlinks and FIFOs have none; the kernel answers for them without a request."""
        try:
            item = self.model.find(path)
        except OSError:
            return True
        return isinstance(item, Folder) or item.kind == "file"

    # Looking

    @step(path=a_path)
    def look(self, path: str) -> None:
        self.both(lambda: self.tree.stat(path), lambda: self.model.find(path))

    @step(path=a_path)
    def listing(self, path: str) -> None:
        def ideal() -> list[str]:
            folder = self.model.find(path)
            if isinstance(folder, Item):
                fail(ENOTDIR)
            return sorted(folder.entries)

        got, wanted = self.both(lambda: self.tree.names(path), ideal)
        assert got == wanted

    @step()
    def look_at_everything(self) -> None:
        self.check_tree()

    # Lives of the mount

    @step()
    def remount(self) -> None:
        self.forget_open_files()
        self.tree.remount()
        self.check_tree()

    @step(possible=_has_few_layers)
    def commit(self) -> None:
        """The upper becomes a layer; the numbers of what was new in it are drawn again."""
        self.forget_open_files()
        self.tree.rotate()
        self.numbers = {}
        self.check_tree()

    @step(possible=_can_rotate)
    def commit_live(self) -> None:
        """The upper becomes a layer under open files: nothing visible changes."""
        self.tree.rotation()
        self.check_tree()

    def forget_open_files(self) -> None:
        for file in self.open_files:
            file.handle.close()
        self.open_files = []

    # Comparing

    def check_tree(self) -> None:
        """Every path alike, every number unique and as before."""
        links = self.link_counts()
        paths = dict(self.model.paths())
        assert sorted(self.walk("")) == sorted(paths)
        for path in paths:
            self.check_path(path, links)
        alive = set(paths.values())
        self.numbers = {thing: number for thing, number in self.numbers.items() if thing in alive}
        assert len(set(self.numbers.values())) == len(alive), "an inode number is used twice"

    def walk(self, top: str) -> list[str]:
        """Every path that listings lead to."""
        found = []
        for item in self.tree.scan(top):
            path = f"{top}/{os.fsdecode(item.name)}" if top else os.fsdecode(item.name)
            found.append(path)
            if modes.S_ISDIR(item.kind):
                found += self.walk(path)
        return found

    def link_counts(self) -> Counter[Thing]:
        """How many names each thing has."""
        return Counter(thing for _, thing in self.model.paths())

    def look_at(self, path: str, links: Mapping[Thing, int]) -> None:
        """The path is as it should be, or absent as it should be, and so is the listing of its directory."""
        try:
            self.model.find(path)
        except OSError:
            self.look(path)
        else:
            self.check_path(path, links)
        self.check_listing(path.rpartition("/")[0])

    def check_path(self, path: str, links: Mapping[Thing, int]) -> None:
        """Everything that a path shows, the inode number included."""
        thing, found = self.model.find(path), self.tree.stat(path)
        got = self.shown(path, found)
        if thing.mtime_ns is None:  # the model does not know when it was changed
            got = got._replace(mtime_ns=None)
        assert got == shown(thing), f"{path}: got {got}, wanted {shown(thing)}"
        if isinstance(thing, Item):
            assert found.nlink == links[thing], f"{path}: {found.nlink} links, wanted {links[thing]}"
        number = self.numbers.setdefault(thing, found.ino)
        assert found.ino == number, f"{path}: its inode number was {number} and is {found.ino}"

    def check_listing(self, path: str) -> None:
        """What a directory lists, if it is one: names, and the numbers that are known."""
        try:
            folder = self.model.find(path)
        except OSError:
            return
        if isinstance(folder, Folder):
            listed = {os.fsdecode(item.name): item.ino for item in self.tree.scan(path)}
            wanted = {name: self.numbers.get(thing, listed.get(name)) for name, thing in folder.entries.items()}
            assert listed == wanted, f"{path or 'the root'}: listed {listed}, wanted {wanted}"

    def shown(self, path: str, found: Stat) -> Shown:
        """The tree's path in the model's terms."""
        xattrs = tuple((name, self.tree.getxattr(path, name)) for name in self.tree.listxattr(path))
        kind, data = self.content(path, found.mode)
        return Shown(kind, modes.S_IMODE(found.mode), found.uid, found.gid, data, found.mtime_ns, xattrs)

    def content(self, path: str, mode: int) -> tuple[str, bytes | None]:
        """The type in the model's terms, and the content."""
        if modes.S_ISDIR(mode):
            return "dir", None
        if modes.S_ISLNK(mode):
            return "symlink", os.fsencode(self.tree.readlink(path))
        if modes.S_ISFIFO(mode):
            return "fifo", b""
        return "file", self.tree.read(path)

    def check_open_files(self, links: Mapping[Thing, int]) -> None:
        """Every handle shows its file, whatever happened to its name."""
        for file in self.open_files:
            found, item = file.handle.stat(), file.item
            assert file.handle.read() == item.data, "an open file shows other data"
            got = found.size, modes.S_IMODE(found.mode), found.nlink
            assert got == (len(item.data), item.mode, links.get(item, 0)), f"an open file is {got}"


def outcome(act: Callable[[], Any]) -> tuple[int | None, Any]:
    """Errno or result."""
    try:
        return None, act()
    except OSError as error:
        return error.errno, None
