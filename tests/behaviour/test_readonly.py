"""Without an upper: everything can be read and nothing changed."""

import os
from errno import ENOENT, EROFS

import pytest

from tests.support.drivers import Tree
from tests.support.spec import Dir, File, Symlink, Whiteout
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

pytestmark = pytest.mark.on("fs", "fuse", "kernel")

LAYERS: list[Spec] = [
    {"d": {"a": "1", "gone": Whiteout()}, "e": {}, "l": Symlink(target="d/a")},
    {"d": {"b": "2", "gone": "x"}, "f": File(b"data", mode=0o644, xattrs={"user.k": b"v"})},
]


def test_reading(stack: StackMaker) -> None:
    tree = stack(*LAYERS, upper=None)
    assert (tree.names(), tree.names("d")) == (["d", "e", "f", "l"], ["a", "b"])
    assert (tree.read("f"), tree.readlink("l")) == (b"data", "d/a")
    assert tree.getxattr("f", "user.k") == b"v"
    tree.stat("d/gone", err=ENOENT)
    handle = tree.open("f", os.O_RDONLY)
    handle.fsync()
    handle.close()


def test_changing(stack: StackMaker) -> None:
    tree = stack(*LAYERS, upper=None)
    before = {path: tree.stat(path) for path in ("", "d", "f", "l", "d/a")}
    tree.create("new", err=EROFS)
    tree.mkdir("new", err=EROFS)
    tree.symlink("x", "new", err=EROFS)
    tree.link("f", "new", err=EROFS)
    tree.mkfifo("new", err=EROFS)
    tree.unlink("f", err=EROFS)
    tree.rmdir("e", err=EROFS)
    tree.rename("f", "g", err=EROFS)
    tree.chmod("f", 0o600, err=EROFS)
    tree.chown("f", 1, 1, err=EROFS)
    tree.utime("f", 1, 1, err=EROFS)
    tree.truncate("f", 0, err=EROFS)
    tree.write("f", b"x", err=EROFS)
    tree.replace("f", b"x", err=EROFS)
    tree.setxattr("f", "user.n", b"", err=EROFS)
    tree.removexattr("f", "user.k", err=EROFS)
    assert {path: tree.stat(path) for path in before} == before


@pytest.mark.on("fuse", "kernel")
def test_the_mount_says_so(stack: StackMaker) -> None:
    tree = stack(*LAYERS, upper=None)
    assert tree.statvfs().f_flag & os.ST_RDONLY
    assert not os.access(tree.stack.mountpoint / "f", os.W_OK)


def test_one_layer(stack: StackMaker) -> None:
    if stack.driver == "kernel":
        tree: Tree = stack({"f": "1", "d": Dir({"x": ""})}, {}, upper=None)
    else:
        tree = stack({"f": "1", "d": Dir({"x": ""})}, upper=None)
    assert (tree.read("f"), tree.names("d")) == (b"1", ["x"])


@pytest.mark.on("fuse")
def test_an_upper_mounted_read_only(stack: StackMaker) -> None:
    tree = stack({"f": "1"}, upper={"u": "2"}, options={"ro": None})
    assert tree.names() == ["f", "u"]
    tree.create("n", err=EROFS)
    tree.write("u", b"x", err=EROFS)
