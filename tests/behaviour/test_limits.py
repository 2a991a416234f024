"""Long names and paths, many layers, many files."""

import os
from errno import ENAMETOOLONG, ENOENT

import pytest

from tests.support.drivers import Tree
from tests.support.spec import Link
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker


def deep(name: str, depth: int, bottom: Spec) -> Spec:
    """`depth` directories of this name inside each other, `bottom` in the innermost."""
    tree = bottom
    for _ in range(depth):
        tree = {name: tree}
    return tree


def longest_path() -> list[str]:
    """Components of a path of 4095 bytes, 15 names of 255 and a last one of 255."""
    return [letter * 255 for letter in "abcdefghijklmno"] + ["p" * 255]


def test_a_path_of_4095_bytes(stack: StackMaker) -> None:
    tree = stack({})
    parts = longest_path()
    for end in range(1, len(parts)):
        tree.mkdir("/".join(parts[:end]))
    path = "/".join(parts)
    assert len(path) == 4095
    tree.create(path, b"deep")
    assert tree.read(path) == b"deep"
    check_deep_changes(tree, path)


@pytest.mark.on("fs", "fuse", "kernel")
def test_a_path_of_4095_bytes_in_a_lower_layer(stack: StackMaker) -> None:
    tree = stack({})
    parts = longest_path()
    for end in range(1, len(parts)):
        tree.mkdir("/".join(parts[:end]))
    path = "/".join(parts)
    tree.create(path, b"deep")
    tree.rotate()
    check_deep_changes(tree, path)


def check_deep_changes(tree: Tree, path: str) -> None:
    parent = path.rpartition("/")[0]
    tree.write(path, b"DE")
    tree.chmod(path, 0o600)
    tree.rename(path, f"{parent}/q")
    tree.link(f"{parent}/q", path)
    tree.unlink(f"{parent}/q")
    tree.remount()
    assert tree.read(path) == b"DEep"
    tree.unlink(path)
    tree.stat(path, err=ENOENT)
    assert tree.names(parent) == []


@pytest.mark.on("fs", "fuse", "kernel")
@pytest.mark.deviates("kernel", reason="answers EXDEV where a redirect would be too long")
def test_deeper_than_any_path(stack: StackMaker) -> None:
    """A tree whose paths no longer fit a system call, reached by renaming a deep directory into a deep one."""
    tree = stack(deep("d" * 200, 18, {"f": "bottom"}), {"x": {}})
    first = "/".join(["d" * 200] * 18)
    tree.mkdir(f"{first}/more")
    tree.rename("d" * 200, "x/top")
    middle = "x/top/" + "/".join(["d" * 200] * 17)
    tree.rename(middle, "short")
    assert tree.read("short/f") == b"bottom"
    tree.write("short/f", b"B")
    tree.remount()
    assert tree.read("short/f") == b"Bottom"


def test_a_name_that_is_too_long(stack: StackMaker) -> None:
    tree = stack({"f": "", "d": {}})
    long = "x" * 256
    tree.stat(long, err=ENAMETOOLONG)
    tree.create(f"d/{long}", err=ENAMETOOLONG)
    tree.mkdir(long, err=ENAMETOOLONG)
    tree.rename("f", long, err=ENAMETOOLONG)
    tree.link("f", long, err=ENAMETOOLONG)
    tree.symlink("t", long, err=ENAMETOOLONG)


@pytest.mark.on("fs", "fuse", "kernel")
def test_500_layers(stack: StackMaker) -> None:
    layers: list[Spec] = [
        {"d": {f"{number:03}": str(number)}, "f": str(number), f"only{number}": {"x": ""}} for number in range(500)
    ]
    tree = stack(*layers)
    assert tree.names("d") == [f"{number:03}" for number in range(500)]
    assert tree.read("f") == b"0"
    assert tree.read("d/499") == b"499"
    tree.write("d/499", b"X")
    tree.unlink("d/250")
    tree.rename("only499", "moved")
    tree.remove_tree("only0")
    tree.remount()
    assert tree.read("d/499") == b"X99"
    assert len(tree.names("d")) == 499
    assert tree.names("moved") == ["x"]
    tree.stat("only0", err=ENOENT)


@pytest.mark.on("fs", "fuse")
def test_layer_paths_with_commas_colons_spaces_and_backslashes(stack: StackMaker) -> None:
    tree = stack({"f": "1"}, base=stack.place / "a,b:c d\\e")
    assert tree.read("f") == b"1"
    tree.create("g")
    tree.remount()
    assert tree.names() == ["f", "g"]


def test_many_new_files_in_a_directory(stack: StackMaker) -> None:
    tree = stack({"d": {}})
    for number in range(2_000):
        tree.create(f"d/new{number}")
    assert len(tree.names("d")) == 2_000
    tree.remove_tree("d")
    assert tree.names() == []


@pytest.mark.on("fs", "fuse", "kernel")
def test_a_lower_directory_of_100000_files(stack: StackMaker) -> None:
    names = [f"{number:06}" for number in range(100_000)]
    first: Spec = {"n0": "", **{name: Link("d/n0") for name in names[1:50_000]}}
    second: Spec = {"n1": "", **{name: Link("d/n1") for name in names[50_000:]}}
    tree = stack({"d": first}, {"d": second})
    assert len(tree.names("d")) == 100_001
    for name in names[1::500]:
        tree.stat(f"d/{name}")
        tree.unlink(f"d/{name}")
        tree.stat(f"d/no{name}", err=ENOENT)
    assert len(tree.names("d")) == 99_801


def test_a_wide_and_deep_tree_is_removed(stack: StackMaker) -> None:
    def tree_of(depth: int) -> Spec:
        return {f"{n}": tree_of(depth - 1) if depth else "leaf" for n in range(5)}

    tree = stack(tree_of(3), upper={"0": {"0": {"more": ""}}})
    for name in tree.names():
        tree.remove_tree(name)
    assert tree.names() == []
    tree.remount()
    assert tree.names() == []


@pytest.mark.on("fs")
def test_looking_at_thousands_of_files_keeps_no_descriptors(stack: StackMaker) -> None:
    tree = stack({"d": {f"{number}": "" for number in range(3000)}})
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3000):
        tree.stat(f"d/{number}")
    assert len(os.listdir("/proc/self/fd")) - before < 100
