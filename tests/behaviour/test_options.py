"""Options that change what a mount shows or writes: each does what it says."""

import os
import re
import stat
from collections.abc import Iterator
from errno import EOPNOTSUPP
from pathlib import Path

import pytest

from tests.support.acl import ACCESS, DEFAULT, acl
from tests.support.drivers import Tree
from tests.support.drivers.base import Options
from tests.support.spec import Dir, File, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker
from tests.support.users import ALICE

pytestmark = pytest.mark.on("fuse")


def on_disk(tree: Tree, path: str) -> Path:
    """The path of an object of the upper on disk."""
    assert tree.stack.upper is not None
    return tree.stack.upper / path


def marks(tree: Tree) -> Iterator[tuple[str, str]]:
    """Every attribute in the upper, with the path that carries it."""
    assert tree.stack.upper is not None
    for where, directories, files in os.walk(tree.stack.upper):
        for name in directories + files:
            path = os.path.join(where, name)
            yield from ((path, mark) for mark in os.listxattr(path, follow_symlinks=False))


def owner(tree: Tree, path: str) -> tuple[int, int]:
    found = tree.stat(path)
    return found.uid, found.gid


MAPPED: Options = {"uidmapping": "0:100000:1000:5000:2000:1", "gidmapping": "0:200000:1000"}


def test_id_mappings(stack: StackMaker) -> None:
    """Triples of the id shown, the id on disk, and how many."""
    lower: Spec = {
        "root": File(uid=100_000, gid=200_000),
        "user": Dir({}, mode=0o777, uid=100_005, gid=200_006),
        "second": Symlink(target="x", uid=2000, gid=200_001),
        "foreign": File(uid=7, gid=7),
    }
    tree = stack(lower, upper=Dir({}, mode=0o777, uid=100_000, gid=200_000), options=MAPPED)
    assert [owner(tree, name) for name in ("root", "user", "second", "foreign")] == [
        (0, 0),
        (5, 6),
        (5000, 1),
        (65534, 65534),
    ]
    tree.create("new")
    tree.chown("root", 8, 9)
    tree.chmod("user", 0o770)
    assert [owner(tree, name) for name in ("new", "root", "user")] == [(0, 0), (8, 9), (5, 6)]
    disk = {name: on_disk(tree, name).stat() for name in ("new", "root", "user")}
    assert (disk["new"].st_uid, disk["new"].st_gid) == (100_000, 200_000)
    assert (disk["root"].st_uid, disk["root"].st_gid) == (100_008, 200_009)
    assert (disk["user"].st_uid, disk["user"].st_gid) == (100_005, 200_006)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"squash_to_root": None}, (0, 0)),
        ({"squash_to_uid": "1000", "squash_to_gid": "100"}, (1000, 100)),
        ({"squash_to_uid": "1000"}, (1000, 6)),
    ],
)
def test_squashing(stack: StackMaker, options: Options, shown: tuple[int, int]) -> None:
    tree = stack({"f": File(uid=5, gid=6), "l": Symlink(target="f", uid=5, gid=6)}, options=options)
    assert owner(tree, "f") == owner(tree, "l") == shown
    tree.chmod("f", 0o600)
    tree.create("new")
    assert owner(tree, "f") == shown
    assert tree.stat("new").uid == shown[0]


def test_static_nlink(stack: StackMaker) -> None:
    tree = stack({"d": {"a": {}, "b": {}}}, {"d": {"c": {}}}, options={"static_nlink": None})
    assert (tree.stat("d").nlink, tree.stat("").nlink) == (1, 1)


def test_noacl(stack: StackMaker) -> None:
    entries = {DEFAULT: acl(7, 5, 0, users={1234: 6}, mask=7)}
    tree = stack({"d": Dir({"f": ""}, xattrs=entries)}, options={"noacl": None})
    tree.setxattr("d/f", ACCESS, acl(7, 5, 1), err=EOPNOTSUPP)
    tree.getxattr("d", DEFAULT, err=EOPNOTSUPP)
    tree.create("d/new", mode=0o644)
    assert tree.mode("d/new") == 0o644


def test_volatile_leaves_a_mark_while_it_lasts(stack: StackMaker) -> None:
    tree = stack({"f": "1"}, options={"volatile": None})
    assert tree.stack.work is not None
    mark = tree.stack.work / "work" / "incompat" / "volatile"
    assert (mark / "dirty").exists()
    handle = tree.open("f", os.O_RDWR)
    handle.write(b"2")
    handle.fsync()
    handle.close()
    tree.close()
    assert not mark.exists()
    tree.reopen()
    assert tree.read("f") == b"2"


def test_a_volatile_mount_that_died_is_refused(stack: StackMaker) -> None:
    tree = stack({"f": "1"}, options={"volatile": None})
    tree.close()
    assert tree.stack.work is not None
    mark = tree.stack.work / "work" / "incompat" / "volatile"
    mark.mkdir(parents=True)
    (mark / "dirty").touch()
    with pytest.raises(AssertionError, match=re.escape(str(mark))):
        tree.reopen()
    (mark / "dirty").unlink()
    mark.rmdir()
    mark.parent.rmdir()
    tree.reopen()
    assert tree.read("f") == b"1"


@pytest.mark.parametrize(
    ("option", "name"), [("1", "security.fuseoverlayfs.override_stat"), ("2", "user.containers.override_stat")]
)
def test_ownership_in_attributes(stack: StackMaker, option: str, name: str) -> None:
    """Owner and mode are shown as set and stored in an attribute; on disk the daemon owns the file."""
    tree = stack(
        {"f": File(b"x", mode=0o640, uid=5, gid=6), "d": Dir({}, mode=0o777)}, options={"xattr_permissions": option}
    )
    tree.run_as(ALICE, lambda: tree.create("d/new", b"data", mode=0o600))
    tree.run_as(ALICE, lambda: tree.mkdir("d/dir", mode=0o711))
    tree.chown("f", 7, 8)
    for _ in range(2):
        assert (owner(tree, "d/new"), tree.mode("d/new")) == ((1000, 1000), 0o600)
        assert (owner(tree, "d/dir"), tree.mode("d/dir")) == ((1000, 1000), 0o711)
        assert (owner(tree, "f"), tree.mode("f")) == ((7, 8), 0o640)
        assert name not in tree.listxattr("f")
        tree.remount()
    assert os.getxattr(on_disk(tree, "d/new"), name).split(b":")[:2] == [b"1000", b"1000"]
    assert on_disk(tree, "d/new").stat().st_uid == 0


def test_redirect_dir_off_moves_directories_without_redirects(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "1", "s": {"g": "2"}}}, {"d": {"h": "3"}}, options={"redirect_dir": "off"})
    tree.rename("d", "e")
    assert (tree.names(), tree.names("e"), tree.read("e/s/g")) == (["e"], ["f", "h", "s"], b"2")
    tree.remount()
    assert (tree.names(), tree.names("e"), tree.read("e/s/g")) == (["e"], ["f", "h", "s"], b"2")
    assert not [mark for _, mark in marks(tree) if mark.endswith(".redirect")]


def test_metacopy_off_copies_the_data(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * 100_000)}, options={"metacopy": "off"})
    tree.chmod("f", 0o600)
    tree.rename("f", "g")
    assert on_disk(tree, "g").read_bytes() == b"x" * 100_000
    assert not [mark for _, mark in marks(tree) if mark.endswith((".metacopy", ".redirect"))]


def test_userxattr_writes_the_other_prefix(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "1"}, "f": "2"}, options={"userxattr": None})
    tree.remove_tree("d")
    tree.mkdir("d")
    tree.unlink("f")
    tree.setxattr("d", "user.k", b"v")
    assert os.getxattr(on_disk(tree, "d"), "user.overlay.opaque") == b"y"
    assert stat.S_ISCHR(on_disk(tree, "f").lstat().st_mode)
    assert not [mark for _, mark in marks(tree) if mark.startswith("trusted.")]
    assert tree.listxattr("d") == ["user.k"]
    tree.remount()
    assert (tree.names(), tree.names("d")) == (["d"], [])


def test_ino32_numbers_fit(stack: StackMaker) -> None:
    tree = stack({"d": {"f": ""}}, {"e": ""}, options={"ino32_t": None})
    tree.create("new")
    assert all(tree.stat(path).ino < 2**32 for path in ("", "d", "d/f", "e", "new"))


def test_suid_and_dev_on_request(stack: StackMaker) -> None:
    tree = stack({"f": ""}, options={"suid": None, "dev": None, "noexec": None})
    found = tree.statvfs().f_flag
    assert not found & (os.ST_NOSUID | os.ST_NODEV)
    assert found & os.ST_NOEXEC
