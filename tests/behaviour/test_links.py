"""Hard links: one file, whatever its names, layers and copy-up."""

import os
from errno import EEXIST, ENOENT, EPERM

import pytest

from tests.support.acl import DEFAULT, acl
from tests.support.drivers import Tree
from tests.support.dump import differences, dump
from tests.support.spec import Dir, File, Link, OpaqueForm, Special, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker


def assert_one_file(tree: Tree, *names: str, data: bytes, nlink: int | None = None) -> None:
    """All names show one inode with this content and, unless given, as many links as names."""
    found = [tree.stat(name) for name in names]
    assert len({item.ino for item in found}) == 1, "different inode numbers"
    assert {item.nlink for item in found} == {len(names) if nlink is None else nlink}
    assert [tree.read(name) for name in names] == [data] * len(names)


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_link(stack: StackMaker, where: str) -> None:
    files: Spec = {"f": "data", "d": {}}
    tree = stack(files if where == "lower" else {"d": {}}, upper=files if where == "upper" else {})
    tree.link("f", "d/g")
    assert_one_file(tree, "f", "d/g", data=b"data")
    tree.write("d/g", b"DATA")
    assert_one_file(tree, "f", "d/g", data=b"DATA")
    tree.remount()
    assert_one_file(tree, "f", "d/g", data=b"DATA")
    tree.unlink("f")
    assert_one_file(tree, "d/g", data=b"DATA")


TWINS: Spec = {"a": "old data", "d": {"b": Link("a")}, "c": Link("a")}


def test_lower_twins_are_one_file(stack: StackMaker) -> None:
    assert_one_file(stack(TWINS), "a", "d/b", "c", data=b"old data")


@pytest.mark.parametrize("by", ["a", "d/b"])
def test_lower_twins_stay_one_file_when_written(stack: StackMaker, by: str) -> None:
    tree = stack(TWINS)
    number = tree.stat("a").ino
    tree.write(by, b"NEW")
    assert_one_file(tree, "a", "d/b", "c", data=b"NEW data")
    assert tree.stat("a").ino == number
    tree.remount()
    assert_one_file(tree, "a", "d/b", "c", data=b"NEW data")
    assert tree.stat("a").ino == number


def test_twins_share_every_change(stack: StackMaker) -> None:
    tree = stack(TWINS)
    tree.chmod("a", 0o640)
    tree.setxattr("d/b", "user.k", b"v")
    tree.utime("c", 1_000_000_001, 2_000_000_002)
    tree.chown("a", 5, 6)
    for name in ("a", "d/b", "c"):
        found = tree.stat(name)
        assert (found.mode & 0o7777, found.uid, found.gid, found.mtime_ns) == (0o640, 5, 6, 2_000_000_002)
        assert tree.getxattr(name, "user.k") == b"v"
    tree.remount()
    assert_one_file(tree, "a", "d/b", "c", data=b"old data")
    assert tree.mode("d/b") == 0o640


def test_twins_written_in_turn_after_remounts(stack: StackMaker) -> None:
    tree = stack(TWINS)
    for turn, name in enumerate(("a", "d/b", "c")):
        tree.write(name, b"%d" % turn, offset=turn)
        tree.remount()
    assert_one_file(tree, "a", "d/b", "c", data=b"012 data")


@pytest.mark.parametrize("written", [False, True], ids=["as it was", "copied up"])
def test_removing_a_twin_counts(stack: StackMaker, written: bool) -> None:
    tree = stack(TWINS)
    if written:
        tree.write("c", b"NEW")
    data = b"NEW data" if written else b"old data"
    tree.unlink("a")
    assert_one_file(tree, "d/b", "c", data=data)
    tree.remount()
    tree.stat("a", err=ENOENT)
    assert_one_file(tree, "d/b", "c", data=data)
    tree.unlink("c")
    assert_one_file(tree, "d/b", data=data)
    tree.unlink("d/b")
    assert tree.names() == ["d"]


def test_a_removed_twin_does_not_come_back_by_writing(stack: StackMaker) -> None:
    tree = stack(TWINS)
    tree.unlink("a")
    tree.write("c", b"NEW")
    tree.remount()
    tree.stat("a", err=ENOENT)
    assert_one_file(tree, "d/b", "c", data=b"NEW data")


def test_renaming_twins(stack: StackMaker) -> None:
    tree = stack(TWINS)
    tree.rename("a", "d/z")
    tree.write("d/b", b"NEW")
    assert_one_file(tree, "d/z", "d/b", "c", data=b"NEW data")
    tree.rename("c", "y")
    tree.remount()
    assert_one_file(tree, "d/z", "d/b", "y", data=b"NEW data")


def test_new_links_to_twins_count_on(stack: StackMaker) -> None:
    tree = stack(TWINS)
    tree.link("a", "e")
    assert_one_file(tree, "a", "d/b", "c", "e", data=b"old data")
    tree.link("d/b", "g")
    tree.write("c", b"NEW")
    assert_one_file(tree, "a", "d/b", "c", "e", "g", data=b"NEW data")
    tree.remount()
    assert_one_file(tree, "a", "d/b", "c", "e", "g", data=b"NEW data")
    for name in ("a", "e", "g"):
        tree.unlink(name)
    assert_one_file(tree, "d/b", "c", data=b"NEW data")


@pytest.mark.on("fs", "fuse", "kernel")
def test_a_covered_twin_is_not_a_twin(stack: StackMaker) -> None:
    tree = stack({"a": "other"}, TWINS)
    assert tree.read("a") == b"other"
    tree.write("c", b"NEW")
    assert tree.read("a") == b"other"
    assert tree.stat("c").ino == tree.stat("d/b").ino != tree.stat("a").ino


def test_replacing_one_twin_leaves_the_others(stack: StackMaker) -> None:
    tree = stack(TWINS)
    tree.create("n", b"fresh")
    tree.rename("n", "a")
    assert tree.read("a") == b"fresh"
    assert_one_file(tree, "d/b", "c", data=b"old data")
    tree.remount()
    tree.write("d/b", b"NEW")
    assert tree.read("a") == b"fresh"
    assert_one_file(tree, "d/b", "c", data=b"NEW data")


@pytest.mark.parametrize(
    "kind",
    [Symlink(target="t"), Special(kind="p"), Special(kind="c", major=1, minor=3)],
    ids=["symlink", "fifo", "device"],
)
def test_links_of_other_types(stack: StackMaker, kind: Symlink | Special) -> None:
    tree = stack({"n": kind})
    number = tree.stat("n").ino
    tree.link("n", "m")
    assert tree.stat("m").ino == tree.stat("n").ino == number
    assert tree.stat("n").nlink == 2
    tree.remount()
    assert tree.stat("m").ino == tree.stat("n").ino == number
    tree.unlink("n")
    assert tree.stat("m").nlink == 1


def test_errors(stack: StackMaker) -> None:
    tree = stack({"f": "", "d": {}, "g": ""})
    tree.link("d", "e", err=EPERM)
    tree.link("none", "e", err=ENOENT)
    tree.link("f", "g", err=EEXIST)
    tree.link("f", "none/e", err=ENOENT)
    assert tree.stat("f").nlink == 1


def test_link_keeps_times_and_content(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * 100_000, mode=0o4711, uid=9)})
    before = tree.stat("f")
    tree.link("f", "g")
    after = tree.stat("g")
    assert (after.mtime_ns, after.mode, after.uid, after.size) == (
        before.mtime_ns,
        before.mode,
        before.uid,
        before.size,
    )
    assert after.ctime_ns > before.ctime_ns


def test_many_links(stack: StackMaker) -> None:
    layer: dict[str, str | Link] = {"f": "data"}
    layer |= {f"l{number}": Link("f") for number in range(200)}
    tree = stack(layer)
    assert tree.stat("l7").nlink == 201
    tree.write("l100", b"DATA")
    assert {tree.read(f"l{number}") for number in range(200)} == {b"DATA"}
    for number in range(199):
        tree.unlink(f"l{number}")
    tree.remount()
    assert_one_file(tree, "f", "l199", data=b"DATA")


def test_an_open_twin_sees_the_write_by_another_name(stack: StackMaker) -> None:
    tree = stack(TWINS)
    handle = tree.open("a", os.O_RDONLY)
    assert handle.read() == b"old data"
    tree.write("c", b"NEW")
    assert handle.read() == b"NEW data"
    handle.close()
    assert tree.read("a") == b"NEW data"


def test_twins_of_two_layers_do_not_mix(stack: StackMaker) -> None:
    tree = stack({"a": "one", "b": Link("a")}, {"c": "two", "d": Link("c")})
    tree.write("b", b"ONE")
    tree.write("c", b"TWO")
    assert_one_file(tree, "a", "b", data=b"ONE")
    assert_one_file(tree, "c", "d", data=b"TWO")
    tree.remount()
    assert_one_file(tree, "a", "b", data=b"ONE")
    assert_one_file(tree, "c", "d", data=b"TWO")


def test_upper_twins_after_commit(stack: StackMaker) -> None:
    tree = stack({"f": "data"})
    tree.link("f", "g")
    tree.create("n", b"new")
    tree.link("n", "m")
    tree.rotate()
    assert_one_file(tree, "f", "g", data=b"data")
    assert_one_file(tree, "n", "m", data=b"new")
    tree.write("g", b"DATA")
    tree.write("m", b"NEW")
    assert_one_file(tree, "f", "g", data=b"DATA")
    tree.remount()
    assert_one_file(tree, "f", "g", data=b"DATA")
    assert_one_file(tree, "n", "m", data=b"NEW")


LOST = pytest.mark.deviates(
    "kernel", reason="an upper used as a layer without its index directory has lost its hard links"
)


@LOST
@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("directory", ["d", "moved"])
def test_a_commit_makes_a_directory_for_a_twin(stack: StackMaker, directory: str, opaque: bool) -> None:
    """It leads where the one below it leads, which was moved by an earlier layer or is opaque; it hides nothing."""
    mark: OpaqueForm | None = "trusted" if opaque else None
    tree = stack({"d": Dir({"twin": "data", "other": "o"}, opaque=mark), "f": Link("d/twin")}, {"d": {}})
    if directory != "d":
        tree.rename("d", directory)
        tree.rotate()
    tree.write("f", b"DATA")
    tree.rotate()
    assert_one_file(tree, "f", f"{directory}/twin", data=b"DATA")
    assert tree.names(directory) == ["other", "twin"]


@LOST
def test_directories_that_a_commit_makes_for_a_twin_look_as_before(stack: StackMaker) -> None:
    inner = Dir({"twin": "data"}, mode=0o3751, uid=7, gid=8, mtime_ns=10**18, xattrs={"user.k": b"v"})
    outer = Dir({"inner": inner}, xattrs={DEFAULT: acl(7, 5, 0, users={77: 4}, mask=5)})
    tree = stack({"outer": outer, "f": Link("outer/inner/twin")})
    tree.write("f", b"DATA")
    before = dump(tree)
    tree.rotate()
    assert not differences(before, dump(tree))


@pytest.mark.on("fs", "fuse")
def test_a_directory_of_a_layer_that_keeps_owners_in_attributes_is_made_for_a_twin(stack: StackMaker) -> None:
    owner = "user.containers.override_stat"
    inner = Dir({"twin": "data"}, mode=0o755, xattrs={owner: b"1000:1001:0710"})
    tree = stack(Dir({"d": inner, "f": Link("d/twin")}, xattrs={owner: b"0:0:0755"}))
    tree.write("f", b"DATA")
    before = dump(tree)
    tree.rotate()
    assert not differences(before, dump(tree))
    found = tree.stat("d")
    assert (oct(found.mode), found.uid, found.gid) == ("0o40710", 1000, 1001)
