"""Holes, ranges, unnamed files, flags and births, as on local file systems: only the kernel engine supports these."""

import array
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import EEXIST, EINVAL, ENOENT, ENOTTY, ENXIO, EOPNOTSUPP, EPERM
from functools import partial
from pathlib import Path

import pytest

from tests.support import syscalls
from tests.support.acl import ACCESS, DEFAULT, acl
from tests.support.disks import disk
from tests.support.drivers import Tree
from tests.support.drivers.posix import PosixHandle
from tests.support.outcome import errno_of
from tests.support.spec import Dir, File
from tests.support.stacks import StackMaker
from tests.support.syscalls import COLLAPSE_RANGE, INSERT_RANGE, KEEP_SIZE, PUNCH_HOLE, UNSHARE_RANGE, ZERO_RANGE
from tests.support.users import ALICE, User

pytestmark = [pytest.mark.on("plain", "fuse", "kernel"), pytest.mark.engine("kernel")]

MIB = 1 << 20
GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
NODUMP, APPEND_ONLY = 0x40, 0x20

SPARSE = File(pieces=((MIB, b"x" * 4096), (3 * MIB, b"y" * 4096)), size=4 * MIB)


def descriptor(tree: Tree, path: str, flags: int = os.O_RDONLY) -> int:
    handle = tree.open(path, flags)
    assert isinstance(handle, PosixHandle)
    return handle.fd


def map_of(fd: int) -> list[tuple[int, int]]:
    """The extents of data, as (begin, end)."""
    found: list[tuple[int, int]] = []
    end = 0
    while True:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != ENXIO:
                raise
            return found
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, end))


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """Within this context flags may be set that protect against changes."""
    try:
        yield
    finally:
        with open(path, "rb") as file:
            set_flags(file.fileno(), 0)


def get_flags(fd: int) -> int:
    value = array.array("i", [0, 0])
    fcntl.ioctl(fd, GETFLAGS, value)
    return value[0]


def set_flags(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, SETFLAGS, array.array("i", [flags, 0]))


# --- holes -----------------------------------------------------------------------------------------------


def test_data_and_holes_are_found(stack: StackMaker) -> None:
    tree = stack({"f": SPARSE, "full": File(b"x" * 8192), "empty": ""})
    data = [(MIB, MIB + 4096), (3 * MIB, 3 * MIB + 4096)]
    fd = descriptor(tree, "f")
    assert map_of(fd) == data
    assert os.lseek(fd, MIB + 10, os.SEEK_DATA) == MIB + 10
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    assert map_of(descriptor(tree, "full")) == [(0, 8192)]
    assert map_of(descriptor(tree, "empty")) == []
    assert errno_of(os.lseek, fd, 4 * MIB, os.SEEK_DATA) == ENXIO
    assert errno_of(os.lseek, fd, 5 * MIB, os.SEEK_HOLE) == ENXIO
    tree.write("f", b"z", 2 * MIB)
    if tree.name != "kernel":  # its copy-up looks for holes by the megabyte
        assert map_of(descriptor(tree, "f")) == [data[0], (2 * MIB, 2 * MIB + 4096), data[1]]


# --- fallocate -------------------------------------------------------------------------------------------


def _modes() -> dict[str, tuple[int, int, int]]:
    return {
        "allocate": (0, 0, 100_000),
        "beyond the end": (KEEP_SIZE, 60_000, 100_000),
        "punch": (PUNCH_HOLE | KEEP_SIZE, 4096, 8192),
        "punch in part of a page": (PUNCH_HOLE | KEEP_SIZE, 5000, 100),
        "zero": (ZERO_RANGE, 40_000, 20_000),
        "zero and keep the size": (ZERO_RANGE | KEEP_SIZE, 40_000, 20_000),
    }


@pytest.mark.parametrize("what", _modes())
def test_fallocate(stack: StackMaker, what: str) -> None:
    """From a layer and from the upper; the size, the content and the space are those of a plain file."""
    content = bytes(range(256)) * 200
    tree = stack({"f": File(content), "d": {}}, upper=Dir({"u": File(content)}))
    mode, offset, length = _modes()[what]
    expected = bytearray(content)
    if mode & (PUNCH_HOLE | ZERO_RANGE):
        end = min(offset + length, len(content)) if mode & KEEP_SIZE else offset + length
        expected[offset:end] = bytes(end - offset)
    elif not mode & KEEP_SIZE:
        expected += bytes(max(0, offset + length - len(content)))
    for name in ("f", "u"):
        fd = descriptor(tree, name, os.O_RDWR)
        assert os.pread(fd, len(content), 0) == content
        syscalls.fallocate(fd, mode, offset, length)
        assert os.pread(fd, MIB, 0) == expected == tree.read(name)
        assert os.fstat(fd).st_size == len(expected)
    tree.remount()
    assert tree.read("f") == tree.read("u") == expected


def test_fallocate_of_ranges_that_move_is_refused(stack: StackMaker) -> None:
    """FUSE does not support them; a local file system may."""
    tree = stack({"f": File(b"x" * 16384)})
    fd = descriptor(tree, "f", os.O_RDWR)
    for mode in (COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE):
        found = errno_of(syscalls.fallocate, fd, mode, 4096, 4096)
        assert found == EOPNOTSUPP or tree.name in ("plain", "kernel")
    assert tree.name in ("plain", "kernel") or tree.read("f") == b"x" * 16384


# --- copies ----------------------------------------------------------------------------------------------


def test_copying_ranges(stack: StackMaker) -> None:
    content = os.urandom(3 * MIB)
    tree = stack({"from": File(content), "to": File(b"old" * 1000)})
    source, target = descriptor(tree, "from"), descriptor(tree, "to", os.O_RDWR)
    assert os.pread(target, 5, 0) == b"oldol"
    assert os.copy_file_range(source, target, 1000, 500, 100) == 1000
    expected = bytearray(b"old" * 1000)
    expected[100:1100] = content[500:1500]
    assert tree.read("to") == os.pread(target, MIB, 0) == expected
    done = 0
    while done < len(content):
        done += os.copy_file_range(source, target, len(content) - done, done, done)
    assert tree.read("to") == content
    assert os.copy_file_range(source, target, 10, len(content), 0) == 0
    assert errno_of(os.copy_file_range, target, target, 100, 0, 50) == EINVAL


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_copies_share_blocks_where_the_disk_can(stack: StackMaker, place: Path, kind: str) -> None:
    with disk(kind, place / "disk") as base:
        tree = stack({"from": File(b"x" * 32 * MIB)}, base=base)
        source, target = descriptor(tree, "from"), descriptor(tree, "to", os.O_RDWR | os.O_CREAT)
        os.sync()
        before = os.statvfs(base).f_bfree
        done = 0
        while done < 32 * MIB:
            done += os.copy_file_range(source, target, 32 * MIB - done, done, done)
        os.fsync(target)
        os.sync()
        used = (before - os.statvfs(base).f_bfree) * os.statvfs(base).f_frsize
        assert used < 8 * MIB
        assert tree.read("to") == b"x" * 32 * MIB
        tree.close()
        tree.stack.check()
        stack.trees.clear()


# --- files without a name --------------------------------------------------------------------------------


def unnamed(tree: Tree, directory: str, mode: int = 0o644) -> int:
    path = tree.stack.mountpoint / directory
    return os.open(path, os.O_TMPFILE | os.O_RDWR, mode)


def link_fd(tree: Tree, fd: int, path: str) -> None:
    syscalls.link_descriptor(fd, os.fsencode(tree.stack.mountpoint / path))


def test_unnamed_files(stack: StackMaker) -> None:
    tree = stack({"d": {"old": "1"}})
    fd = unnamed(tree, "d", 0o640)
    found = os.fstat(fd)
    assert (found.st_nlink, stat.S_IMODE(found.st_mode), found.st_size) == (0, 0o640, 0)
    os.write(fd, b"content")
    assert tree.names("d") == ["old"]
    assert os.pread(fd, 100, 0) == b"content"
    os.close(fd)
    tree.remount()
    assert tree.names("d") == ["old"]


def test_unnamed_files_get_a_name(stack: StackMaker) -> None:
    tree = stack({"d": {"old": "1"}})
    fd = unnamed(tree, "d")
    os.write(fd, b"content")
    assert errno_of(link_fd, tree, fd, "d/old") == EEXIST
    assert errno_of(link_fd, tree, fd, "none/x") == ENOENT
    link_fd(tree, fd, "d/new")
    assert os.fstat(fd).st_nlink == tree.stat("d/new").nlink == 1
    os.write(fd, b" more")
    link_fd(tree, fd, "twin")
    assert os.fstat(fd).st_nlink == 2
    assert os.fstat(fd).st_ino == tree.stat("twin").ino == tree.stat("d/new").ino
    os.close(fd)
    tree.remount()
    assert tree.read("d/new") == tree.read("twin") == b"content more"
    assert tree.stat("d/new").nlink == 2


def test_an_unnamed_file_may_be_kept_unnamed(stack: StackMaker) -> None:
    tree = stack({"d": {}})
    fd = os.open(tree.stack.mountpoint / "d", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    assert errno_of(link_fd, tree, fd, "d/new") == ENOENT
    os.close(fd)


def test_what_unnamed_files_inherit(stack: StackMaker) -> None:
    """The group of a set-gid directory, and its default ACL instead of the umask."""
    entries = {DEFAULT: acl(7, 5, 0, users={1234: 6}, mask=7)}
    tree = stack({
        "group": Dir({}, mode=0o2777, gid=77),
        "acl": Dir({}, mode=0o777, xattrs=entries),
        "plain": Dir({}, mode=0o777),
    })  # fmt: skip
    masked = User(ALICE.uid, ALICE.gid, umask=0o027)

    def look(directory: str) -> tuple[int, int, int, bool]:
        fd = unnamed(tree, directory, 0o666)
        found = os.fstat(fd)
        return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), ACCESS in os.listxattr(fd)

    assert tree.run_as(masked, lambda: look("plain")) == (1000, 1000, 0o640, False)
    assert tree.run_as(masked, lambda: look("group")) == (1000, 77, 0o640, False)
    assert tree.run_as(masked, lambda: look("acl")) == (1000, 1000, 0o660, True)


# --- default ACLs and the umask --------------------------------------------------------------------------


def test_a_default_acl_takes_precedence_over_the_umask(stack: StackMaker) -> None:
    entries = {DEFAULT: acl(7, 7, 5, users={1234: 6}, mask=7)}
    tree = stack({"d": Dir({}, mode=0o777, xattrs=entries), "p": Dir({}, mode=0o777)})
    masked = User(ALICE.uid, ALICE.gid, umask=0o077)

    def make(directory: str) -> None:
        tree.create(f"{directory}/f", mode=0o666)
        tree.mkdir(f"{directory}/d", 0o777)
        tree.mkfifo(f"{directory}/p", 0o666)

    for directory in ("d", "p"):
        tree.run_as(masked, partial(make, directory))
    assert [oct(tree.mode(f"d/{name}")) for name in "fdp"] == ["0o664", "0o775", "0o664"]
    assert [oct(tree.mode(f"p/{name}")) for name in "fdp"] == ["0o600", "0o700", "0o600"]


# --- births, flags, durability ---------------------------------------------------------------------------


def test_births(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "1"}})
    tree.create("new")
    tree.mkdir("dir")
    for path in ("new", "dir"):
        fd = descriptor(tree, path)
        born = syscalls.birth_time(fd)
        assert born is not None
        tree.utime(path, 5, 5)
        tree.chmod(path, 0o700)
        assert syscalls.birth_time(fd) == born
    assert syscalls.birth_time(descriptor(tree, "d/f")) is not None


def test_flags(stack: StackMaker) -> None:
    """chattr and lsattr: reading copies nothing up, setting does."""
    tree = stack({"f": "1", "d": {"g": "2"}}, upper=Dir({"u": "3"}))
    for path in ("f", "d", "u"):
        fd = descriptor(tree, path)
        before = get_flags(fd)
        assert not before & NODUMP
        set_flags(fd, before | NODUMP)
        assert get_flags(descriptor(tree, path)) & NODUMP
    tree.remount()
    assert get_flags(descriptor(tree, "f")) & NODUMP
    assert tree.read("f") == b"1" and tree.names("d") == ["g"]


@pytest.mark.on("plain", "fuse")  # the kernel's overlay answers EOPNOTSUPP to the flag
def test_flags_protect(stack: StackMaker) -> None:
    tree = stack({}, upper=Dir({"u": "3"}))
    fd = descriptor(tree, "u")
    with removed(tree.stack.mountpoint / "u"):
        set_flags(fd, APPEND_ONLY)
        tree.unlink("u", err=EPERM)
        tree.replace("u", b"x", err=EPERM)
    tree.unlink("u")


def test_only_the_owner_may_change_flags(stack: StackMaker) -> None:
    tree = stack({"f": File(b"1", mode=0o666)})
    path = tree.stack.mountpoint / "f"

    def attempt() -> int | None:
        fd = os.open(path, os.O_RDWR)
        return errno_of(set_flags, fd, NODUMP)

    assert tree.run_as(ALICE, attempt) in (EPERM, 13)
    assert not get_flags(descriptor(tree, "f")) & NODUMP


def test_other_ioctls_are_unknown(stack: StackMaker) -> None:
    tree = stack({"f": "1"})
    assert errno_of(fcntl.ioctl, descriptor(tree, "f"), 0x5401, bytearray(64)) == ENOTTY


def test_directories_are_synced(stack: StackMaker) -> None:
    tree = stack({"d": {"s": {}}})
    tree.create("d/s/new")
    for path in ("d/s", "d", ""):
        os.fsync(descriptor(tree, path))
    syscalls.syncfs(descriptor(tree, ""))


# --- large requests, many at once ------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
def test_large_reads_and_writes(stack: StackMaker, direct: int) -> None:
    content = os.urandom(4 * MIB)
    tree = stack({"f": File(content)})
    buffer = mmap.mmap(-1, len(content))
    fd = descriptor(tree, "f", os.O_RDWR | direct)
    assert os.preadv(fd, [buffer], 0) == len(content) and buffer[:] == content
    buffer[:] = content[::-1]
    assert os.pwritev(fd, [buffer], 0) == len(content)
    assert tree.read("f") == content[::-1]


@pytest.mark.on("plain", "fuse")
def test_many_in_one_directory(stack: StackMaker) -> None:
    """Made, listed and removed by several at once (parallel directory operations)."""
    tree = stack({"d": {f"old{number}": "" for number in range(50)}})
    here = tree.stack.mountpoint / "d"

    def work(own: int) -> None:
        for number in range(50):
            (here / f"{own}.{number}").touch()
            os.listdir(here)
            if number % 2:
                os.unlink(here / f"{own}.{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(tree.names("d")) == 50 + 4 * 25
