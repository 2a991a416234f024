"""Random lives of a tree, step by step beside the model: same results, same errors, same tree, also after a remount.

More than 10,000 steps in the usual run: OVERLAYFS_MODEL_EXAMPLES lives of up to STEPS each. It is the same every
time; with OVERLAYFS_MODEL_SEED=N it is another one, and the same for the same N.
"""

import os
import shutil
import stat as modes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model.reference import Folder, Item, Model, Shown, Thing, put
from tests.support.drivers import Handle, Stack, driver_class
from tests.support.drivers.overlay import FsDriver
from tests.support.outcome import name_of
from tests.support.requirements import need_root
from tests.support.spec import Dir, File, Link, Short, Special, Symlink, Whiteout, flatten
from tests.support.spec import Tree as Spec
from tests.support.syscalls import EXCHANGE, NOREPLACE

STEPS = 50
EXAMPLES = int(os.environ.get("OVERLAYFS_MODEL_EXAMPLES", "320"))
SEED = os.environ.get("OVERLAYFS_MODEL_SEED")

# `x` and `y` are two names of one file of the lowest layer; no layer covers them, so that links can be counted
names = st.sampled_from("abcd")
paths = st.lists(st.sampled_from("abcdabcdxy"), min_size=1, max_size=3).map("/".join)
data = st.sampled_from([b"", b"x", b"hello", bytes(range(256)) * 20])
file_modes = st.sampled_from([0o644, 0o600, 0o4755, 0o2711, 0o400])
dir_modes = st.sampled_from([0o755, 0o700, 0o1777, 0o2750])
ids = st.sampled_from([0, 1, 1000, 65534])
times = st.integers(1, 2**31 - 1).map(lambda seconds: seconds * 10**9 + seconds % 10**9)
xattr_names = st.sampled_from(["user.a", "user.b", "trusted.c"])
xattr_values = st.sampled_from([b"", b"1", b"value"])
xattr_flags = st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE])


def layers_of(depth: int, *, marks: bool) -> st.SearchStrategy[dict[str, Short]]:
    """Random layers, with whiteouts and opaque directories when they lie over others."""
    leaves = st.one_of(
        st.builds(
            File,
            data,
            mode=file_modes,
            uid=ids,
            mtime_ns=times,
            xattrs=st.dictionaries(xattr_names, xattr_values, max_size=1),
        ),
        st.builds(Symlink, target=paths),
        st.builds(Special),
        *[st.just(Whiteout())] * marks,
    )
    if depth == 0:
        return st.dictionaries(names, leaves, max_size=3)
    opaque = st.sampled_from([None, None, "trusted"]) if marks else st.none()
    children = layers_of(depth - 1, marks=marks)
    directories = st.builds(Dir, children, mode=dir_modes, mtime_ns=times, opaque=opaque)
    return st.dictionaries(names, st.one_of(directories, directories, leaves), max_size=4)


def with_twin(layer: dict[str, Short]) -> Spec:
    """The layer and a file of two names."""
    return {**layer, "x": File(b"twins"), "y": Link("x")}


stacks = st.tuples(st.lists(layers_of(2, marks=True), min_size=1, max_size=3), layers_of(2, marks=False).map(with_twin))


class OpenFile:
    """A handle beside the item of the model that it must show."""

    def __init__(self, handle: Handle, item: Item, *, writes: bool) -> None:
        self.handle, self.item, self.writes = handle, item, writes


class Life(RuleBasedStateMachine):
    """One tree and its model."""

    base: Path

    @initialize(made=stacks)
    def start(self, made: tuple[list[dict[str, Short]], Spec]) -> None:
        above, lowest = made
        layers: list[Spec] = [*above, lowest]
        self.place = Path(tempfile.mkdtemp(dir=self.base))
        self.tree = driver_class("fs")(Stack(self.place / "s", list(layers), {}))
        self.model = Model(flatten(layers))
        self.open_files: list[OpenFile] = []
        self.numbers: dict[Thing, int] = {}
        self.check_tree()

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            try:
                self.check_tree()
                self.tree.remount()
                self.open_files = []
                self.check_tree()
                self.tree.stack.check()
            finally:
                self.tree.close()
                shutil.rmtree(self.place)

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

    @rule(path=paths, content=data, mode=file_modes)
    def create(self, path: str, content: bytes, mode: int) -> None:
        self.both(lambda: self.tree.create(path, content, mode), lambda: self.model.create(path, content, mode))

    @rule(path=paths, mode=dir_modes)
    def mkdir(self, path: str, mode: int) -> None:
        self.both(lambda: self.tree.mkdir(path, mode & ~0o2000), lambda: self.model.mkdir(path, mode & ~0o2000))

    @rule(path=paths, pointing=paths)
    def symlink(self, path: str, pointing: str) -> None:
        self.both(lambda: self.tree.symlink(pointing, path), lambda: self.model.symlink(pointing, path))

    @rule(path=paths, mode=file_modes)
    def mkfifo(self, path: str, mode: int) -> None:
        self.both(lambda: self.tree.mkfifo(path, mode), lambda: self.model.mkfifo(path, mode))

    @rule(old=paths, new=paths)
    def link(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.link(old, new), lambda: self.model.link(old, new))

    # Removing and moving

    @rule(path=paths)
    def unlink(self, path: str) -> None:
        self.both(lambda: self.tree.unlink(path), lambda: self.model.unlink(path))

    @rule(path=paths)
    def rmdir(self, path: str) -> None:
        self.both(lambda: self.tree.rmdir(path), lambda: self.model.rmdir(path))

    @rule(path=paths)
    def remove_tree(self, path: str) -> None:
        self.both(lambda: self.tree.remove_tree(path), lambda: self.model.remove_tree(path))

    @rule(old=paths, new=paths)
    def rename(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.rename(old, new), lambda: self.model.rename(old, new, 0))

    @rule(old=paths, new=paths)
    def rename_noreplace(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.rename(old, new, NOREPLACE), lambda: self.model.rename(old, new, NOREPLACE))

    @rule(old=paths, new=paths)
    def exchange(self, old: str, new: str) -> None:
        self.both(lambda: self.tree.rename(old, new, EXCHANGE), lambda: self.model.rename(old, new, EXCHANGE))

    @rule(path=paths)
    def make_anew(self, path: str) -> None:
        """A directory in the place of whatever was there."""
        self.both(lambda: self.tree.remove_tree(path), lambda: self.model.remove_tree(path))
        self.both(lambda: self.tree.mkdir(path, 0o755), lambda: self.model.mkdir(path, 0o755))

    # Data

    @rule(path=paths, content=data, offset=st.sampled_from([0, 2, 5000]))
    def write(self, path: str, content: bytes, offset: int) -> None:
        if self.regular(path) and content:
            self.both(lambda: self.tree.write(path, content, offset), lambda: self.model.write(path, content, offset))

    @rule(path=paths, size=st.sampled_from([0, 1, 4, 6000]))
    def truncate(self, path: str, size: int) -> None:
        if self.regular(path):
            self.both(lambda: self.tree.truncate(path, size), lambda: self.model.truncate(path, size))

    @rule(path=paths, content=data)
    def replace(self, path: str, content: bytes) -> None:
        if self.regular(path):
            self.both(lambda: self.tree.replace(path, content), lambda: self.model.replace(path, content))

    @rule(path=paths)
    def read(self, path: str) -> None:
        if self.regular(path):
            got, wanted = self.both(lambda: self.tree.read(path), lambda: self.model.read(path))
            assert got == wanted

    # Open files

    @rule(path=paths, writes=st.booleans())
    def open(self, path: str, writes: bool) -> None:
        if self.regular(path) and len(self.open_files) < 4:
            handle = self.tree.open(path, os.O_RDWR if writes else os.O_RDONLY)
            self.open_files.append(OpenFile(handle, self.model.regular(path), writes=writes))

    @precondition(lambda self: self.open_files)
    @rule(which=st.integers(0, 3), content=data, offset=st.sampled_from([0, 3, 4096]))
    def write_open(self, which: int, content: bytes, offset: int) -> None:
        file = self.open_files[which % len(self.open_files)]
        if file.writes and content:
            file.handle.write(content, offset)
            put(file.item, content, offset)

    @precondition(lambda self: self.open_files)
    @rule(which=st.integers(0, 3), size=st.sampled_from([0, 2, 9000]))
    def truncate_open(self, which: int, size: int) -> None:
        file = self.open_files[which % len(self.open_files)]
        if file.writes:
            file.handle.truncate(size)
            file.item.data, file.item.mtime_ns = file.item.data[:size].ljust(size, b"\0"), None

    @precondition(lambda self: self.open_files)
    @rule(which=st.integers(0, 3), mode=file_modes)
    def chmod_open(self, which: int, mode: int) -> None:
        file = self.open_files[which % len(self.open_files)]
        file.handle.chmod(mode)
        file.item.mode = mode

    @precondition(lambda self: self.open_files)
    @rule(which=st.integers(0, 3))
    def close(self, which: int) -> None:
        self.open_files.pop(which % len(self.open_files)).handle.close()

    @invariant()
    def open_files_show_their_data(self) -> None:
        if not hasattr(self, "model"):
            return
        counts = self.link_counts()
        for file in self.open_files:
            found = file.handle.stat()
            assert file.handle.read() == file.item.data
            assert (found.size, modes.S_IMODE(found.mode)) == (len(file.item.data), file.item.mode)
            assert found.nlink == counts.get(id(file.item), 0)

    # Attributes

    @rule(path=paths, mode=file_modes)
    def chmod(self, path: str, mode: int) -> None:
        if not self.is_symlink(path):
            self.both(lambda: self.tree.chmod(path, mode), lambda: self.model.chmod(path, mode))

    @rule(path=paths, uid=ids, gid=ids)
    def chown(self, path: str, uid: int, gid: int) -> None:
        """As the kernel asks for it: the new mode of a file comes along."""
        if not self.is_symlink(path):
            self.both(lambda: self.chown_like_the_kernel(path, uid, gid), lambda: self.model.chown(path, uid, gid))

    def chown_like_the_kernel(self, path: str, uid: int, gid: int) -> None:
        mode = self.tree.stat(path).mode
        self.tree.chown(path, uid, gid)
        if not modes.S_ISDIR(mode):
            self.tree.chmod(path, modes.S_IMODE(mode) & (~0o6000 if mode & 0o010 else ~0o4000))

    @rule(path=paths, mtime_ns=times)
    def utime(self, path: str, mtime_ns: int) -> None:
        self.both(lambda: self.tree.utime(path, mtime_ns, mtime_ns), lambda: self.model.utime(path, mtime_ns))

    @rule(path=paths, name=xattr_names, value=xattr_values, flags=xattr_flags)
    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        if self.carries_user_xattrs(path):
            self.both(
                lambda: self.tree.setxattr(path, name, value, flags),
                lambda: self.model.setxattr(path, name, value, flags),
            )

    @rule(path=paths, name=xattr_names)
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
        """Symlinks and FIFOs carry none, and on them the kernel answers before we are asked."""
        try:
            item = self.model.find(path)
        except OSError:
            return True
        return isinstance(item, Folder) or item.kind == "file"

    # Looking

    @rule(path=paths)
    def look(self, path: str) -> None:
        self.both(lambda: self.tree.stat(path), lambda: self.model.find(path))

    @rule(path=paths)
    def listing(self, path: str) -> None:
        def ideal() -> list[str]:
            folder = self.model.find(path)
            if isinstance(folder, Item):
                raise NotADirectoryError(20, "")
            return sorted(folder.entries)

        got, wanted = self.both(lambda: self.tree.names(path), ideal)
        assert got == wanted

    @rule()
    def look_at_everything(self) -> None:
        self.check_tree()

    # Lives of the mount

    @rule()
    def remount(self) -> None:
        self.forget_open_files()
        self.tree.remount()
        self.check_tree()

    @precondition(lambda self: len(self.tree.stack.lower) < 8)
    @rule()
    def commit(self) -> None:
        """The upper becomes a layer; the numbers of what was new in it are drawn again."""
        self.forget_open_files()
        self.tree.rotate()
        self.numbers = {}
        self.check_tree()

    @precondition(lambda self: len(self.tree.stack.lower) < 8)
    @rule()
    def commit_live(self) -> None:
        """The upper becomes a layer under open files: nothing that anybody can see changes."""
        assert isinstance(self.tree, FsDriver)
        self.tree.reseat()
        self.check_tree()

    def forget_open_files(self) -> None:
        for file in self.open_files:
            file.handle.close()
        self.open_files = []

    # Comparing

    def link_counts(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for _, thing in self.model.paths():
            counts[id(thing)] = counts.get(id(thing), 0) + 1
        return counts

    def check_tree(self) -> None:
        """Every path alike, every number unique and as before."""
        shown, numbers = self.show()
        wanted = self.model.show()
        for path, item in wanted.items():
            if item[5] is None and path in shown:  # a time that the model does not know
                shown[path] = (*shown[path][:5], None, *shown[path][6:])
        assert shown == wanted
        for thing, number in numbers.items():
            assert self.numbers.setdefault(thing, number) == number, "an inode number has changed"
        alive = {thing for _, thing in self.model.paths()}
        self.numbers = {thing: number for thing, number in self.numbers.items() if thing in alive}
        assert len(set(numbers.values())) == len(numbers), "an inode number is used twice"

    def show(self) -> tuple[dict[str, Shown], dict[Thing, int]]:
        """The tree in the model's terms, and the inode number of each thing of the model."""
        found: dict[str, Shown] = {}
        groups: dict[int, list[str]] = {}
        for path in self.walk(""):
            groups.setdefault(self.tree.stat(path).ino, []).append(path)
        numbers: dict[Thing, int] = {}
        for number, group in groups.items():
            for path in group:
                found[path] = self.shown(path, sorted(group))
                numbers[self.model.find(path)] = number
        return found, numbers

    def walk(self, top: str) -> list[str]:
        result = []
        for item in self.tree.scan(top):
            path = f"{top}/{os.fsdecode(item.name)}" if top else os.fsdecode(item.name)
            result.append(path)
            if modes.S_ISDIR(item.kind):
                result += self.walk(path)
        return result

    def shown(self, path: str, group: list[str]) -> Shown:
        found = self.tree.stat(path)
        xattrs = tuple((name, self.tree.getxattr(path, name)) for name in self.tree.listxattr(path))
        owner = modes.S_IMODE(found.mode), found.uid, found.gid
        if modes.S_ISDIR(found.mode):
            return "dir", *owner, None, found.mtime_ns, xattrs, ()
        assert found.nlink == len(group), f"{path}: {found.nlink} links, names {group}"
        if modes.S_ISLNK(found.mode):
            return "symlink", *owner, self.tree.readlink(path).encode(), found.mtime_ns, xattrs, tuple(group)
        if modes.S_ISFIFO(found.mode):
            return "fifo", *owner, b"", found.mtime_ns, xattrs, tuple(group)
        return "file", *owner, self.tree.read(path), found.mtime_ns, xattrs, tuple(group)


def outcome(act: Callable[[], Any]) -> tuple[int | None, Any]:
    """Errno or result."""
    try:
        return None, act()
    except OSError as error:
        return error.errno, None


def machine_settings() -> settings:
    """No deadline, since a life touches a disk; no database, since CI starts from nothing."""
    return settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
    )


@pytest.fixture
def memory(scratch: Path) -> Iterator[Path]:
    """A directory in memory, since lives sync and remount all the time; on the disk if there is none."""
    shared = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="ofs-", dir=shared if shared.is_dir() else scratch))
    yield base
    shutil.rmtree(base)


@pytest.mark.timeout(900)
def test_lives(memory: Path) -> None:
    need_root()
    Life.base = memory
    machine = seed(int(SEED))(Life) if SEED is not None else Life
    umask = os.umask(0)
    try:
        run_state_machine_as_test(machine, settings=machine_settings())
    finally:
        os.umask(umask)
