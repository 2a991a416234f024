"""Layers as entries of archives: canonical, complete, and resolved where archives have no form for a mark."""

import io
import os
import shutil
import stat
import tarfile
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.fs import Caller, Changes, Node, Overlay, StackConfig
from overlayfs.oci import layer_tar
from overlayfs.oci.layer_entries import EntryWithData, Omissions, layer_entries, merged_entries
from overlayfs.oci.tar_entry import Kind
from tests.oci.archives import picture, unpack
from tests.support.builder import build
from tests.support.drivers.overlay import FsRaw
from tests.support.dump import Dump, dump, same
from tests.support.spec import Dir, File, Link, Special, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

ROOT = Caller(0, 0)


def layer(place: Path, name: str, tree: Tree | Dir) -> Path:
    root = place / name
    root.mkdir()
    build(root, tree)
    return root


def packed(tree: Path, *below: Path, omissions: Omissions | None = None) -> bytes:
    """A layer as a tar."""
    with layer_entries(os.fsencode(tree), [os.fsencode(each) for each in below], omissions or Omissions()) as items:
        return b"".join(layer_tar.tar_pieces(items))


def names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.getnames()


def view(*layers: Path) -> Dump:
    """The merged tree of a stack, top first."""
    overlay = Overlay(StackConfig(lower=tuple(map(os.fsencode, layers))))
    try:
        return dump(FsRaw(overlay))
    finally:
        overlay.close()


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
EVERYTHING: Tree = {
    "dir": Dir({"b": b"b", "a": File(b"a" * 5000, mode=0o4755, uid=1, gid=2)}, mode=0o3775, uid=7),
    "file": File(b"text", xattrs={"user.x": b"v", "security.capability": CAPABILITY}),
    "hole": File(pieces=((1 << 20, b"data"),), size=3 << 20),
    "link": Symlink("dir/../x", uid=5),
    "other": Link("dir/a"),
    "fifo": Special("p"),
    "null": Special("c", 1, 3),
    "disk": Special("b", 7, 1),
    "old": File(b"", mtime_ns=-1_500_000_000),
    "\udcff\n": b"strange",
    "trusted": Dir({}, xattrs={"trusted.overlay.overlay.opaque": b"y", "trusted.mine": b"1"}),
}


def test_a_layer_comes_back_as_it_was(place: Path) -> None:
    source = layer(place, "source", Dir(EVERYTHING, mode=0o751, uid=3, xattrs={"user.root": b"r"}))
    unpack(packed(source), place / "copy")
    same(picture(source), picture(place / "copy"))


def test_the_same_layer_is_the_same_bytes(place: Path) -> None:
    one = layer(place, "one", EVERYTHING)
    other = layer(place, "other", dict(reversed(list(EVERYTHING.items()))))
    for root in (one, other):
        os.utime(root, ns=(0, 0))
    assert packed(one) == packed(other)
    unpack(packed(one), place / "copy")
    assert packed(place / "copy") == packed(one)


def test_the_order_of_entries(place: Path) -> None:
    tree: Tree = {
        "b": {"z": b"", "a": Whiteout(), "A": b""},
        "a": Dir({"f": b""}, opaque="trusted"),
        "c": Whiteout(),
        "a.b": b"",
    }
    assert names(packed(layer(place, "layer", tree))) == [
        ".", ".wh.c", "a", "a/.wh..wh..opq", "a/f", "a.b", "b", "b/.wh.a", "b/A", "b/z",
    ]  # fmt: skip


def test_every_form_of_whiteout_and_opaque_directory(place: Path) -> None:
    tree: Tree = {
        "one": Whiteout(), "two": Whiteout("file"), "three": Whiteout("xattr"),
        "d1": Dir({}, opaque="trusted"), "d2": Dir({}, opaque="user"), "d3": Dir({}, opaque="fuse"),
        "d4": Dir({}, opaque="file"), "d5": {}, ".wh.d5": b"", "f": b"", ".wh.f": b"",
    }  # fmt: skip
    archive = packed(layer(place, "layer", tree))
    assert [name for name in names(archive) if ".wh." in name] == [
        ".wh.one", ".wh.three", ".wh.two", *(f"d{number}/.wh..wh..opq" for number in range(1, 6)),
    ]  # fmt: skip
    unpack(archive, place / "copy")
    assert packed(place / "copy") == archive


def test_whiteouts_have_no_owner_and_no_time(place: Path) -> None:
    root = layer(place, "layer", {"x": Whiteout()})
    before = packed(root)
    os.utime(root / "x", ns=(5, 5), follow_symlinks=False)
    os.chown(root / "x", 4, 5)
    assert packed(root) == before


def test_an_opaque_root_stays_one(place: Path) -> None:
    root = layer(place, "layer", Dir({"f": b""}, opaque="trusted"))
    assert names(packed(root)) == [".", ".wh..wh..opq", "f"]


def test_later_times_are_clamped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layer(place, "layer", {"new": File(b"", mtime_ns=2 * 10**18), "old": File(b"", mtime_ns=10**9)})
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000")
    with layer_entries(os.fsencode(root), (), Omissions()) as items:
        archive = b"".join(layer_tar.tar_pieces(items, layer_tar.source_date_epoch()))
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        assert {member.name: member.mtime for member in opened} == {".": 1000, "new": 1000, "old": 1}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "now")
    with pytest.raises(UserError, match="seconds since 1970"):
        layer_tar.source_date_epoch()


def test_what_archives_cannot_hold_is_reported(place: Path) -> None:
    root = layer(place, "layer", {"s": Special("s"), "f": File(b"", xattrs={"user.empty": b"", "user.a=b": b"v"})})
    omissions = Omissions()
    assert names(packed(root, omissions=omissions)) == [".", "f"]
    assert (omissions.sockets, omissions.attributes) == (1, 2)
    assert len(omissions.sentences()) == 2


def test_a_file_that_shrinks_while_it_is_read_is_an_error(place: Path) -> None:
    root = layer(place, "layer", {"f": b"x" * 1000})

    def shortened(item: EntryWithData) -> EntryWithData:
        return item._replace(entry=item.entry._replace(size=2000)) if item.open is not None else item

    with layer_entries(os.fsencode(root), (), Omissions()) as items, pytest.raises(UserError, match="became shorter"):
        list(layer_tar.tar_pieces(map(shortened, items)))


DAMAGED: Tree = {"d": {"f": File(size=9, xattrs={"trusted.overlay.metacopy": b"\1\4\0\0"})}, "g": b"g"}
MISSING: Tree = {"d": {"f": File(size=9, xattrs={"trusted.overlay.metacopy": b""})}}


@pytest.mark.parametrize(("tree", "reason"), [(DAMAGED, "d/f: Input/output error"), (MISSING, "d/f: Input/output")])
def test_what_cannot_be_read_is_reported_with_its_path(place: Path, tree: Tree, reason: str) -> None:
    root = os.fsencode(layer(place, "layer", tree))
    with pytest.raises(UserError, match=f"cannot read {reason}"), merged_entries((root,), Omissions()) as items:
        list(layer_tar.tar_pieces(items))


# --- owners in attributes


def test_owners_in_attributes_are_the_owners(place: Path) -> None:
    name = "user.containers.override_stat"
    tree = Dir(
        {
            "f": File(b"x", xattrs={name: b"5:6:4755", "user.containers.override_security.capability": CAPABILITY}),
            "null": File(b"", xattrs={name: b"0:0:0600:char-1-3"}),
            "d": Dir({}, xattrs={name: b"7:8:1777"}),
        },
        xattrs={name: b"1:2:0700"},
    )
    with layer_entries(os.fsencode(layer(place, "layer", tree)), (), Omissions()) as items:
        found = {entry.path: entry for entry, _ in items}
    assert {path: (e.uid, e.gid, e.mode) for path, e in found.items()} == {
        b"": (1, 2, 0o700), b"f": (5, 6, 0o4755), b"null": (0, 0, 0o600), b"d": (7, 8, 0o1777),
    }  # fmt: skip
    assert found[b"f"].xattrs == {b"security.capability": CAPABILITY}
    assert (found[b"null"].kind, found[b"null"].device) == (Kind.CHARACTER, (1, 3))


# --- redirect and metacopy


LOWER: Tree = {
    "moved": Dir({"deep": {"f": b"deep", "g": File(b"g", mode=0o600)}, "h": b"h"}, uid=4),
    "target": {"hidden": b"hidden"},
    "plain": {"f": b"f"},
    "big": File(b"b" * 100_000, uid=1),
    "twin": Link("big"),
    "gone": b"gone",
    "kept": b"kept",
}


def changed(place: Path, *steps: tuple[str | int, ...]) -> tuple[Path, Path]:
    """Make changes over LOWER; return the upper and LOWER."""
    lower = layer(place, "lower", LOWER)
    for name in ("upper", "work"):
        (place / name).mkdir()
    overlay = Overlay(StackConfig((os.fsencode(lower),), os.fsencode(place / "upper"), os.fsencode(place / "work")))
    try:
        for verb, path, *more in steps:
            _step(overlay, str(verb), str(path), *more)
    finally:
        overlay.close()
    shutil.rmtree(place / "work")  # a layer has no index
    return place / "upper", lower


def _place(overlay: Overlay, path: str) -> tuple[Node, bytes]:
    parent, _, name = path.encode().rpartition(b"/")
    return overlay.resolve(parent), name


def _step(overlay: Overlay, verb: str, path: str, *more: str | int) -> None:
    match verb, more:
        case "move", (str(new),):
            overlay.names.rename(*_place(overlay, path), *_place(overlay, new))
        case "chmod", (int(mode),):
            overlay.set_attributes(overlay.resolve(path.encode()), Changes(mode=mode))
        case "remove", ():
            overlay.names.unlink(*_place(overlay, path))
        case "mkdir", ():
            overlay.names.mkdir(*_place(overlay, path), 0o755, ROOT)


CHANGES: dict[str, list[tuple[str | int, ...]]] = {
    "a directory that moved": [("move", "moved", "there")],
    "moved into another": [("move", "moved/deep", "plain/deep")],
    "moved and changed": [("move", "moved", "there"), ("remove", "there/deep/f"), ("chmod", "there/h", 0o640)],
    "moved twice": [("move", "moved/deep", "x"), ("move", "moved", "y"), ("move", "x", "y/z")],
    "moved over another": [("remove", "target/hidden"), ("move", "moved", "target")],
    "moved away and replaced": [("move", "moved", "m"), ("mkdir", "moved")],
    "a file of metadata": [("chmod", "big", 0o4755)],
    "a file of metadata that moved": [("chmod", "kept", 0o600), ("move", "kept", "plain/k")],
    "deleted": [("remove", "gone")],
}


@pytest.mark.parametrize("name", CHANGES)
def test_marks_are_resolved_over_the_layers_below(place: Path, name: str) -> None:
    upper, lower = changed(place, *CHANGES[name])
    unpack(packed(upper, lower), place / "copy")
    found = view(place / "copy", lower)
    expected = view(upper, lower)
    same(found, expected)
    attributes = {a for path in (place / "copy").rglob("*") for a in os.listxattr(path, follow_symlinks=False)}
    assert attributes <= {"trusted.overlay.opaque"}


def test_a_moved_directory_is_opaque_only_over_another_one(place: Path) -> None:
    upper, lower = changed(place, *CHANGES["a directory that moved"])
    assert not [name for name in names(packed(upper, lower)) if name.endswith(".opq")]
    other = place / "other"
    other.mkdir()
    upper, lower = changed(other, *CHANGES["moved over another"])
    assert [name for name in names(packed(upper, lower)) if name.endswith(".opq")] == ["target/.wh..wh..opq"]


def test_a_metacopy_without_lower_layers_is_refused(place: Path) -> None:
    upper, _ = changed(place, *CHANGES["a file of metadata"])
    with pytest.raises(UserError, match="big depends on lower layers"):
        packed(upper)


# --- the whole tree


def test_a_merged_tree_is_what_the_stack_shows(place: Path) -> None:
    upper, lower = changed(place, *CHANGES["moved and changed"])
    with merged_entries([os.fsencode(upper), os.fsencode(lower)], Omissions()) as items:
        archive = b"".join(layer_tar.tar_pieces(items))
    unpack(archive, place / "copy")
    found = picture(place / "copy")
    shown = view(upper, lower)
    shown[b""] = shown[b""]._replace(mtime_ns=0)
    assert {path: e._replace(nlink=0) for path, e in found.items()} == {
        p: e._replace(nlink=0) for p, e in shown.items()
    }


def test_what_is_hidden_is_left_out(place: Path) -> None:
    root = layer(place, "source", {"keep": {"f": b""}, "hide": {"f": b""}})
    status = (root / "hide").stat()
    with merged_entries([os.fsencode(root)], Omissions(), frozenset(((status.st_dev, status.st_ino),))) as items:
        assert [item.entry.path for item in items] == [b"", b"keep", b"keep/f"]


def test_only_regular_files_are_opened(place: Path) -> None:
    root = layer(place, "source", {"p": Special("p"), "f": b"x"})
    with merged_entries([os.fsencode(root)], Omissions()) as items:
        opened = {item.entry.path for item in items if item.open is not None}
    assert opened == {b"f"}
    assert stat.S_ISFIFO((root / "p").stat().st_mode)
