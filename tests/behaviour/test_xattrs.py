"""Extended attributes: the user's own pass through, ours stay hidden, escaped ones nest."""

import os
from errno import E2BIG, EEXIST, ENODATA, ENOSPC, EOPNOTSUPP, EPERM, ERANGE

import pytest

from tests.support.spec import Dir, File, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

FLAGS_CREATE, FLAGS_REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_set_get_list_remove(stack: StackMaker, where: str) -> None:
    layer: Spec = {"f": File(xattrs={"user.a": b"1", "trusted.b": b"2"}), "d": Dir({}, xattrs={"user.a": b"1"})}
    tree = stack(layer if where == "lower" else {}, upper=layer if where == "upper" else {})
    assert tree.listxattr("f") == ["trusted.b", "user.a"]
    for path in ("f", "d"):
        tree.setxattr(path, "user.new", b"x" * 1000)
        tree.setxattr(path, "user.a", b"changed")
        tree.setxattr(path, "user.empty", b"")
        assert tree.getxattr(path, "user.new") == b"x" * 1000
        assert tree.getxattr(path, "user.empty") == b""
        tree.removexattr(path, "user.new")
        tree.getxattr(path, "user.new", err=ENODATA)
        tree.removexattr(path, "user.new", err=ENODATA)
    tree.remount()
    assert tree.listxattr("d") == ["user.a", "user.empty"]
    assert tree.getxattr("f", "user.a") == b"changed"


def test_create_and_replace(stack: StackMaker) -> None:
    tree = stack({"f": File(xattrs={"user.a": b"1"})})
    tree.setxattr("f", "user.a", b"2", FLAGS_CREATE, err=EEXIST)
    tree.setxattr("f", "user.b", b"2", FLAGS_REPLACE, err=ENODATA)
    assert tree.getxattr("f", "user.a") == b"1"
    assert tree.listxattr("f") == ["user.a"]
    tree.setxattr("f", "user.a", b"2", FLAGS_REPLACE)
    tree.setxattr("f", "user.b", b"3", FLAGS_CREATE)
    assert (tree.getxattr("f", "user.a"), tree.getxattr("f", "user.b")) == (b"2", b"3")


@pytest.mark.on("plain", "fuse", "kernel")
def test_symlinks_carry_trusted_attributes_only(stack: StackMaker) -> None:
    tree = stack({"l": Symlink(target="x", xattrs={"trusted.k": b"v"})})
    assert tree.getxattr("l", "trusted.k") == b"v"
    tree.setxattr("l", "user.k", b"v", err=EPERM)
    tree.setxattr("l", "trusted.k", b"w")
    assert tree.getxattr("l", "trusted.k") == b"w"


@pytest.mark.on("plain", "fuse", "kernel")
def test_limits(stack: StackMaker) -> None:
    tree = stack({"f": ""})
    name = "user." + "n" * 250
    tree.setxattr("f", name, b"v")
    assert tree.listxattr("f") == [name]
    tree.setxattr("f", name + "n", b"v", err=ERANGE)
    tree.setxattr("f", "user.big", b"x" * 65537, err=E2BIG)
    tree.setxattr("f", "user.big", b"x" * 65000, err=ENOSPC)
    tree.setxattr("f", "unknown.k", b"v", err=EOPNOTSUPP)


def test_a_merged_directory_shows_the_top_only(stack: StackMaker) -> None:
    tree = stack({"d": Dir({}, xattrs={"user.top": b"1"})}, {"d": Dir({}, xattrs={"user.below": b"2"})})
    assert tree.listxattr("d") == ["user.top"]
    tree.setxattr("d", "user.new", b"3")
    assert tree.listxattr("d") == ["user.new", "user.top"]
    tree.getxattr("d", "user.below", err=ENODATA)


OURS = ("opaque", "redirect", "metacopy", "origin", "impure", "nlink", "whiteout", "uuid", "protattr", "unknown")


@pytest.mark.on("fs", "fuse", "kernel")
def test_our_own_attributes_are_hidden_and_theirs_are_kept(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x"), "d": {"x": ""}})
    tree.chmod("f", 0o600)
    tree.create("d/new")
    tree.remove_tree("d")
    tree.mkdir("d")
    for path in ("f", "d", ""):
        assert tree.listxattr(path) == []
        for suffix in OURS:
            tree.getxattr(path, f"trusted.overlay.{suffix}", err=ENODATA)
            tree.removexattr(path, f"trusted.overlay.{suffix}", err=ENODATA)
    assert tree.names("d") == []


@pytest.mark.on("fs", "fuse", "kernel")
@pytest.mark.parametrize("suffix", ["opaque", "redirect", "metacopy", "anything"])
def test_marks_cannot_be_forged(stack: StackMaker, suffix: str) -> None:
    """An attribute that a user sets under our prefix is escaped: it reads back unchanged and has no effect."""
    tree = stack({"d": {"below": ""}, "f": "data"}, upper={"d": {}})
    for path in ("d", "f"):
        tree.setxattr(path, f"trusted.overlay.{suffix}", b"y")
        assert tree.getxattr(path, f"trusted.overlay.{suffix}") == b"y"
        assert tree.listxattr(path) == [f"trusted.overlay.{suffix}"]
    assert tree.stack.upper is not None
    assert os.getxattr(tree.stack.upper / "d", f"trusted.overlay.overlay.{suffix}") == b"y"
    tree.remount()
    assert tree.names("d") == ["below"]
    assert tree.read("f") == b"data"
    assert tree.getxattr("d", f"trusted.overlay.{suffix}") == b"y"
    tree.removexattr("d", f"trusted.overlay.{suffix}")
    assert tree.listxattr("d") == []


@pytest.mark.on("fs", "fuse", "kernel")
def test_escaped_attributes_of_a_layer_are_shown_one_level_less(stack: StackMaker) -> None:
    marks = {"trusted.overlay.overlay.opaque": b"y", "trusted.overlay.overlay.overlay.redirect": b"/x"}
    tree = stack({"d": Dir({}, xattrs=marks)}, {"d": {"below": ""}})
    assert tree.listxattr("d") == ["trusted.overlay.opaque", "trusted.overlay.overlay.redirect"]
    assert tree.getxattr("d", "trusted.overlay.opaque") == b"y"
    assert tree.names("d") == ["below"]
    tree.chmod("d", 0o700)
    assert tree.getxattr("d", "trusted.overlay.overlay.redirect") == b"/x"
    tree.remount()
    assert tree.listxattr("d") == ["trusted.overlay.opaque", "trusted.overlay.overlay.redirect"]


@pytest.mark.on("fs", "fuse")
def test_the_other_prefix_is_escaped_too(stack: StackMaker) -> None:
    """Project rule; to the kernel the other prefix is ordinary."""
    tree = stack({"d": {"below": ""}}, upper={"d": {}})
    tree.setxattr("d", "user.overlay.opaque", b"y")
    assert tree.getxattr("d", "user.overlay.opaque") == b"y"
    assert tree.listxattr("d") == ["user.overlay.opaque"]
    tree.remount()
    assert tree.names("d") == ["below"]
    assert tree.getxattr("d", "user.overlay.opaque") == b"y"


@pytest.mark.on("fs", "fuse")
def test_marks_of_other_programs_are_private(stack: StackMaker) -> None:
    tree = stack({"d": Dir({"below": ""}, xattrs={"user.fuseoverlayfs.origin": b"x\0"})}, upper={"d": {}})
    tree.setxattr("d", "user.fuseoverlayfs.opaque", b"y", err=EPERM)
    tree.getxattr("d", "user.fuseoverlayfs.origin", err=ENODATA)
    assert tree.listxattr("d") == []
    assert tree.names("d") == ["below"]


@pytest.mark.on("fs", "fuse", "kernel")
def test_an_escaped_name_that_gets_too_long(stack: StackMaker) -> None:
    tree = stack({"f": ""})
    room = 255 - len("trusted.overlay.")
    tree.setxattr("f", "trusted.overlay." + "n" * (room - len("overlay.")), b"v")
    tree.setxattr("f", "trusted.overlay." + "n" * room, b"v", err=EOPNOTSUPP)


@pytest.mark.on("fs", "fuse", "kernel")
def test_a_name_that_only_resembles_ours_is_ordinary(stack: StackMaker) -> None:
    tree = stack({"f": File(xattrs={"trusted.overlayfsrz": b"v"})})
    assert tree.listxattr("f") == ["trusted.overlayfsrz"]
    tree.setxattr("f", "trusted.overlayfs.x", b"w")
    assert tree.stack.upper is not None
    assert os.getxattr(tree.stack.upper / "f", "trusted.overlayfs.x") == b"w"


@pytest.mark.on("fs", "fuse", "kernel")
def test_private_marks_are_not_copied_up(stack: StackMaker) -> None:
    tree = stack({"d": Dir({"x": ""}, opaque="trusted", xattrs={"user.k": b"v"})}, {"d": {"below": ""}})
    tree.create("d/new")
    tree.remount()
    assert tree.stack.upper is not None
    assert "trusted.overlay.opaque" not in os.listxattr(tree.stack.upper / "d")
    assert tree.names("d") == ["new", "x"]


@pytest.mark.on("fs", "fuse", "kernel")
def test_an_overlay_inside_the_overlay(stack: StackMaker) -> None:
    """A nested stack whose layers are in this one: its opaque marks are escaped."""
    tree = stack({"l": {"d": {"below": ""}}, "u": {"d": {}}})
    tree.setxattr("u/d", "trusted.overlay.opaque", b"y")
    tree.rename("u", "v")
    assert tree.getxattr("v/d", "trusted.overlay.opaque") == b"y"
    assert tree.names("l/d") == ["below"]
