"""Merging and lookup: which layer gives a name."""

import os
from errno import ENOENT, ENOTDIR

import pytest

from tests.support.spec import Dir, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker


def test_the_first_layer_that_has_a_name_decides(stack: StackMaker) -> None:
    tree = stack({"f": "one"}, {"f": "two", "g": "two"}, {"f": "three", "g": "three", "h": "three"})
    assert [tree.read(name) for name in "fgh"] == [b"one", b"two", b"three"]


def test_the_upper_is_on_top(stack: StackMaker) -> None:
    tree = stack({"f": "lower"}, upper={"f": "upper"})
    assert tree.read("f") == b"upper"


def test_directories_merge(stack: StackMaker) -> None:
    tree = stack({"d": {"a": "1", "s": {"x": "1"}}}, {"d": {"b": "2", "s": {"y": "2"}}}, {"d": {"c": "3"}})
    assert tree.names("d") == ["a", "b", "c", "s"]
    assert tree.names("d/s") == ["x", "y"]


def test_a_file_hides_a_directory_below(stack: StackMaker) -> None:
    tree = stack({"n": "file"}, {"n": {"x": "below"}})
    assert tree.read("n") == b"file"
    tree.stat("n/x", err=ENOTDIR)


def test_a_directory_hides_a_file_below_and_all_under_it(stack: StackMaker) -> None:
    tree = stack({"n": {"top": ""}}, {"n": "file"}, {"n": {"bottom": ""}})
    assert tree.names("n") == ["top"]
    tree.stat("n/bottom", err=ENOENT)


def test_an_absent_name(stack: StackMaker) -> None:
    tree = stack({"d": {}})
    tree.stat("nothing", err=ENOENT)
    tree.stat("d/nothing", err=ENOENT)
    tree.stat("nothing/below", err=ENOENT)


@pytest.mark.parametrize("where", ["upper", "middle"])
def test_a_whiteout_hides_and_ends_the_search(stack: StackMaker, where: str) -> None:
    gone: Spec = {"f": Whiteout(), "d": {"g": Whiteout()}}
    lower: Spec = {"f": "below", "d": {"g": "below", "h": "below"}}
    tree = stack(lower, upper=gone) if where == "upper" else stack(gone, lower)
    tree.stat("f", err=ENOENT)
    tree.stat("d/g", err=ENOENT)
    assert tree.names("d") == ["h"]
    assert tree.names() == ["d"]


def test_a_name_above_a_whiteout_is_visible(stack: StackMaker) -> None:
    tree = stack({"n": {"new": ""}}, {"n": Whiteout()}, {"n": {"old": ""}})
    assert tree.names("n") == ["new"]


def test_an_opaque_directory_ends_the_search(stack: StackMaker) -> None:
    tree = stack({"d": {"a": ""}}, {"d": Dir({"b": ""}, opaque="trusted")}, {"d": {"c": ""}})
    assert tree.names("d") == ["a", "b"]
    tree.stat("d/c", err=ENOENT)


def test_a_merged_directory_has_the_attributes_of_its_topmost_part(stack: StackMaker) -> None:
    top = Dir({}, mode=0o711, uid=1, gid=2, mtime_ns=5_000_000_007, xattrs={"user.a": b"top"})
    below = Dir({"x": ""}, mode=0o777, uid=8, gid=9, xattrs={"user.a": b"below", "user.b": b"below"})
    tree = stack({"d": top}, {"d": below})
    found = tree.stat("d")
    assert (found.mode & 0o7777, found.uid, found.gid, found.mtime_ns) == (0o711, 1, 2, 5_000_000_007)
    assert tree.listxattr("d") == ["user.a"]
    assert tree.getxattr("d", "user.a") == b"top"


@pytest.mark.on("fs", "fuse", "kernel")
def test_a_symlink_below_a_directory_is_never_followed(stack: StackMaker) -> None:
    tree = stack({"d": {"x": ""}}, {"d": Symlink(target="/etc")}, upper={"d": {}})
    assert tree.names("d") == ["x"]
    tree.stat("d/passwd", err=ENOENT)
    tree.create("d/passwd", b"ours")
    assert os.path.getsize("/etc/passwd") != 4


def test_a_symlink_over_a_directory_is_a_symlink(stack: StackMaker) -> None:
    tree = stack({"d": Symlink(target="elsewhere")}, {"d": {"x": ""}})
    assert tree.readlink("d") == "elsewhere"


def test_absence_is_forgotten_when_the_name_is_made(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "1"}})
    for path in ("new", "d/new"):
        tree.stat(path, err=ENOENT)
        tree.create(path, b"x")
        assert tree.read(path) == b"x"
        tree.unlink(path)
        tree.stat(path, err=ENOENT)
        tree.mkdir(path)
        assert tree.names(path) == []
    tree.stat("d/moved", err=ENOENT)
    tree.rename("d/f", "d/moved")
    assert tree.read("d/moved") == b"1"
    tree.stat("d/linked", err=ENOENT)
    tree.link("d/moved", "d/linked")
    assert tree.read("d/linked") == b"1"


def test_names_need_not_be_valid_text(stack: StackMaker) -> None:
    name = b"\xff\xfe \n\x01"
    tree = stack({os.fsdecode(name): "odd"})
    assert tree.read(name) == b"odd"
    tree.rename(name, name + b"2")
    tree.create(b"\x80", b"")
    assert [item.name for item in sorted(tree.scan())] == [b"\x80", name + b"2"]
