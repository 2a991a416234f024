"""Layers and uppers on common file systems: the same behaviour, or a message about what is off."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.acl import ACCESS, acl
from tests.support.disks import KINDS, disk
from tests.support.drivers import FuseMount, Tree
from tests.support.dump import differences, dump
from tests.support.spec import Dir, File, Link, Special, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker, stack_maker

pytestmark = pytest.mark.on("fs", "fuse", "kernel")


XINO = "keeps numbers apart and stable over several file systems only with xino"


class DiskMaker(StackMaker):
    """A stack maker with disks that outlive its stacks."""

    disks: ExitStack

    def disk(self, kind: str) -> Path:
        """A fresh file system of this kind, mounted until the test ends."""
        return self.disks.enter_context(disk(kind, self.place / f"disk-{kind}-{len(os.listdir(self.place))}"))


@pytest.fixture
def disks(driver: str, place: Path) -> Iterator[DiskMaker]:
    """Makes disks and stacks; the stacks end first."""
    with ExitStack() as after, stack_maker(driver, place, DiskMaker) as maker:
        maker.disks = after.enter_context(ExitStack())
        yield maker


LAYER: Spec = {
    "f": File(
        b"data" * 5000, mode=0o4711, uid=5, gid=6, xattrs={"user.k": b"v", ACCESS: acl(7, 1, 1, users={9: 4}, mask=1)}
    ),
    "sparse": File(pieces=((1 << 20, b"x"),), size=4 << 20),
    "twin": Link("f"),
    "d": Dir({"x": "1", "s": {"y": "2"}}, mode=0o2770, gid=7),
    "l": Symlink(target="f"),
    "p": Special(kind="p"),
    "c": Special(kind="c", major=1, minor=3),
    "gone": "bye",
}


def use(tree: Tree) -> None:
    """A short use of a mount: look, change something of every kind, remount, look again."""
    before = dump(tree)
    tree.chmod("f", 0o4755)
    tree.chmod("f", 0o4711)
    tree.write("sparse", b"y", 1 << 20)
    tree.write("sparse", b"x", 1 << 20)
    tree.unlink("gone")
    tree.create("d/new", b"new")
    tree.rename("d", "e")
    tree.rename("e", "d")
    tree.remove_tree("d/s")
    tree.mkdir("d/s")
    tree.link("p", "p2")
    for path in ("sparse", "d", "", "d/s"):
        tree.utime(path, 1, 2)
    after = dump(tree)
    assert after[b"f"] == before[b"f"]
    assert after[b"sparse"].content == before[b"sparse"].content and after[b"sparse"].sparse
    assert sorted(after) == [b"", b"c", b"d", b"d/new", b"d/s", b"d/x", b"f", b"l", b"p", b"p2", b"sparse", b"twin"]
    numbers = {path: tree.stat(path).ino for path in after}
    tree.remount()
    assert not differences(after, dump(tree))
    assert {path: tree.stat(path).ino for path in after} == numbers


@pytest.mark.parametrize("kind", KINDS)
def test_all_on_one(disks: DiskMaker, kind: str) -> None:
    use(disks(LAYER, base=disks.disk(kind) / "b"))


@pytest.mark.deviates("kernel", reason=XINO)
@pytest.mark.parametrize(("lower", "upper"), [("xfs", "ext4"), ("btrfs", "tmpfs"), ("tmpfs", "btrfs"), ("ext4", "xfs")])
def test_lower_and_upper_on_different_ones(disks: DiskMaker, lower: str, upper: str) -> None:
    use(disks(LAYER, base=disks.disk(upper) / "b", lower_on=[disks.disk(lower)]))


@pytest.mark.deviates("kernel", reason=XINO)
def test_three_layers_on_three(disks: DiskMaker) -> None:
    layers: list[Spec] = [{"d": Dir({"top": ""}, mode=0o2770, gid=7)}, LAYER, {"d": {"low": ""}}]
    places = [disks.disk(kind) for kind in ("xfs", "btrfs", "tmpfs")]
    tree = disks(*layers, base=disks.disk("ext4") / "b", lower_on=places)
    assert tree.names("d") == ["low", "s", "top", "x"]
    found = {path: tree.stat(path).ino for path in dump(tree)}
    assert len(set(found.values())) == len(found) - 1, "only the twins share a number"
    tree.write("d/x", b"X")
    tree.rename("d", "e")
    tree.chmod("e/low", 0o600)
    tree.remount()
    assert tree.names("e") == ["low", "s", "top", "x"]
    moved = {path.replace(b"e", b"d", 1): tree.stat(path).ino for path in dump(tree) if path.startswith(b"e")}
    assert moved == {path: ino for path, ino in found.items() if path.startswith(b"d")}


@pytest.mark.deviates("kernel", reason="an upper used as a layer without its index directory has lost its hard links")
def test_a_commit_over_several(disks: DiskMaker) -> None:
    tree = disks(LAYER, base=disks.disk("btrfs") / "b", lower_on=[disks.disk("xfs")])
    tree.write("d/x", b"X")
    tree.chmod("f", 0o600)
    before = dump(tree)
    tree.rotate()
    assert not differences(before, dump(tree))


@pytest.mark.on("fs", "command")
def test_an_upper_without_attributes(disks: DiskMaker) -> None:
    """ramfs has none: the mount works without the marks that need them, and reports it."""
    tree = disks({"d": {"f": "1", "s": {"x": ""}}, "f": "2"}, base=disks.disk("ramfs") / "b")
    assert "attribute" in notices(tree)
    live_without_a_feature(tree)


@pytest.mark.on("fs", "command")
def test_an_upper_without_device_whiteouts(disks: DiskMaker, place: Path) -> None:
    """On the kernel's overlayfs no 0:0 device can be made: whiteouts take another form, and the mount reports it."""
    outer = disks.disks.enter_context(stack_maker("kernel", place / "outer", StackMaker))({})
    tree = disks({"d": {"f": "1", "s": {"x": ""}}, "f": "2"}, base=outer.stack.mountpoint / "b")
    assert "whiteout" in notices(tree)
    live_without_a_feature(tree)


def notices(tree: Tree) -> str:
    """The messages of the mount about features that are off."""
    if isinstance(tree, FuseMount):
        return tree.messages
    from tests.support.drivers.overlay import FsDriver

    assert isinstance(tree, FsDriver)
    return "\n".join(tree.overlay.notices)


def live_without_a_feature(tree: Tree) -> None:
    """Deleting, creating and renaming work; what was deleted stays away over a remount."""
    tree.write("d/f", b"X")
    tree.unlink("f")
    tree.remove_tree("d/s")
    tree.mkdir("d/s")
    tree.create("d/s/new", b"new")
    tree.rename("d/f", "g")
    for _ in range(2):
        assert (tree.names(), tree.names("d"), tree.names("d/s")) == (["d", "g"], ["s"], ["new"])
        assert tree.read("g") == b"X"
        tree.remount()
    tree.remove_tree("d")
    tree.remount()
    assert tree.names() == ["g"]
