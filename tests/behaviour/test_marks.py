"""Every form of whiteout and opaque mark of docs/on-disk-format.md, in every position, ours and other programs'."""

import os
import stat
from errno import EINVAL, EIO, ENODATA, ENOENT

import pytest

from tests.support.drivers import Tree
from tests.support.spec import Dir, File, Link, OpaqueForm, Special, Whiteout, WhiteoutForm
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

pytestmark = pytest.mark.on("fs", "fuse")

BELOW: Spec = {"d": {"f": "below", "s": {"x": "below"}, "keep": "k"}}
POSITIONS = ("upper", "top", "middle", "lowest")


def placed(stack: StackMaker, marks: Spec, position: str) -> Tree:
    """A stack whose other layers hold BELOW under the marks, and nothing above them."""
    match position:
        case "upper":
            return stack(BELOW, upper=marks)
        case "top":
            return stack(marks, BELOW)
        case "middle":
            return stack({"other": ""}, marks, BELOW)
        case _:
            return stack({"other": ""}, marks)


def assert_gone(tree: Tree, *paths: str) -> None:
    """Neither looked up nor listed, before and after a remount."""
    for _ in range(2):
        for path in paths:
            tree.stat(path, err=ENOENT)
            parent, _, name = path.rpartition("/")
            assert name not in tree.names(parent)
        tree.remount()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("form", ["device", "file", "xattr"])
def test_whiteouts(stack: StackMaker, form: WhiteoutForm, position: str) -> None:
    tree = placed(stack, {"d": {"f": Whiteout(form), "s": Whiteout(form)}}, position)
    assert_gone(tree, "d/f", "d/s")
    assert tree.names("d") == ([] if position == "lowest" else ["keep"])
    tree.create("d/f", b"new")
    tree.mkdir("d/s")
    assert (tree.read("d/f"), tree.names("d/s")) == (b"new", [])
    tree.remount()
    assert (tree.read("d/f"), tree.names("d/s")) == (b"new", [])
    tree.unlink("d/f")
    tree.rmdir("d/s")
    assert_gone(tree, "d/f", "d/s")


@pytest.mark.on("kernel")
@pytest.mark.parametrize("position", POSITIONS[:3])
def test_device_whiteouts_are_the_kernels_own(stack: StackMaker, position: str) -> None:
    tree = placed(stack, {"d": {"f": Whiteout(), "s": Whiteout()}}, position)
    assert_gone(tree, "d/f", "d/s")
    assert tree.names("d") == ["keep"]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("form", ["trusted", "user", "fuse", "file"])
def test_opaque_directories(stack: StackMaker, form: OpaqueForm, position: str) -> None:
    tree = placed(stack, {"d": Dir({"own": "o", "s": {"y": ""}}, opaque=form)}, position)
    for _ in range(2):
        assert tree.names("d") == ["own", "s"]
        assert tree.names("d/s") == ["y"]
        tree.stat("d/f", err=ENOENT)
        tree.create("d/f", b"new")
        assert tree.read("d/f") == b"new"
        tree.unlink("d/f")
        tree.remount()
    tree.remove_tree("d")
    assert_gone(tree, "d")


def test_a_name_beside_its_whiteout_is_visible_and_cut_off(stack: StackMaker) -> None:
    marks: Spec = {"d": {"f": "own", ".wh.f": "", "s": {"own": ""}, ".wh.s": ""}}
    for position in ("upper", "middle"):
        tree = placed(stack, marks, position)
        assert tree.names("d") == ["f", "keep", "s"]
        assert tree.read("d/f") == b"own"
        assert tree.names("d/s") == ["own"]
        tree.stat("d/s/x", err=ENOENT)
        tree.unlink("d/f")
        tree.remove_tree("d/s")
        assert_gone(tree, "d/f", "d/s")


def test_reserved_names_are_never_visible(stack: StackMaker) -> None:
    marks: Spec = {
        "d": {
            ".wh.": "", ".wh..wh.plnk": "", ".wh..wh.aufs": "", ".wh.dir": {"x": ""},
            ".wh.dev": Special(kind="c", major=1, minor=3),
            ".wh..opq": Whiteout(), ".opq": "visible",
        },
    }  # fmt: skip
    for position in POSITIONS[:3]:
        tree = placed(stack, marks, position)
        assert tree.names("d") == [".opq", "f", "keep", "s"]
        for name in (".wh.", ".wh..wh.plnk", ".wh.dir", ".wh.dev", ".wh..opq"):
            tree.stat(f"d/{name}", err=ENOENT)


def test_reserved_names_cannot_be_made(stack: StackMaker) -> None:
    tree = stack({"f": "x", "d": {}})
    for name in (".wh.f", ".wh.", ".wh..wh..opq", "d/.wh.new"):
        tree.create(name, err=22)
        tree.mkdir(name, err=22)
        tree.symlink("t", name, err=22)
        tree.link("f", name, err=22)
        tree.rename("f", name, err=22)
        tree.mkfifo(name, err=22)
    assert tree.names() == ["d", "f"]
    tree.create("d/.whx")
    tree.create("d/x.wh.y")
    assert tree.names("d") == [".whx", "x.wh.y"]


def test_a_255_byte_whiteout(stack: StackMaker) -> None:
    names = {"n" * 255: "", "m" * 251: ""}
    tree = stack({"n" * 255: Whiteout("device"), "m" * 251: Whiteout("file")}, names)
    assert_gone(tree, *names)


def test_marks_of_other_shapes_do_not_count(stack: StackMaker) -> None:
    below: Spec = {name: {"below": ""} for name in ("yes", "no", "x", "fuse")}
    marks: Spec = {
        "yes": Dir({}, xattrs={"trusted.overlay.opaque": b"yes"}),
        "no": Dir({}, xattrs={"trusted.overlay.opaque": b"n"}),
        "x": Dir({}, xattrs={"trusted.overlay.opaque": b"x"}),
        "fuse": Dir({}, xattrs={"user.fuseoverlayfs.opaque": b"yes"}),
    }
    tree = stack({"other": ""}, marks, below)
    assert [tree.names(name) for name in ("yes", "no", "x")] == [["below"]] * 3
    assert tree.names("fuse") == []


def test_the_layer_root(stack: StackMaker) -> None:
    """The attribute is ignored there, as by the kernel; other programs mark a root that hides all by the file."""
    tree = stack(Dir({"own": ""}, opaque="trusted"), {"below": ""})
    assert tree.names() == ["below", "own"]
    tree = stack(Dir({"own": ""}, opaque="file"), {"below": ""})
    assert tree.names() == ["own"]
    tree.stat("below", err=ENOENT)
    tree.create("below", b"new")
    assert tree.names() == ["below", "own"]


def test_whiteouts_in_an_opaque_directory(stack: StackMaker) -> None:
    marks: Spec = {"d": Dir({"f": Whiteout(), "s": Whiteout("file"), "own": ""}, opaque="trusted")}
    for position in POSITIONS:
        tree = placed(stack, marks, position)
        assert tree.names("d") == ["own"]
        assert_gone(tree, "d/f", "d/s")
        tree.remove_tree("d")
        assert_gone(tree, "d")


def test_a_whiteout_in_a_directory_of_one_layer(stack: StackMaker) -> None:
    tree = stack({"only": {"w": Whiteout(), "x": ""}}, {"other": ""})
    assert tree.names("only") == ["x"]
    assert_gone(tree, "only/w")


def test_hard_linked_whiteouts(stack: StackMaker) -> None:
    tree = stack({"d": {"f": Whiteout(), "s": Link("d/f")}}, BELOW)
    assert_gone(tree, "d/f", "d/s")


def test_an_empty_file_is_no_whiteout(stack: StackMaker) -> None:
    full = File(b"data", xattrs={"trusted.overlay.whiteout": b""})
    tree = stack({"d": {"f": File(b""), "full": full}}, BELOW)
    assert tree.read("d/f") == b""
    assert tree.read("d/full") == b"data"


@pytest.mark.on("fs", "fuse", "kernel")
def test_what_we_write_is_a_device_and_an_opaque_mark(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "", "s": {"x": ""}}})
    tree.unlink("d/f")
    tree.remove_tree("d/s")
    tree.mkdir("d/s")
    assert tree.stack.upper is not None
    found = os.lstat(tree.stack.upper / "d" / "f")
    assert (stat.S_ISCHR(found.st_mode), found.st_rdev) == (True, 0)
    assert os.getxattr(tree.stack.upper / "d" / "s", "trusted.overlay.opaque") == b"y"
    tree.rmdir("d/s")
    assert os.lstat(tree.stack.upper / "d" / "s").st_rdev == 0


@pytest.mark.on("fs", "fuse", "kernel")
def test_no_whiteout_covers_nothing(stack: StackMaker) -> None:
    tree = stack({"d": {}})
    tree.create("d/f")
    tree.unlink("d/f")
    tree.mkdir("d/s")
    tree.rmdir("d/s")
    tree.create("n")
    tree.rename("n", "d/m")
    tree.rename("d/m", "o")
    tree.unlink("o")
    tree.remount()
    assert tree.stack.upper is not None
    assert [name for _, _, files in os.walk(tree.stack.upper) for name in files] == []


# Redirects and metadata-only files

REDIRECT = "trusted.overlay.redirect"
METACOPY = "trusted.overlay.metacopy"


@pytest.mark.on("fs", "fuse", "kernel")
def test_redirects_are_followed(stack: StackMaker) -> None:
    lower: Spec = {"old": {"f": "1", "s": {"g": "2"}}, "p": {"inner": {"h": "3"}}, "z": {"deep": {"i": "4"}}}
    upper: Spec = {
        "old": Whiteout(),
        "new": Dir({}, xattrs={REDIRECT: b"old"}),
        "p": {"inner": Whiteout(), "moved": Dir({}, xattrs={REDIRECT: b"inner"})},
        "q": {"far": Dir({"own": ""}, xattrs={REDIRECT: b"/z/deep"})},
        "z": {"deep": Whiteout()},
    }
    tree = stack(lower, upper=upper)
    assert tree.names() == ["new", "p", "q", "z"]
    assert tree.read("new/s/g") == b"2"
    assert tree.read("p/moved/h") == b"3"
    assert tree.names("q/far") == ["i", "own"]
    tree.write("new/f", b"9")
    tree.remount()
    assert tree.read("new/f") == b"9"


def test_a_malformed_redirect_is_ignored(stack: StackMaker) -> None:
    values = [b"", b"a/b", b"..", b".", b"/a//b", b"/../x", b"/x/./y", b"x" * 257, b"/"]
    lower: Spec = {f"d{number}": {"below": ""} for number in range(len(values))}
    upper: Spec = {f"d{number}": Dir({"own": ""}, xattrs={REDIRECT: value}) for number, value in enumerate(values)}
    tree = stack(lower, upper=upper)
    for number in range(len(values)):
        assert "own" in tree.names(f"d{number}")


def test_a_redirect_to_nothing(stack: StackMaker) -> None:
    tree = stack({"d": {"below": ""}}, upper={"d": Dir({"own": ""}, xattrs={REDIRECT: b"missing"})})
    assert tree.names("d") == ["own"]


def test_a_redirect_never_leads_out(stack: StackMaker) -> None:
    tree = stack({"d": {"x": ""}}, upper={"e": Dir({}, xattrs={REDIRECT: b"/../../../../etc"})})
    assert tree.names("e") == []


@pytest.mark.on("fs", "fuse", "kernel")
def test_metadata_only_files(stack: StackMaker) -> None:
    lower: Spec = {"f": File(b"the data", mode=0o600), "old": File(b"moved data")}
    upper: Spec = {
        "f": File(size=8, mode=0o444, uid=5, xattrs={METACOPY: b"", "user.k": b"v"}),
        "new": File(size=10, xattrs={METACOPY: b"", REDIRECT: b"/old"}),
        "old": Whiteout(),
    }
    tree = stack(lower, upper=upper)
    assert (tree.read("f"), tree.mode("f"), tree.stat("f").uid) == (b"the data", 0o444, 5)
    assert tree.read("new") == b"moved data"
    assert tree.listxattr("f") == ["user.k"]
    tree.write("f", b"THE")
    tree.write("new", b"MOVED")
    tree.remount()
    assert (tree.read("f"), tree.read("new")) == (b"THE data", b"MOVED data")
    assert tree.mode("f") == 0o444


def test_a_metadata_only_file_without_data(stack: StackMaker) -> None:
    tree = stack({"other": ""}, upper={"f": File(size=8, xattrs={METACOPY: b""})})
    assert tree.stat("f").size == 8
    tree.read("f", err=EIO)
    tree.unlink("f")
    assert tree.names() == ["other"]


def test_a_malformed_metacopy_mark(stack: StackMaker) -> None:
    for value in (b"\0", b"\0\1\0", b"\1\4\0\0", b"\0\11\0\0"):
        tree = stack({"f": "data"}, upper={"f": File(size=4, xattrs={METACOPY: value})})
        tree.read("f", err=EIO)


DAMAGED: Spec = {
    "whole": "whole",
    "file": File(size=4, xattrs={METACOPY: b"\1\4\0\0"}),
    "d": {"file": File(size=4, xattrs={METACOPY: b"\1\4\0\0"}), "x": "whole"},
}


@pytest.mark.parametrize("where", ["upper", "lower", "merged"])
def test_a_damaged_entry_hides_no_other(stack: StackMaker, where: str) -> None:
    """A directory with such an entry is listed completely; only operations that need more than the name fail."""
    other: Spec = {"d": {"y": ""}} if where == "merged" else {}
    tree = stack(*([DAMAGED, other] if where != "upper" else [other]), upper=DAMAGED if where == "upper" else {})
    for _ in range(2):
        assert tree.names() == ["d", "file", "whole"]
        assert tree.names("d") == ["file", "x", *["y"] * (where == "merged")]
        tree.stat("d/file", err=EIO)
        assert tree.read("d/x") == tree.read("whole") == b"whole"
        tree.remount()


def test_a_damaged_override_hides_no_other(stack: StackMaker) -> None:
    tree = stack(overridden({"bad": b"garbage", "good": b"1:2:0600"}), {"below": ""})
    assert tree.names() == ["bad", "below", "good"]
    tree.stat("bad", err=EINVAL)
    assert tree.mode("good") == 0o600


# Ownership in attributes, as other programs store it

OVERRIDE = "user.containers.override_stat"


def overridden(values: dict[str, bytes], name: str = OVERRIDE) -> Dir:
    """A layer whose root says that ownership is stored in attributes, with a file for each value."""
    files = {key: File(b"x", mode=0o755, xattrs={name: value}) for key, value in values.items()}
    return Dir(files, xattrs={name: b"0:0:0755"})


@pytest.mark.parametrize("name", [OVERRIDE, "security.fuseoverlayfs.override_stat", "user.fuseoverlayfs.override_stat"])
def test_override_stat(stack: StackMaker, name: str) -> None:
    values = {
        "plain": b"1000:1001:0640", "short": b"1:2:4755", "typed": b"5:6:0600:file", "more": b"5:6:0600:file:ignored",
        "pipe": b"7:8:0644:pipe", "socket": b"7:8:0600:socket",
        "char": b"0:0:0666:char-1-3", "block": b"0:6:0660:block-7-300",
    }  # fmt: skip
    tree = stack(overridden(values, name))
    found = {key: tree.stat(key) for key in values}
    assert {key: (s.uid, s.gid) for key, s in found.items()} == {
        "plain": (1000, 1001), "short": (1, 2), "typed": (5, 6), "more": (5, 6),
        "pipe": (7, 8), "socket": (7, 8), "char": (0, 0), "block": (0, 6),
    }  # fmt: skip
    assert {key: oct(s.mode) for key, s in found.items()} == {
        "plain": "0o100640", "short": "0o104755", "typed": "0o100600", "more": "0o100600", "pipe": "0o10644",
        "socket": "0o140600", "char": "0o20666", "block": "0o60660",
    }  # fmt: skip
    assert (found["char"].rdev, found["block"].rdev) == (os.makedev(1, 3), os.makedev(7, 300))
    tree.getxattr("plain", name, err=ENODATA)
    assert tree.listxattr("plain") == []


def test_override_stat_that_is_garbage(stack: StackMaker) -> None:
    values = {
        "a": b"",
        "b": b"x:y:z",
        "c": b"1:2",
        "d": b"1:2:9",
        "e": b"1:2:0644:wrong",
        "f": b"1:2:0644:char-1",
        "good": b"1:2:0600",
    }
    tree = stack(overridden(values))
    for name in "abcdef":
        tree.stat(name, err=22)
    assert tree.mode("good") == 0o600


def test_override_stat_elsewhere_is_an_ordinary_attribute(stack: StackMaker) -> None:
    tree = stack({"f": File(mode=0o600, xattrs={OVERRIDE: b"1:2:0777"})})
    assert (tree.mode("f"), tree.stat("f").uid) == (0o600, 0)
    assert tree.getxattr("f", OVERRIDE) == b"1:2:0777"


def test_an_overridden_object_is_copied_up_as_it_shows(stack: StackMaker) -> None:
    tree = stack(overridden({"f": b"1000:1001:4750", "p": b"7:8:0640:pipe"}))
    tree.rename("f", "g")
    tree.rename("p", "q")
    for _ in range(2):
        f, p = tree.stat("g"), tree.stat("q")
        assert (f.uid, f.gid, f.mode) == (1000, 1001, 0o104750)
        assert (p.uid, p.gid, p.mode) == (7, 8, 0o010640)
        tree.remount()


def test_an_upper_written_by_fuse_overlayfs(stack: StackMaker) -> None:
    """What version 1.10 leaves as root: both opaque marks, a stray device, origin paths, whiteouts of mode 0700."""
    opaque = Dir(
        {".wh..opq": Whiteout(), ".wh..wh..opq": "", "new": ""},
        opaque="trusted",
        xattrs={"user.fuseoverlayfs.opaque": b"y"},
    )
    upper: Spec = {
        "d": opaque,
        "f": Special(kind="c", mode=0o700),
        "up": File(b"changed", xattrs={"user.fuseoverlayfs.origin": b"up\0"}),
    }
    tree = stack({"d": {"old": ""}, "f": "old", "up": "old", "keep": ""}, upper=upper)
    assert (tree.names(), tree.names("d")) == (["d", "keep", "up"], ["new"])
    assert tree.read("up") == b"changed"
    assert tree.listxattr("up") == []
    tree.remove_tree("d")
    tree.mkdir("d")
    tree.remount()
    assert tree.names("d") == []


def test_an_upper_written_through_a_mount_program(stack: StackMaker) -> None:
    """What container storage unpacks: whiteouts as files of mode 0, ownership in attributes."""
    mark = {OVERRIDE: b"0:0:0755"}
    layer = Dir(
        {
            "etc": Dir(
                {".wh.gone": File(mode=0), "conf": File(b"c", mode=0o755, xattrs={OVERRIDE: b"3:4:0600"})}, xattrs=mark
            )
        },
        xattrs=mark,
    )
    tree = stack(layer, {"etc": {"gone": "", "stays": ""}})
    assert tree.names("etc") == ["conf", "stays"]
    found = tree.stat("etc/conf")
    assert (found.uid, found.gid, found.mode & 0o7777) == (3, 4, 0o600)
