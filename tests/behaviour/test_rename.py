"""Renaming everything onto everything, with and without flags, and what it looks like after a remount."""

import os
from collections.abc import Callable, Iterator
from errno import EEXIST, EINVAL, EISDIR, ENOENT, ENOTDIR, ENOTEMPTY
from typing import cast

import pytest

from tests.support.drivers import Tree
from tests.support.dump import Dump, differences, dump
from tests.support.outcome import errno_of, name_of
from tests.support.spec import Dir, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker
from tests.support.syscalls import EXCHANGE, NOREPLACE, WHITEOUT

# What may exist under the two names: (lower layer, second lower layer, upper), each without the name for None.
Objects = tuple[object, object, object]
FILES: dict[str, Objects] = {
    "lower file": ("lower", None, None),
    "upper file": (None, None, "upper"),
    "covering file": ("lower", None, "upper"),
    "lower symlink": (Symlink(target="t"), None, None),
    "upper fifo": (None, None, Special(kind="p")),
}
EMPTY: dict[str, Objects] = {
    "lower empty": ({}, None, None),
    "upper empty": (None, None, {}),
    "merged empty": ({}, {}, {}),
    "emptied": ({"gone": ""}, None, {"gone": Whiteout()}),
    "opaque empty": ({"gone": ""}, None, Dir({}, opaque="trusted")),
}
FULL: dict[str, Objects] = {
    "lower full": ({"x": "1", "s": {"y": "2"}}, None, None),
    "upper full": (None, None, {"x": "1", "s": {"y": "2"}}),
    "merged full": ({"x": "1"}, {"s": {"y": "2"}}, {"z": "3"}),
    "opaque full": ({"hidden": ""}, None, Dir({"x": "1"}, opaque="trusted")),
}
NOTHING: dict[str, Objects] = {
    "absent": (None, None, None),
    "whiteout": ("old", None, Whiteout()),
    "whiteout of a directory": ({"old": ""}, None, Whiteout()),
}
PRESENT = FILES | EMPTY | FULL
ALL = PRESENT | NOTHING


SOURCES = [
    "lower file",
    "upper file",
    "covering file",
    "lower full",
    "upper full",
    "merged full",
    "opaque full",
    "emptied",
]


def plain_errno(source: str, target: str) -> int | None:
    """What POSIX says about rename."""
    if source in NOTHING:
        return ENOENT
    if target in NOTHING:
        return None
    if source in FILES:
        return None if target in FILES else EISDIR
    if target in FILES:
        return ENOTDIR
    return ENOTEMPTY if target in FULL else None


def noreplace_errno(source: str, target: str) -> int | None:
    """The same under NOREPLACE."""
    if source in NOTHING:
        return ENOENT
    return None if target in NOTHING else EEXIST


def exchange_errno(source: str, target: str) -> int | None:
    """The same under EXCHANGE."""
    return ENOENT if source in NOTHING or target in NOTHING else None


def layers(source: Objects) -> list[Spec]:
    """Three layers with a directory for each target, which holds the source `p/a` and the target `q/b`."""
    made: list[dict[str, object]] = [{}, {}, {}]
    for number, target in enumerate(ALL.values()):
        for layer, first, second in zip(made, source, target, strict=True):
            left = {} if first is None else {"a": first}
            right = {} if second is None else {"b": second}
            layer[str(number)] = {"p": left, "q": right}
    return cast(list[Spec], made)


def check_against_all_targets(
    stack: StackMaker, source: str, flags: int, wanted: Callable[[str, str], int | None]
) -> None:
    """Rename this source over every target; the result must be complete, now and after a remount."""
    first, second, upper = layers(ALL[source])
    tree = stack(first, second, upper=upper)
    found = [
        problem
        for number, target in enumerate(ALL)
        for problem in one_rename(tree, f"{number}", source, target, flags, wanted)
    ]
    after = dump(tree)
    tree.remount()
    found += [f"after the remount: {line}" for line in differences(after, dump(tree))]
    assert not found, "\n" + "\n".join(found)


def one_rename(
    tree: Tree, case: str, source: str, target: str, flags: int, errno: Callable[[str, str], int | None]
) -> Iterator[str]:
    """Rename CASE/p/a to CASE/q/b and yield a line for each thing that is wrong."""
    before = dump(tree, case.encode())
    left, right = dump_below(tree, f"{case}/p/a"), dump_below(tree, f"{case}/q/b")
    wanted = errno(source, target)
    got = errno_of(tree.rename, f"{case}/p/a", f"{case}/q/b", flags)
    if got != wanted:
        yield f"{source} to {target}: wanted {name_of(wanted)}, got {name_of(got)}"
    if got is not None:
        for line in differences(settled(tree, before), settled(tree, dump(tree, case.encode()))):
            yield f"{source} to {target}: failed and changed {line}"
        return
    now = dump_below(tree, f"{case}/p/a"), dump_below(tree, f"{case}/q/b")
    if now != ((right if flags == EXCHANGE else {}), left):
        yield f"{source} to {target}: now {now}, before {left}, {right}"


def settled(tree: Tree, found: Dump) -> Dump:
    """The dump; on the kernel without times of directories: its copy-up of a directory changes those of the parent."""
    if tree.name != "kernel":
        return found
    return {path: item._replace(mtime_ns=0) if item.kind == "dir" else item for path, item in found.items()}


def dump_below(tree: Tree, top: str) -> Dump:
    """The dump of a subtree with paths from its top; empty if it is absent."""
    if not tree.exists(top):
        return {}
    return {path[len(top) :]: item for path, item in dump(tree, top.encode()).items()}


@pytest.mark.parametrize("source", ALL)
def test_plain(stack: StackMaker, source: str) -> None:
    check_against_all_targets(stack, source, 0, plain_errno)


@pytest.mark.parametrize("source", [*SOURCES, "absent"])
def test_noreplace(stack: StackMaker, source: str) -> None:
    check_against_all_targets(stack, source, NOREPLACE, noreplace_errno)


@pytest.mark.parametrize("source", [*SOURCES, "whiteout"])
def test_exchange(stack: StackMaker, source: str) -> None:
    check_against_all_targets(stack, source, EXCHANGE, exchange_errno)


@pytest.mark.on("fs", "fuse", "kernel")
@pytest.mark.parametrize("flags", [WHITEOUT, WHITEOUT | EXCHANGE, NOREPLACE | EXCHANGE, 8])
def test_other_flags_are_refused(stack: StackMaker, flags: int) -> None:
    tree = stack({"a": "1", "b": "2"})
    tree.rename("a", "b", flags, err=EINVAL)
    assert (tree.read("a"), tree.read("b")) == (b"1", b"2")


def test_into_itself(stack: StackMaker) -> None:
    tree = stack({"d": {"e": {}}})
    tree.rename("d", "d/e/f", err=EINVAL)
    tree.rename("d", "d/n", err=EINVAL)
    tree.rename("d/e", "d", EXCHANGE, err=EINVAL)
    tree.rename("d/e", "d", err=ENOTEMPTY)


@pytest.mark.parametrize("path", ["f", "d"])
def test_onto_itself(stack: StackMaker, path: str) -> None:
    tree = stack({"f": "1", "d": {"x": ""}})
    tree.rename(path, path)
    assert tree.names() == ["d", "f"]
    tree.rename(path, path, NOREPLACE, err=EEXIST)


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_onto_another_name_of_the_same_file_keeps_both(stack: StackMaker, where: str) -> None:
    tree = stack({"a": "1"} if where == "lower" else {}, upper={"a": "1"} if where == "upper" else {})
    tree.link("a", "b")
    tree.rename("a", "b")
    assert (tree.read("a"), tree.read("b")) == (b"1", b"1")
    assert tree.stat("a").nlink == 2


def test_a_directory_moves_with_everything_in_it(stack: StackMaker) -> None:
    tree = stack({"d": {"a": "1", "s": {"b": "2"}}}, {"d": {"c": "3", "s": {"e": "5"}}}, upper={"d": {"f": "6"}})
    tree.mkdir("new")
    tree.rename("d", "new/d")
    assert tree.names("new/d") == ["a", "c", "f", "s"]
    assert tree.names("new/d/s") == ["b", "e"]
    tree.write("new/d/s/b", b"two")
    tree.unlink("new/d/c")
    tree.stat("d", err=ENOENT)
    tree.remount()
    assert tree.names() == ["new"]
    assert tree.read("new/d/s/b") == b"two"
    assert tree.names("new/d") == ["a", "f", "s"]


def test_a_moved_directory_moves_again(stack: StackMaker) -> None:
    tree = stack({"d": {"s": {"f": "1"}}, "e": {}})
    for old, new in (("d", "d2"), ("d2", "e/d3"), ("e/d3/s", "e/s2"), ("e", "e2"), ("e2/s2", "s3"), ("e2/d3", "d")):
        tree.rename(old, new)
    assert tree.read("s3/f") == b"1"
    assert tree.names() == ["d", "e2", "s3"]
    assert tree.names("d") == []
    tree.remount()
    assert tree.read("s3/f") == b"1"
    assert tree.names() == ["d", "e2", "s3"]
    assert tree.names("d") == []


def test_a_directory_in_the_place_of_a_moved_one_is_empty(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "1"}})
    tree.rename("d", "moved")
    tree.mkdir("d")
    assert tree.names("d") == []
    tree.create("d/f", b"other")
    tree.remount()
    assert tree.read("moved/f") == b"1"
    assert tree.read("d/f") == b"other"
    assert tree.names("d") == ["f"]


def test_an_upper_directory_under_a_merged_parent_does_not_merge(stack: StackMaker) -> None:
    tree = stack({"p": {"n": {"old": ""}}})
    tree.remove_tree("p/n")
    tree.mkdir("fresh")
    tree.create("fresh/new", b"")
    tree.rename("fresh", "p/n")
    assert tree.names("p/n") == ["new"]
    tree.remount()
    assert tree.names("p/n") == ["new"]


def test_swapping_two_lower_directories(stack: StackMaker) -> None:
    tree = stack({"a": {"one": "1"}, "b": {"two": "2"}})
    for _ in range(3):
        tree.rename("a", "b", EXCHANGE)
    assert (tree.names("a"), tree.names("b")) == (["two"], ["one"])
    tree.remount()
    assert (tree.read("a/two"), tree.read("b/one")) == (b"2", b"1")
    tree.remove_tree("a")
    tree.remount()
    assert tree.names() == ["b"]


def test_the_old_name_is_free(stack: StackMaker) -> None:
    tree = stack({"f": "1", "d": {"x": ""}})
    tree.rename("f", "g")
    tree.create("f", b"2")
    tree.rename("d", "e")
    tree.create("d", b"3")
    tree.remount()
    assert [tree.read(name) for name in ("f", "g", "d")] == [b"2", b"1", b"3"]
    assert tree.names("e") == ["x"]


def test_a_replaced_file_lives_on_for_its_handles(stack: StackMaker) -> None:
    tree = stack({"a": "new", "b": "victim"})
    handle = tree.open("b")
    tree.rename("a", "b")
    assert handle.read() == b"victim"
    handle.close()
    assert tree.read("b") == b"new"


@pytest.mark.deviates("kernel", reason="an open lower file shows the link count of its layer")
def test_a_replaced_file_has_no_links(stack: StackMaker) -> None:
    tree = stack({"a": "new", "b": "victim"})
    handle = tree.open("b")
    tree.rename("a", "b")
    assert handle.stat().nlink == 0
    handle.close()


def test_rename_keeps_data_attributes_and_number(stack: StackMaker) -> None:
    lower: Spec = {"d": Dir({"f": "data"}, mode=0o2750, uid=3, gid=4, xattrs={"user.k": b"v"})}
    tree = stack(lower)
    directory, file = tree.stat("d"), tree.stat("d/f")
    tree.rename("d/f", "f")
    tree.rename("d", "e")
    moved_directory, moved_file = tree.stat("e"), tree.stat("f")
    assert (moved_directory.ino, moved_directory.mode, moved_directory.uid) == (
        directory.ino,
        directory.mode,
        directory.uid,
    )
    assert (moved_file.ino, moved_file.mtime_ns, moved_file.size) == (file.ino, file.mtime_ns, file.size)
    assert tree.getxattr("e", "user.k") == b"v"


def test_long_names(stack: StackMaker) -> None:
    tree = stack({"a" * 255: "file", "d" * 255: {"x": ""}})
    tree.rename("a" * 255, "b" * 255)
    tree.rename("d" * 255, "e" * 255)
    tree.remount()
    assert tree.names() == ["b" * 255, "e" * 255]
    assert tree.names("e" * 255) == ["x"]


@pytest.mark.deviates("kernel", reason="answers EXDEV where a redirect would be too long")
def test_a_deep_directory_whose_path_is_too_long_for_a_redirect(stack: StackMaker) -> None:
    """A redirect holds 256 bytes; a directory with a longer path must move all the same (docs/deviations.md)."""
    deep = "/".join(["x" * 60] * 6)
    layer: Spec = {"leaf": {"f": "1"}}
    for _ in range(6):
        layer = {"x" * 60: layer}
    tree = stack(layer)
    tree.rename(f"{deep}/leaf", "leaf")
    assert tree.read("leaf/f") == b"1"
    tree.remount()
    assert tree.read("leaf/f") == b"1"
    tree.stat(f"{deep}/leaf", err=ENOENT)


def test_times_of_the_parents_change(stack: StackMaker) -> None:
    tree = stack({"p": {"f": ""}, "q": {}})
    before = [tree.stat(name).mtime_ns for name in "pq"]
    tree.rename("p/f", "q/f")
    after = [tree.stat(name).mtime_ns for name in "pq"]
    assert after[0] > before[0] and after[1] > before[1]


@pytest.mark.on("plain", "fuse", "kernel")
def test_an_open_directory_and_a_cwd_move_along(stack: StackMaker) -> None:
    tree = stack({"d": {"s": {"f": "1"}}})
    fd = os.open(tree.stack.mountpoint / "d" / "s", os.O_RDONLY)
    try:
        tree.rename("d", "e")
        assert os.listdir(fd) == ["f"]
        made = os.open("g", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd)
        os.close(made)
    finally:
        os.close(fd)
    assert tree.names("e/s") == ["f", "g"]
