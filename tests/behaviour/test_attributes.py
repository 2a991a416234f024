"""Attributes: numbers, link counts, sizes, times, and what stays the same over copy-up, rename and remount."""

import os
import stat
from collections.abc import Callable

import pytest

from tests.support.drivers import Tree
from tests.support.dump import dump
from tests.support.spec import Dir, File, Link, Special, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

LAYER: Spec = {
    "f": "1", "d": {"g": "2", "s": {"h": "3"}}, "l": Symlink(target="f"), "p": Special(kind="p"), "twin": Link("f"),
}  # fmt: skip


def numbers(tree: Tree) -> dict[bytes, int]:
    return {path: tree.stat(path).ino for path in dump(tree)}


def test_numbers_are_unique(stack: StackMaker) -> None:
    tree = stack({"d": {"x": "x"}, "a": "a"}, {"d": {"y": "y"}, "b": {"d": {}}}, upper={"u": {"v": ""}})
    found = numbers(tree)
    assert len(set(found.values())) == len(found)


def test_numbers_stay_over_copy_up(stack: StackMaker) -> None:
    tree = stack(LAYER)
    before = numbers(tree)
    tree.write("f", b"x")
    tree.chmod("d/s", 0o700)
    tree.chown("l", 1, 1)
    tree.chmod("p", 0o600)
    tree.create("d/s/new", b"")
    tree.unlink("d/s/new")
    tree.write("d/g", b"x")
    assert numbers(tree) == before
    tree.remount()
    assert numbers(tree) == before


def test_numbers_stay_over_rename(stack: StackMaker) -> None:
    tree = stack(LAYER, {"d": {"below": ""}})
    before = numbers(tree)
    tree.rename("d", "moved")
    tree.rename("f", "moved/f")
    wanted = {path.replace(b"d", b"moved", 1) if path.startswith(b"d") else path: ino for path, ino in before.items()}
    wanted[b"moved/f"] = wanted.pop(b"f")
    assert numbers(tree) == wanted
    tree.remount()
    assert numbers(tree) == wanted


def test_numbers_of_new_objects_stay_over_remount(stack: StackMaker) -> None:
    tree = stack(LAYER)
    tree.create("new", b"")
    tree.mkdir("d/dir")
    tree.symlink("x", "d/dir/l")
    before = numbers(tree)
    tree.remount()
    assert numbers(tree) == before


@pytest.mark.on("plain", "fs", "fuse")
def test_numbers_stay_over_a_commit(stack: StackMaker) -> None:
    """For every object of a layer. Not on the kernel: to it a file copied up by a former upper is a new one."""
    tree = stack(LAYER)
    tree.write("f", b"changed")
    tree.chmod("d/s", 0o711)
    tree.rename("d/g", "moved")
    before = numbers(tree)
    tree.create("d/new", b"")
    tree.rotate()
    after = numbers(tree)
    del after[b"d/new"]
    assert after == before


@pytest.mark.on("plain", "fs", "fuse")
def test_numbers_stay_when_only_metadata_of_a_committed_file_changes(stack: StackMaker) -> None:
    tree = stack({"f": "1"})
    tree.write("f", b"2")
    before = tree.stat("f").ino
    for mode in (0o600, 0o640, 0o644):
        tree.rotate()
        tree.chmod("f", mode)
        assert tree.stat("f").ino == before
        tree.remount()
        assert tree.stat("f").ino == before


@pytest.mark.on("plain", "fs", "fuse")
def test_numbers_of_committed_twins_stay(stack: StackMaker) -> None:
    tree = stack(LAYER)
    tree.setxattr("f", "user.k", b"v")
    tree.rotate()
    before = numbers(tree)
    tree.write("f", b"changed")
    assert numbers(tree) == before
    tree.remount()
    assert numbers(tree) == before


@pytest.mark.on("plain", "fuse", "kernel")
def test_one_device_for_the_mount(stack: StackMaker) -> None:
    tree = stack(LAYER, {"d": {"x": ""}, "other": ""}, upper={"u": ""})
    root = os.fsencode(tree.stack.mountpoint)
    found = {os.lstat(os.path.join(root, path)).st_dev for path in dump(tree)}
    assert len(found) == 1


@pytest.mark.deviates("kernel", reason="merged directories always have one link")
def test_directories_count_their_subdirectories_or_show_one_link(stack: StackMaker) -> None:
    tree = stack({"d": {"a": {}, "b": {}, "f": ""}}, {"d": {"b": {}, "c": {}}})
    counted = tree.stat("d").nlink != 1
    assert tree.stat("d").nlink == 5 or not counted
    tree.rmdir("d/a")
    tree.mkdir("d/x")
    tree.mkdir("d/y")
    tree.rename("d/y", "y")
    assert tree.stat("d").nlink == (5 if counted else 1)
    tree.remount()
    assert tree.stat("d").nlink == (5 if counted else 1)
    assert counted or tree.name != "kernel", "the kernel's choice is allowed, and known"


def test_link_counts_of_files(stack: StackMaker) -> None:
    tree = stack(LAYER)
    assert tree.stat("f").nlink == 2
    tree.link("f", "third")
    assert tree.stat("twin").nlink == 3
    tree.unlink("twin")
    assert tree.stat("f").nlink == 2


def test_setting_times(stack: StackMaker) -> None:
    tree = stack(LAYER)
    for path in ("f", "d", "l", "p"):
        tree.utime(path, 1_111_111_111_222_222_222, 1_333_333_333_444_444_444)
        found = tree.stat(path)
        assert (found.atime_ns, found.mtime_ns) == (1_111_111_111_222_222_222, 1_333_333_333_444_444_444)
    tree.remount()
    assert tree.stat("l").mtime_ns == 1_333_333_333_444_444_444


def test_writing_moves_mtime_and_ctime(stack: StackMaker) -> None:
    tree = stack(LAYER)
    before = tree.stat("d/g")
    tree.write("d/g", b"x")
    after = tree.stat("d/g")
    assert after.mtime_ns > before.mtime_ns and after.ctime_ns > before.ctime_ns


def test_changing_metadata_moves_only_ctime(stack: StackMaker) -> None:
    tree = stack(LAYER)
    for path in ("f", "d"):
        changes: list[Callable[[str], None]] = [
            lambda path: tree.chmod(path, 0o700),
            lambda path: tree.chown(path, 1, 1),
            lambda path: tree.setxattr(path, "user.x", b""),
        ]
        for change in changes:
            before = tree.stat(path)
            change(path)
            after = tree.stat(path)
            assert after.mtime_ns == before.mtime_ns
            assert after.ctime_ns > before.ctime_ns


def test_truncating_to_the_same_size_moves_mtime(stack: StackMaker) -> None:
    tree = stack({"f": "1234"})
    before = tree.stat("f").mtime_ns
    tree.truncate("f", 4)
    assert tree.stat("f").mtime_ns > before


def test_chown_of_one_id(stack: StackMaker) -> None:
    tree = stack({"f": File(uid=5, gid=6)})
    tree.chown("f", -1, 9)
    assert (tree.stat("f").uid, tree.stat("f").gid) == (5, 9)
    tree.chown("f", 8, -1)
    assert (tree.stat("f").uid, tree.stat("f").gid) == (8, 9)
    before = tree.stat("f")
    tree.chown("f", -1, -1)
    assert (tree.stat("f").uid, tree.stat("f").gid) == (before.uid, before.gid)


@pytest.mark.parametrize("owner", [0, 1], ids=["same", "other"])
def test_chown_clears_set_id_bits_of_all_but_directories(stack: StackMaker, owner: int) -> None:
    """A chown by root as well, and one that changes no owner."""
    tree = stack({"f": File(mode=0o6755), "p": Special(kind="p", mode=0o6755), "d": Dir(mode=0o6755)})
    for _ in ("in the layer", "in the upper"):
        for path in ("f", "p", "d"):
            tree.chmod(path, 0o6755)
            tree.chown(path, owner, owner)
        assert [tree.mode(path) for path in ("f", "p", "d")] == [0o755, 0o755, 0o6755]


def test_chmod_of_every_type_and_bit(stack: StackMaker) -> None:
    tree = stack({"f": "", "d": {}, "p": Special(kind="p"), "c": Special(kind="c", major=1, minor=3)})
    for path in ("f", "d", "p", "c"):
        kind = stat.S_IFMT(tree.stat(path).mode)
        for mode in (0o7777, 0o0, 0o4700, 0o2070, 0o1007, 0o644):
            tree.chmod(path, mode)
            assert tree.stat(path).mode == kind | mode


def test_sizes_and_blocks(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * 100_000)})
    assert tree.stat("f").blocks * 512 >= 100_000
    tree.chmod("f", 0o600)
    assert (tree.stat("f").size, tree.stat("f").blocks * 512 >= 100_000) == (100_000, True)


def test_the_root_has_attributes_of_its_own(stack: StackMaker) -> None:
    tree = stack(Dir({"f": ""}, mode=0o755, uid=1), upper=Dir({}, mode=0o711, uid=2, gid=3, xattrs={"user.r": b"u"}))
    found = tree.stat("")
    assert (found.mode & 0o7777, found.uid, found.gid) == ((0o711, 2, 3) if tree.name != "plain" else (0o755, 0, 0))
    tree.chmod("", 0o750)
    tree.chown("", 7, 8)
    tree.setxattr("", "user.s", b"set")
    tree.remount()
    found = tree.stat("")
    assert (found.mode & 0o7777, found.uid, found.gid) == (0o750, 7, 8)
    assert tree.getxattr("", "user.s") == b"set"


def test_statfs_is_of_the_upper(stack: StackMaker) -> None:
    tree = stack(LAYER)
    found = tree.statvfs()
    real = os.statvfs(tree.stack.base)
    assert (found.f_namemax, found.f_bsize, found.f_blocks) == (255, real.f_bsize, real.f_blocks)
