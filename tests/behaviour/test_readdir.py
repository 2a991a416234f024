"""Listings: their entries, and that they agree with lookup."""

import os
import stat
from errno import ENOENT, ENOTDIR

import pytest

from tests.support.drivers import Tree
from tests.support.spec import Dir, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker


def assert_listing_agrees_with_lookup(tree: Tree, path: str = "") -> None:
    for item in tree.scan(path):
        found = tree.stat(os.fsencode(path) + b"/" + item.name)
        assert item.ino == found.ino, item
        assert item.kind in (0, stat.S_IFMT(found.mode)), item


def test_types_and_numbers_agree_with_stat(stack: StackMaker) -> None:
    lower: Spec = {"f": "1", "l": Symlink(target="f"), "p": Special(kind="p"), "d": {"x": ""}, "both": {"y": ""}}
    tree = stack({"both": {"z": ""}}, lower, upper={"u": ""})
    assert_listing_agrees_with_lookup(tree)
    assert_listing_agrees_with_lookup(tree, "both")
    tree.chmod("f", 0o600)
    tree.create("both/new", b"")
    assert_listing_agrees_with_lookup(tree)
    assert_listing_agrees_with_lookup(tree, "both")


@pytest.mark.deviates("kernel", reason="lists the upper's own number where a merged directory has no origin mark")
def test_numbers_agree_in_an_upper_that_was_made_by_hand(stack: StackMaker) -> None:
    tree = stack({"both": {"z": ""}, "f": "1"}, upper={"both": {"w": ""}, "f": "2"})
    assert_listing_agrees_with_lookup(tree)
    assert_listing_agrees_with_lookup(tree, "both")


def test_every_name_once(stack: StackMaker) -> None:
    tree = stack({"d": {"a": "", "b": ""}}, {"d": {"b": "", "c": ""}}, upper={"d": {"c": "", "a": ""}})
    assert [item.name for item in sorted(tree.scan("d"))] == [b"a", b"b", b"c"]


def test_a_listing_follows_every_kind_of_change(stack: StackMaker) -> None:
    tree = stack({"d": {"a": "", "b": "", "s": {"x": ""}}})
    assert tree.names("d") == ["a", "b", "s"]
    tree.create("d/c", b"")
    tree.unlink("d/a")
    assert tree.names("d") == ["b", "c", "s"]
    tree.rename("d/b", "d/a")
    tree.link("d/c", "d/e")
    tree.remove_tree("d/s")
    assert tree.names("d") == ["a", "c", "e"]
    tree.symlink("x", "d/s")
    tree.mkdir("d/b")
    assert tree.names("d") == ["a", "b", "c", "e", "s"]
    tree.rename("d/e", "e")
    assert tree.names("d") == ["a", "b", "c", "s"]
    assert tree.names() == ["d", "e"]


def test_a_listing_is_the_same_after_a_remount(stack: StackMaker) -> None:
    tree = stack({"d": {"a": "", "b": ""}}, {"d": {"c": "", "a": ""}})
    tree.unlink("d/a")
    tree.create("d/n", b"")
    tree.remount()
    assert tree.names("d") == ["b", "c", "n"]


def test_errors(stack: StackMaker) -> None:
    tree = stack({"f": "", "d": {}})
    tree.scan("f", err=ENOTDIR)
    tree.scan("missing", err=ENOENT)
    tree.rmdir("d")
    tree.scan("d", err=ENOENT)


def test_the_root_lists(stack: StackMaker) -> None:
    tree = stack({"a": "", "gone": ""}, {"b": ""}, upper={"gone": Whiteout(), "c": ""})
    assert tree.names() == ["a", "b", "c"]


@pytest.mark.on("plain", "fuse", "kernel")
def test_dots_are_listed_by_the_kernel_interface(stack: StackMaker) -> None:
    tree = stack({"d": {"s": {}}})
    root = os.fsdecode(tree.stack.mountpoint)
    assert os.stat(f"{root}/d/s/..").st_ino == tree.stat("d").ino
    assert os.stat(f"{root}/d/.").st_ino == tree.stat("d").ino


def test_a_big_merged_directory(stack: StackMaker) -> None:
    halves: list[Spec] = [{"d": {f"{n:05}": "" for n in range(start, 6000, 2)}} for start in (0, 1)]
    tree = stack(*halves)
    assert tree.names("d") == [f"{n:05}" for n in range(6000)]
    for n in range(0, 6000, 3):
        tree.unlink(f"d/{n:05}")
    assert tree.names("d") == [f"{n:05}" for n in range(6000) if n % 3]
    tree.remount()
    assert tree.names("d") == [f"{n:05}" for n in range(6000) if n % 3]
    tree.stat("d/00003", err=ENOENT)


@pytest.mark.on("plain", "fuse", "kernel")
def test_removing_while_listing_skips_and_repeats_nothing(stack: StackMaker) -> None:
    tree = stack({"d": {f"{n:04}": "" for n in range(1500)}}, {"d": {f"{n:04}": "" for n in range(1000, 2500)}})
    seen = []
    with os.scandir(tree.stack.mountpoint / "d") as entries:
        for item in entries:
            seen.append(item.name)
            tree.unlink(f"d/{item.name}")
    assert sorted(seen) == [f"{n:04}" for n in range(2500)]
    tree.rmdir("d")


@pytest.mark.on("plain", "fuse", "kernel")
def test_names_that_stay_are_never_lost_by_changes_during_a_listing(stack: StackMaker) -> None:
    tree = stack({"d": {f"stay{n:04}": "" for n in range(1000)} | {f"go{n:04}": "" for n in range(500)}})
    seen = []
    with os.scandir(tree.stack.mountpoint / "d") as entries:
        for number, item in enumerate(entries):
            seen.append(item.name)
            if number < 500:
                tree.unlink(f"d/go{number:04}")
                tree.create(f"d/new{number:04}", b"")
    stayed = [name for name in seen if name.startswith("stay")]
    assert sorted(stayed) == [f"stay{n:04}" for n in range(1000)]
    assert len(seen) == len(set(seen))


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_removed_directory_that_is_open_lists_nothing(stack: StackMaker) -> None:
    tree = stack({"d": {"a": ""}}, upper={"d": {"b": ""}})
    fd = os.open(tree.stack.mountpoint / "d", os.O_RDONLY)
    try:
        tree.remove_tree("d")
        assert os.listdir(fd) == []
    finally:
        os.close(fd)


@pytest.mark.on("plain", "fuse", "kernel")
@pytest.mark.deviates("kernel", reason="does not count the links of merged directories: always 1")
def test_a_removed_directory_that_is_open_has_no_links(stack: StackMaker) -> None:
    tree = stack({"d": {}}, upper={"d": {}})
    fd = os.open(tree.stack.mountpoint / "d", os.O_RDONLY)
    try:
        tree.rmdir("d")
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


@pytest.mark.on("plain", "fuse", "kernel")
def test_rewinding_shows_what_is_new(stack: StackMaker) -> None:
    tree = stack({"d": {"a": ""}})
    fd = os.open(tree.stack.mountpoint / "d", os.O_RDONLY)
    try:
        assert os.listdir(fd) == ["a"]
        tree.create("d/b", b"")
        tree.unlink("d/a")
        assert os.listdir(fd) == ["b"]
    finally:
        os.close(fd)


def test_an_opaque_directory_lists_only_its_own(stack: StackMaker) -> None:
    tree = stack({"d": {"below": ""}}, upper={"d": Dir({"own": ""}, opaque="trusted")})
    assert tree.names("d") == ["own"]
