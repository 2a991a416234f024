"""Creating: every kind of object in every state of the name, and what a new object looks like."""

import os
import stat
from errno import EEXIST, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM

import pytest

from tests.support.acl import ACCESS, DEFAULT, acl
from tests.support.drivers import Tree
from tests.support.spec import Dir, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker
from tests.support.users import ALICE, User

KINDS = ("file", "dir", "symlink", "fifo", "device", "link")


def make(tree: Tree, kind: str, path: str, err: int | None = None) -> None:
    match kind:
        case "file":
            tree.create(path, b"new", err=err)
        case "dir":
            tree.mkdir(path, err=err)
        case "symlink":
            tree.symlink("target", path, err=err)
        case "fifo":
            tree.mkfifo(path, err=err)
        case "device":
            tree.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3), err=err)
        case "link":
            tree.link("source", path, err=err)


def check_made(tree: Tree, kind: str, path: str) -> None:
    mode = tree.stat(path).mode
    match kind:
        case "file":
            assert tree.read(path) == b"new"
        case "dir":
            assert tree.names(path) == []
        case "symlink":
            assert tree.readlink(path) == "target"
        case "fifo":
            assert stat.S_ISFIFO(mode)
        case "device":
            assert stat.S_ISCHR(mode) and tree.stat(path).rdev == os.makedev(1, 3)
        case "link":
            assert tree.stat(path).ino == tree.stat("source").ino


def each_kind(content: Spec) -> Spec:
    """A directory for each kind of object, all alike."""
    return dict.fromkeys(KINDS, content)


STATES: dict[str, tuple[list[Spec], Spec]] = {
    "absent": ([each_kind({})], {}),
    "whiteout over a file": ([each_kind({"n": "old"})], each_kind({"n": Whiteout()})),
    "whiteout over a directory": ([each_kind({"n": {"old": ""}})], each_kind({"n": Whiteout()})),
    "whiteout in the middle": ([each_kind({"n": Whiteout()}), each_kind({"n": {"old": ""}})], {}),
}


@pytest.mark.parametrize("state", STATES)
def test_a_free_name_can_be_taken(stack: StackMaker, state: str) -> None:
    lower, upper = STATES[state]
    tree = stack(*lower, {"source": "s"}, upper=upper)
    for kind in KINDS:
        make(tree, kind, f"{kind}/n")
        check_made(tree, kind, f"{kind}/n")
        assert tree.names(kind) == ["n"]
    tree.remount()
    for kind in KINDS:
        check_made(tree, kind, f"{kind}/n")
        assert tree.names(kind) == ["n"]


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_taken_name_stays(stack: StackMaker, where: str) -> None:
    taken: Spec = {"d": {"file": "old", "dir": {"old": ""}, "link": Symlink(target="none")}}
    tree = stack(taken if where == "lower" else {"d": {}}, {"source": "s"}, upper=taken if where == "upper" else {})
    for name in ("file", "dir", "link"):
        before = tree.stat(f"d/{name}")
        for kind in KINDS:
            make(tree, kind, f"d/{name}", err=EEXIST)
        assert tree.stat(f"d/{name}") == before


def test_after_removing_a_name_of_the_lower_layer_it_can_be_taken(stack: StackMaker) -> None:
    tree = stack(each_kind({"n": {"old": "", "more": {"x": ""}}, "f": "old"}), {"source": "s"})
    for kind in KINDS:
        tree.remove_tree(f"{kind}/n")
        tree.unlink(f"{kind}/f")
        make(tree, kind, f"{kind}/n")
        make(tree, kind, f"{kind}/f")
        check_made(tree, kind, f"{kind}/n")
    tree.remount()
    for kind in KINDS:
        check_made(tree, kind, f"{kind}/n")
        check_made(tree, kind, f"{kind}/f")


def test_parents_are_copied_up_with_their_attributes(stack: StackMaker) -> None:
    outer = Dir({"inner": Dir({"deep": Dir({}, mode=0o2775, gid=77)}, mode=0o1777)}, mode=0o750, uid=11, gid=12)
    tree = stack({"outer": outer})
    before = [tree.stat(path) for path in ("outer", "outer/inner", "outer/inner/deep")]
    tree.create("outer/inner/deep/f", b"x")
    after = [tree.stat(path) for path in ("outer", "outer/inner", "outer/inner/deep")]
    assert [(s.mode, s.uid, s.gid, s.ino) for s in after] == [(s.mode, s.uid, s.gid, s.ino) for s in before]
    assert [s.mtime_ns for s in after[:2]] == [s.mtime_ns for s in before[:2]]
    assert after[2].mtime_ns > before[2].mtime_ns


def test_a_parent_that_is_missing_or_not_a_directory(stack: StackMaker) -> None:
    tree = stack({"f": ""})
    for kind in KINDS[:5]:
        make(tree, kind, "none/n", err=ENOENT)
        make(tree, kind, "f/n", err=ENOTDIR)


@pytest.mark.on("fs", "fuse", "kernel")
def test_a_whiteout_cannot_be_made_by_hand(stack: StackMaker) -> None:
    tree = stack({"f": "below"})
    tree.mknod("w", stat.S_IFCHR | 0o600, 0, err=EPERM)
    tree.unlink("f")
    tree.mknod("f", stat.S_IFCHR, 0, err=EPERM)
    tree.stat("f", err=ENOENT)


def test_devices_and_sockets(stack: StackMaker) -> None:
    tree = stack({})
    tree.mknod("c", stat.S_IFCHR | 0o640, os.makedev(5, 1))
    tree.mknod("b", stat.S_IFBLK | 0o600, os.makedev(7, 300))
    tree.mknod("s", stat.S_IFSOCK | 0o700)
    tree.mknod("f", stat.S_IFREG | 0o620)
    found = {name: tree.stat(name) for name in "cbsf"}
    assert {name: oct(s.mode) for name, s in found.items()} == {
        "c": "0o20640",
        "b": "0o60600",
        "s": "0o140700",
        "f": "0o100620",
    }
    assert (found["c"].rdev, found["b"].rdev) == (os.makedev(5, 1), os.makedev(7, 300))


def test_a_symlink_has_the_length_of_its_target(stack: StackMaker) -> None:
    tree = stack({})
    target = "t" * 4095
    tree.symlink(target, "l")
    assert tree.readlink("l") == target
    assert tree.stat("l").size == 4095
    assert stat.S_ISLNK(tree.stat("l").mode)


def test_modes_are_as_sent(stack: StackMaker) -> None:
    modes = (0o000, 0o444, 0o755, 0o777, 0o4755, 0o2755, 0o1777)
    lower: Spec = {"d": {f"{kind}{mode:o}": "" for mode in modes for kind in "fd"}}
    upper: Spec = {"d": {f"{kind}{mode:o}": Whiteout() for mode in modes for kind in "fd"}}
    tree = stack(lower, upper=upper)
    for mode in modes:
        for name in (f"f{mode:o}", f"new-f{mode:o}"):
            tree.create(f"d/{name}", b"", mode=mode)
            assert tree.mode(f"d/{name}") == mode
        for name in (f"d{mode:o}", f"new-d{mode:o}"):
            tree.mkdir(f"d/{name}", mode=mode & 0o1777)
            assert tree.mode(f"d/{name}") == mode & 0o1777
        tree.mkfifo(f"d/p{mode:o}", mode=mode)
        assert tree.mode(f"d/p{mode:o}") == mode


def test_the_umask_is_applied_once(stack: StackMaker) -> None:
    tree = stack({"d": Dir({"gone": ""}, mode=0o777)}, upper={"d": Dir({"gone": Whiteout()}, mode=0o777)})

    def act() -> None:
        tree.create("d/f", b"", mode=0o666)
        tree.create("d/gone", b"", mode=0o666)
        tree.mkdir("d/s", mode=0o777)
        tree.mkfifo("d/p", mode=0o666)

    tree.run_as(User(1000, 1000, umask=0o027), act)
    assert [tree.mode(f"d/{name}") for name in ("f", "gone", "s", "p")] == [0o640, 0o640, 0o750, 0o640]


@pytest.mark.parametrize("state", ["absent", "whiteout"])
def test_a_new_object_belongs_to_its_maker(stack: StackMaker, state: str) -> None:
    names = ("f", "d", "l", "p")
    old: Spec = dict.fromkeys(names, "") if state == "whiteout" else {}
    tree = stack({"x": Dir(old, mode=0o777)}, upper={"x": Dir({name: Whiteout() for name in old}, mode=0o777)})

    def act() -> None:
        tree.create("x/f", b"")
        tree.mkdir("x/d")
        tree.symlink("t", "x/l")
        tree.mkfifo("x/p")

    tree.run_as(User(1000, 1001), act)
    assert {(tree.stat(f"x/{name}").uid, tree.stat(f"x/{name}").gid) for name in names} == {(1000, 1001)}
    tree.remount()
    assert {(tree.stat(f"x/{name}").uid, tree.stat(f"x/{name}").gid) for name in names} == {(1000, 1001)}


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_setgid_directory_passes_its_group_on(stack: StackMaker, where: str) -> None:
    shared: Spec = {"g": Dir({}, mode=0o2777, gid=7)}
    tree = stack(shared if where == "lower" else {}, upper=shared if where == "upper" else {})

    def act() -> None:
        tree.create("g/f", b"", mode=0o644)
        tree.mkdir("g/d", mode=0o755)
        tree.symlink("t", "g/l")
        tree.mkdir("g/d/again", mode=0o700)

    tree.run_as(ALICE, act)
    assert [tree.stat(f"g/{name}").gid for name in ("f", "d", "l", "d/again")] == [7] * 4
    assert [tree.mode(f"g/{name}") for name in ("f", "d", "d/again")] == [0o644, 0o2755, 0o2700]


@pytest.mark.on("plain", "fuse", "kernel")
def test_setgid_on_a_new_file_in_a_foreign_setgid_directory_is_dropped(stack: StackMaker) -> None:
    """Only on a mount: the kernel clears the bit before it sends the request."""
    tree = stack({"g": Dir({}, mode=0o2777, gid=7)})
    tree.run_as(ALICE, lambda: tree.create("g/f", b"", mode=0o2775))
    assert tree.mode("g/f") == 0o775
    assert tree.stat("g/f").gid == 7


@pytest.mark.on("plain", "fuse", "kernel")
def test_setgid_on_a_new_file_stays_for_members_and_root(stack: StackMaker) -> None:
    tree = stack({"g": Dir({}, mode=0o2777, gid=7)})
    tree.run_as(User(1000, 1000, groups=(7,)), lambda: tree.create("g/member", b"", mode=0o2775))
    tree.create("g/root", b"", mode=0o2775)
    assert (tree.mode("g/member"), tree.mode("g/root")) == (0o2775, 0o2775)


DEFAULT_ACL = acl(7, 5, 0, users={1234: 6}, mask=7)


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_default_acl_is_inherited(stack: StackMaker, where: str) -> None:
    shared: Spec = {"d": Dir({}, mode=0o755, xattrs={DEFAULT: DEFAULT_ACL})}
    tree = stack(shared if where == "lower" else {}, upper=shared if where == "upper" else {})
    tree.create("d/f", b"", mode=0o666)
    tree.mkdir("d/s", mode=0o777)
    assert tree.getxattr("d/f", ACCESS) == acl(6, 5, 0, users={1234: 6}, mask=6)
    assert tree.mode("d/f") == 0o660
    assert tree.getxattr("d/s", DEFAULT) == DEFAULT_ACL
    assert tree.mode("d/s") == 0o770
    tree.create("d/s/deep", b"", mode=0o600)
    assert tree.mode("d/s/deep") == 0o600


@pytest.mark.on("plain", "fuse", "kernel")
@pytest.mark.deviates("pyfuse3", reason="libfuse's handshake applies the umask before we hear of it (documented limit)")
def test_a_default_acl_takes_precedence_over_the_umask(stack: StackMaker) -> None:
    tree = stack({"d": Dir({}, mode=0o777, xattrs={DEFAULT: DEFAULT_ACL})})
    tree.run_as(User(0, 0, umask=0o077), lambda: tree.create("d/f", b"", mode=0o666))
    assert tree.mode("d/f") == 0o660


def test_long_names(stack: StackMaker) -> None:
    name = "n" * 255
    tree = stack({"l" * 255: "lower"})
    tree.create(name, b"x")
    tree.mkdir("d" * 255)
    tree.create("d" * 255 + "/" + name, b"y")
    assert tree.read("d" * 255 + "/" + name) == b"y"
    tree.create("n" * 256, err=ENAMETOOLONG)
    tree.stat("n" * 256, err=ENAMETOOLONG)
    tree.unlink("l" * 255)
    tree.unlink(name)
    assert tree.names() == ["d" * 255]
    tree.remount()
    tree.stat("l" * 255, err=ENOENT)


@pytest.mark.on("plain", "fuse", "kernel")
def test_exclusive_creation_is_decided_once(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "old"}}, upper={"d": {"f": Whiteout()}})
    tree.create("d/f", b"mine")
    tree.create("d/f", b"yours", err=EEXIST)
    handle = tree.open("d/f", os.O_RDWR | os.O_CREAT)
    assert handle.read() == b"mine"
    handle.close()


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_file_without_write_permission_can_be_written_by_its_maker(stack: StackMaker) -> None:
    tree = stack({"d": Dir({}, mode=0o777)})

    def act() -> None:
        handle = tree.open("d/f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o000)
        handle.write(b"data")
        assert handle.read() == b"data"
        handle.close()

    tree.run_as(ALICE, act)
    assert tree.read("d/f") == b"data"
