"""Copy-up: whatever the cause, all attributes and the content of the object stay the same."""

import os
from collections.abc import Callable
from errno import ENODATA
from typing import Any

import pytest

from tests.support.acl import ACCESS, DEFAULT, acl
from tests.support.drivers import Tree
from tests.support.dump import differences, dump
from tests.support.spec import Dir, File, Link, Short, Special, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
XATTRS = {"user.k": b"v\0w", "trusted.t": b"\xff", "security.capability": CAPABILITY, "user.empty": b""}
ODD: dict[str, Any] = {
    "uid": 12345,
    "gid": 54321,
    "mtime_ns": 1_234_567_890_123_456_789,
    "atime_ns": 987_654_321_012_345_678,
}


def every_type() -> dict[str, Short]:
    return {
        "file": File(
            b"content " * 1000, mode=0o6751, xattrs={**XATTRS, ACCESS: acl(7, 5, 1, users={77: 4}, mask=5)}, **ODD
        ),
        "empty": File(mode=0o000, **ODD),
        "sparse": File(pieces=((1 << 20, b"middle"), (3 << 20, b"end")), size=(5 << 20) + 13, mode=0o600, **ODD),
        "dir": Dir(
            {"child": "c"}, mode=0o3751, xattrs={"user.k": b"v", DEFAULT: acl(7, 5, 0), "trusted.t": b"1"}, **ODD
        ),
        "symlink": Symlink(target="some/where", xattrs={"trusted.t": b"link"}, **ODD),
        "fifo": Special(kind="p", mode=0o1640, xattrs={"trusted.t": b"p"}, **ODD),
        "socket": Special(kind="s", mode=0o600, **ODD),
        "char": Special(kind="c", major=5, minor=1, mode=0o620, **ODD),
        "block": Special(kind="b", major=7, minor=513, mode=0o660, **ODD),
    }


def copy_up_by_link(tree: Tree, path: str) -> None:
    tree.link(path, path + ".2")
    tree.unlink(path + ".2")


def copy_up_by_rename(tree: Tree, path: str) -> None:
    tree.rename(path, path + ".2")
    tree.rename(path + ".2", path)


def copy_up_by_chown(tree: Tree, path: str) -> None:
    found = tree.stat(path)
    tree.chown(path, found.uid, found.gid)
    if path != "symlink":
        tree.chmod(path, found.mode & 0o7777)


def copy_up_by_utime(tree: Tree, path: str) -> None:
    found = tree.stat(path)
    tree.utime(path, found.atime_ns, found.mtime_ns)


def copy_up_by_xattr(tree: Tree, path: str) -> None:
    tree.setxattr(path, "trusted.passing", b"")
    tree.removexattr(path, "trusted.passing")


def copy_up_by_open(tree: Tree, path: str) -> None:
    if path in ("file", "empty", "sparse"):
        tree.open(path, os.O_RDWR).close()


def copy_up_by_growing(tree: Tree, path: str) -> None:
    if path in ("file", "sparse"):
        found = tree.stat(path)
        tree.truncate(path, found.size + 1)
        tree.truncate(path, found.size)
        tree.chmod(path, found.mode & 0o7777)
        if path == "file":
            tree.setxattr(path, "security.capability", CAPABILITY)
        tree.utime(path, found.atime_ns, found.mtime_ns)


def copy_up_by_child(tree: Tree, path: str) -> None:
    if path == "dir":
        found = tree.stat(path)
        tree.create("dir/new", b"")
        tree.unlink("dir/new")
        tree.utime(path, found.atime_ns, found.mtime_ns)


LIFTS: dict[str, Callable[[Tree, str], None]] = {
    name.removeprefix("copy_up_by_"): function for name, function in globals().items() if name.startswith("copy_up_by_")
}


@pytest.mark.parametrize("way", LIFTS)
def test_everything_is_kept(stack: StackMaker, way: str) -> None:
    tree = stack(every_type())
    before = dump(tree)
    numbers = {path: tree.stat(path).ino for path in before}
    access = {path: tree.stat(path).atime_ns for path in ("fifo", "char", "socket")}
    for path in every_type():
        if way == "link" and path == "dir":
            continue
        if way == "chown" and path == "file":
            continue
        LIFTS[way](tree, path)
    before[b""] = before[b""]._replace(mtime_ns=tree.stat("").mtime_ns)
    assert not differences(before, dump(tree))
    assert {path: tree.stat(path).ino for path in before} == numbers
    assert {path: tree.stat(path).atime_ns for path in access} == access
    tree.remount()
    assert not differences(before, dump(tree))
    assert {path: tree.stat(path).ino for path in before} == numbers


def test_a_parent_keeps_its_times_when_a_child_is_copied_up(stack: StackMaker) -> None:
    tree = stack({"a": Dir({"b": Dir({"f": "x"}, **ODD)}, **ODD)})
    tree.write("a/b/f", b"y")
    tree.chmod("a/b/f", 0o600)
    for path in ("a", "a/b"):
        found = tree.stat(path)
        assert (found.mtime_ns, found.uid, found.gid) == (ODD["mtime_ns"], ODD["uid"], ODD["gid"])
    tree.remount()
    assert tree.stat("a/b").mtime_ns == ODD["mtime_ns"]


def test_writing_changes_only_what_it_writes(stack: StackMaker) -> None:
    data = bytes(range(256)) * 4096
    tree = stack({"f": File(data)})
    tree.write("f", b"HERE", offset=500_000)
    wanted = data[:500_000] + b"HERE" + data[500_004:]
    assert tree.read("f") == wanted
    tree.remount()
    assert tree.read("f") == wanted


def test_writing_past_the_end_leaves_zeros(stack: StackMaker) -> None:
    tree = stack({"f": "abc"})
    tree.write("f", b"end", offset=10_000)
    assert tree.read("f") == b"abc" + bytes(9_997) + b"end"


@pytest.mark.parametrize("size", [0, 1, 4096, 99_999, 100_000, 100_001, 300_000])
def test_truncating(stack: StackMaker, size: int) -> None:
    data = os.urandom(100_000)
    tree = stack({"f": File(data)})
    tree.truncate("f", size)
    wanted = data[:size] + bytes(max(0, size - len(data)))
    assert tree.stat("f").size == size
    assert tree.read("f") == wanted
    tree.remount()
    assert tree.read("f") == wanted


def test_truncating_down_and_up_brings_no_old_data_back(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * 50_000)})
    tree.truncate("f", 10)
    tree.truncate("f", 50_000)
    assert tree.read("f") == b"x" * 10 + bytes(49_990)


def test_opening_with_truncation(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * 50_000, mode=0o640, uid=3, gid=4, xattrs={"user.k": b"v"})})
    tree.replace("f", b"new")
    found = tree.stat("f")
    assert tree.read("f") == b"new"
    assert (found.mode & 0o7777, found.uid, found.gid) == (0o640, 3, 4)
    assert tree.getxattr("f", "user.k") == b"v"


def test_holes_are_kept(stack: StackMaker) -> None:
    tree = stack({"f": File(pieces=((8 << 20, b"x"),), size=16 << 20)})
    tree.write("f", b"y", offset=4 << 20)
    found = tree.stat("f")
    assert found.size == 16 << 20
    assert found.blocks * 512 < 4 << 20
    tree.remount()
    assert tree.stat("f").blocks * 512 < 4 << 20


@pytest.mark.parametrize("change", ["chmod", "chown", "utime", "setxattr", "rename", "link"])
def test_a_change_of_metadata_keeps_the_content(stack: StackMaker, change: str) -> None:
    data = os.urandom(200_000)
    tree = stack({"f": File(data)})
    match change:
        case "chmod":
            tree.chmod("f", 0o600)
        case "chown":
            tree.chown("f", 1, 2)
        case "utime":
            tree.utime("f", 1, 2)
        case "setxattr":
            tree.setxattr("f", "user.k", b"v")
        case "rename":
            tree.rename("f", "g")
        case "link":
            tree.link("f", "g")
    name = "g" if change == "rename" else "f"
    before = tree.stat(name)
    assert before.size == 200_000
    assert before.blocks * 512 >= 200_000
    assert tree.read(name) == data
    tree.remount()
    assert tree.read(name) == data
    tree.write(name, b"W", offset=100_000)
    assert tree.read(name) == data[:100_000] + b"W" + data[100_001:]
    assert tree.stat(name).ino == before.ino
    tree.remount()
    assert tree.read(name) == data[:100_000] + b"W" + data[100_001:]


def test_reading_copies_nothing_up(stack: StackMaker) -> None:
    tree = stack(every_type())
    dump(tree)
    tree.removexattr("file", "user.missing", err=ENODATA)
    tree.open("file", os.O_RDONLY).close()
    if tree.name != "plain":
        assert tree.stack.upper is not None
        assert os.listdir(tree.stack.upper) == []


@pytest.mark.on("fs", "fuse", "kernel")
def test_removing_reads_no_data(stack: StackMaker) -> None:
    tree = stack({"d": {"f": File(b"x" * 4096)}})
    tree.unlink("d/f")
    assert tree.stack.upper is not None
    left = os.lstat(tree.stack.upper / "d" / "f")
    assert left.st_rdev == 0 and left.st_size == 0


def test_copy_up_from_the_lowest_of_many_layers(stack: StackMaker) -> None:
    layers: list[Spec] = [{"d": Dir({f"{n}": str(n)}, mode=0o700 + n)} for n in range(8)]
    tree = stack(*layers)
    tree.write("d/7", b"X")
    assert tree.mode("d") == 0o700
    assert tree.names("d") == [str(n) for n in range(8)]
    tree.remount()
    assert tree.read("d/7") == b"X"
    assert tree.mode("d") == 0o700


def test_a_twin_is_copied_with_all_its_metadata(stack: StackMaker) -> None:
    layer: Spec = {"a": File(b"data", mode=0o4755, xattrs=XATTRS, **ODD), "b": Link("a")}
    tree = stack(layer)
    before = dump(tree)
    copy_up_by_utime(tree, "a")
    tree.remount()
    before[b""] = before[b""]._replace(mtime_ns=tree.stat("").mtime_ns)
    assert not differences(before, dump(tree))


def test_times_before_1970_and_far_ahead(stack: StackMaker) -> None:
    tree = stack({"past": File(mtime_ns=-1_000_000_001), "future": File(mtime_ns=4_000_000_000_000_000_001)})
    for path in ("past", "future"):
        before = tree.stat(path).mtime_ns
        tree.chmod(path, 0o600)
        assert tree.stat(path).mtime_ns == before
    tree.utime("past", -5_000_000_007, -6_000_000_008)
    assert tree.stat("past").mtime_ns == -6_000_000_008


def test_the_access_time_is_copied(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x", **ODD)})
    tree.chmod("f", 0o600)
    assert tree.stat("f").atime_ns == ODD["atime_ns"]


def test_large_ids(stack: StackMaker) -> None:
    tree = stack({"f": File(uid=4_000_000_000, gid=3_000_000_000)})
    tree.write("f", b"x")
    assert (tree.stat("f").uid, tree.stat("f").gid) == (4_000_000_000, 3_000_000_000)
    tree.chown("f", 4_294_967_294, 2_147_483_648)
    assert (tree.stat("f").uid, tree.stat("f").gid) == (4_294_967_294, 2_147_483_648)
