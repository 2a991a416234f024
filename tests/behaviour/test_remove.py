"""Removing: removed names stay absent, over remounts and whatever is created in their place."""

from errno import EBUSY, EINVAL, EISDIR, ENOENT, ENOTDIR, ENOTEMPTY

import pytest

from tests.support.spec import Dir, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

STATES: dict[str, tuple[list[Spec], Spec]] = {
    "upper only": ([{"d": {}}], {"d": {"n": "x"}}),
    "lower only": ([{"d": {"n": "x"}}], {}),
    "both": ([{"d": {"n": "x"}}], {"d": {"n": "y"}}),
    "two lowers": ([{"d": {"n": "x"}}, {"d": {"n": "z"}}], {}),
    "above a whiteout": ([{"d": {"n": Whiteout()}}, {"d": {"n": "z"}}], {"d": {"n": "y"}}),
    "in an opaque directory": ([{"d": {"n": "x"}}], {"d": Dir({"n": "y"}, opaque="trusted")}),
}


@pytest.mark.parametrize("state", STATES)
def test_unlink(stack: StackMaker, state: str) -> None:
    lower, upper = STATES[state]
    tree = stack(*lower, upper=upper)
    tree.unlink("d/n")
    tree.stat("d/n", err=ENOENT)
    assert tree.names("d") == []
    tree.remount()
    tree.stat("d/n", err=ENOENT)
    assert tree.names("d") == []
    tree.unlink("d/n", err=ENOENT)
    tree.rmdir("d")


@pytest.mark.parametrize(
    "kind",
    [Symlink(target="x"), Special(kind="p"), Special(kind="s"), Special(kind="c", major=1, minor=3)],
    ids=["symlink", "fifo", "socket", "device"],
)
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_unlink_of_every_type(stack: StackMaker, kind: Special | Symlink, where: str) -> None:
    tree = stack({"n": kind} if where == "lower" else {}, upper={"n": kind} if where == "upper" else {})
    tree.unlink("n")
    tree.stat("n", err=ENOENT)
    tree.remount()
    assert tree.names() == []


DIRECTORIES: dict[str, tuple[list[Spec], Spec]] = {
    "upper only": ([{"d": {}}], {"d": {"n": {}}}),
    "lower only": ([{"d": {"n": {}}}], {}),
    "merged": ([{"d": {"n": {}}}, {"d": {"n": {}}}], {"d": {"n": {}}}),
    "only whiteouts inside": (
        [{"d": {"n": {"a": "", "b": {"c": ""}}}}],
        {"d": {"n": {"a": Whiteout(), "b": Whiteout()}}},
    ),
    "opaque over something": ([{"d": {"n": {"a": ""}}}], {"d": {"n": Dir({}, opaque="trusted")}}),
    "over a file": ([{"d": {"n": "file"}}], {"d": {"n": {}}}),
}


@pytest.mark.parametrize("state", DIRECTORIES)
def test_rmdir(stack: StackMaker, state: str) -> None:
    lower, upper = DIRECTORIES[state]
    tree = stack(*lower, upper=upper)
    tree.rmdir("d/n")
    tree.stat("d/n", err=ENOENT)
    assert tree.names("d") == []
    tree.remount()
    assert tree.names("d") == []
    tree.mkdir("d/n")
    assert tree.names("d/n") == []
    tree.remount()
    assert tree.names("d/n") == []


@pytest.mark.parametrize("where", ["lower", "upper", "both"])
def test_rmdir_of_a_directory_that_is_not_empty(stack: StackMaker, where: str) -> None:
    full: Spec = {"d": {"a": ""}}
    tree = stack(full if where != "upper" else {"d": {}}, upper=full if where != "lower" else {})
    before = tree.stat("d")
    tree.rmdir("d", err=ENOTEMPTY)
    assert tree.stat("d")._replace(atime_ns=before.atime_ns) == before
    assert tree.names("d") == ["a"]


def test_wrong_types(stack: StackMaker) -> None:
    tree = stack({"f": "", "d": {}, "l": Symlink(target="d")}, upper={"uf": "", "ud": {}})
    for name in ("d", "ud"):
        tree.unlink(name, err=EISDIR)
    for name in ("f", "uf", "l"):
        tree.rmdir(name, err=ENOTDIR)
    tree.unlink("f/x", err=ENOTDIR)
    tree.rmdir("none", err=ENOENT)


@pytest.mark.on("plain", "fuse", "kernel")
def test_dots_and_the_root(stack: StackMaker) -> None:
    tree = stack({"d": {"e": {}}})
    tree.rmdir("d/.", err=EINVAL)
    tree.rmdir("d/e/..", err=ENOTEMPTY)
    if tree.name != "plain":
        import os

        from tests.support.outcome import errno_of

        assert errno_of(os.rmdir, tree.stack.mountpoint) == EBUSY


def test_a_directory_made_anew_does_not_show_the_old_content(stack: StackMaker) -> None:
    tree = stack({"d": {"a": "", "s": {"x": ""}}}, {"d": {"b": ""}})
    tree.remove_tree("d")
    tree.stat("d", err=ENOENT)
    tree.mkdir("d")
    assert tree.names("d") == []
    for path in ("d/a", "d/b", "d/s"):
        tree.stat(path, err=ENOENT)
    tree.remount()
    assert tree.names("d") == []
    for path in ("d/a", "d/b", "d/s"):
        tree.stat(path, err=ENOENT)
    assert tree.names("d") == []
    tree.mkdir("d/s")
    assert tree.names("d/s") == []


def test_over_and_over(stack: StackMaker) -> None:
    tree = stack({"n": {"old": "", "s": {"t": {"u": ""}}}})
    for turn in range(3):
        tree.remove_tree("n")
        tree.create("n", b"file")
        tree.unlink("n")
        tree.mkdir("n")
        tree.mkdir("n/s")
        assert tree.names("n/s") == []
        tree.create(f"n/s/{turn}", b"")
        tree.remount()
        assert tree.names("n/s") == [str(turn)]


def test_removal_touches_only_the_parent(stack: StackMaker) -> None:
    tree = stack({"o": {"d": {"f": "", "g": ""}}})
    outer, inner = tree.stat("o"), tree.stat("o/d")
    tree.unlink("o/d/f")
    assert tree.stat("o").mtime_ns == outer.mtime_ns
    assert tree.stat("o/d").mtime_ns > inner.mtime_ns
    assert tree.stat("o/d").ino == inner.ino


def test_unlinking_a_long_lower_name(stack: StackMaker) -> None:
    names = [letter * length for letter, length in (("a", 250), ("b", 251), ("c", 252), ("d", 255))]
    tree = stack(dict.fromkeys(names, "") | {"e" * 255: {"x": ""}})
    for name in names:
        tree.unlink(name)
    tree.remove_tree("e" * 255)
    assert tree.names() == []
    tree.remount()
    assert tree.names() == []


def test_removing_a_whole_stack_of_trees(stack: StackMaker) -> None:
    tree = stack(
        {"t": {"a": {"b": {"c": "1"}}}}, {"t": {"a": {"b": {"d": "2"}}, "z": "3"}}, upper={"t": {"a": {"e": ""}}}
    )
    tree.remove_tree("t")
    assert tree.names() == []
    tree.remount()
    assert tree.names() == []
    tree.mkdir("t")
    tree.mkdir("t/a")
    assert tree.names("t/a") == []
