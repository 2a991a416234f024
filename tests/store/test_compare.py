"""Comparison: exactly the differences are yielded, and what both trees have from the same layers is not read."""

import os
import subprocess
from pathlib import Path

import pytest

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.fs.lookup import Lookup
from overlayfs.library import Store
from overlayfs.store.compare import Change, Tree, compare, measured
from tests.store.lives import tree_with_upper
from tests.store.samples import add_image, add_layer, fill
from tests.support.builder import build
from tests.support.drivers.overlay import FsDriver
from tests.support.drivers.stack import Stack
from tests.support.spec import Dir, File, Link, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec

pytestmark = pytest.mark.root


def layer(place: Path, name: str, tree: Spec | Dir) -> bytes:
    (place / name).mkdir()
    build(place / name, tree)
    os.utime(place / name, ns=(1, 1))
    return os.fsencode(place / name)


def lines(before: Tree, after: Tree) -> list[str]:
    return [f"{change.kind} {os.fsdecode(change.path)}" for change in compare(before, after)]


def trees(place: Path, one: Spec | Dir, other: Spec | Dir) -> tuple[Tree, Tree]:
    return Tree((layer(place, "one", one),)), Tree((layer(place, "other", other),))


SAME: Spec = {"d": {"f": File(b"data", mode=0o640, xattrs={"user.a": b"1"}), "s": Symlink(target="x")}, "z": "end"}

DIFFERENCES: dict[str, tuple[Spec, list[str]]] = {
    "nothing": (SAME, []),
    "content": ({"f": "1234"}, ["C f"]),
    "content of the same size": ({"f": "abcd"}, ["C f"]),
    "size": ({"f": "12345"}, ["C f"]),
    "mode": ({"f": File(b"data", mode=0o600)}, ["C f"]),
    "owner": ({"f": File(b"data", uid=1)}, ["C f"]),
    "group": ({"f": File(b"data", gid=1)}, ["C f"]),
    "time": ({"f": File(b"data", mtime_ns=1)}, ["C f"]),
    "attribute": ({"f": File(b"data", xattrs={"user.x": b""})}, ["C f"]),
    "type": ({"f": Symlink(target="data")}, ["C f"]),
    "directory": ({"f": {"a": "1", "b": {"c": "2"}}}, ["C f", "A f/a", "A f/b", "A f/b/c"]),
    "gone": ({}, ["D f"]),
    "device": ({"f": Special(kind="c", major=1, minor=3)}, ["C f"]),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_each_difference(place: Path, what: str) -> None:
    after, expected = DIFFERENCES[what]
    one, other = trees(place, SAME if what == "nothing" else {"f": "data"}, after)
    assert lines(one, other) == expected
    assert len(lines(other, one)) == len([line for line in expected if not line.startswith("A f/")])


def test_devices_targets_and_default_acls(place: Path) -> None:
    acl = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000500ffffffff")
    before: Spec = {
        "dev": Special(kind="b", major=1, minor=3), "link": Symlink(target="a"), "dir": Dir(),
        "same": Special(kind="p"),
    }  # fmt: skip
    after: Spec = {
        "dev": Special(kind="b", major=1, minor=4),
        "link": Symlink(target="b"),
        "dir": Dir(xattrs={"system.posix_acl_default": acl}),
        "same": Special(kind="p"),
    }
    assert lines(*trees(place, before, after)) == ["C dev", "C dir", "C link"]


def test_directories_above_a_change_are_changed(place: Path) -> None:
    before: Spec = {"a": {"b": {"c": "1", "d": "2"}}, "e": {"f": "3"}}
    after: Spec = {"a": {"b": {"c": "x", "d": "2"}}, "e": {"f": "3"}}
    assert lines(*trees(place, before, after)) == ["C a", "C a/b", "C a/b/c"]


def test_order_is_that_of_a_walk(place: Path) -> None:
    after: Spec = {"a": {"x": "1"}, "a-b": "2", "a.c": {}}
    assert lines(*trees(place, {}, after)) == ["A a", "A a/x", "A a-b", "A a.c"]
    gone: Spec = {"a": {"x": "1"}, "b": "2"}
    assert lines(Tree((layer(place, "x", gone),)), Tree((layer(place, "y", {}),))) == ["D a", "D b"]


def test_the_root(place: Path) -> None:
    assert lines(*trees(place, Dir(mode=0o755), Dir({"f": "x"}, mode=0o700))) == ["C ", "A f"]


def test_an_empty_tree(place: Path) -> None:
    full = Tree((layer(place, "l", {"a": {"b": "12"}}),))
    assert lines(Tree(()), full) == ["A a", "A a/b"]
    assert list(compare(Tree(()), full))[-1] == Change("A", b"a/b", after=2)
    assert lines(Tree(()), Tree(())) == []


# --- hard links


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": "x", "b": "x", "c": "x"}, {"a": "x", "b": Link("a"), "c": "x"}, ["C b"]),
        ({"a": "x", "b": Link("a")}, {"a": "x", "b": "x"}, ["C b"]),
        ({"a": "x", "b": Link("a"), "c": "x", "d": Link("c")}, {"a": "x", "b": "x", "c": Link("b"), "d": Link("a")},
         ["C b", "C c", "C d"]),
        ({"a": "x", "b": Link("a"), "c": Link("a")}, {"b": "x", "c": Link("b")}, ["D a"]),
        ({"a": "x"}, {"a": "x", "b": Link("a")}, ["A b"]),
        ({"a": "x", "b": Link("a")}, {"a": "y", "b": Link("a")}, ["C a", "C b"]),
        ({"a": "x", "b": Link("a"), "z": "x"}, {"a": "x", "b": "x", "z": Link("a")}, ["C b", "C z"]),
    ],
)  # fmt: skip
def test_hard_links(place: Path, before: Spec, after: Spec, expected: list[str]) -> None:
    assert lines(*trees(place, before, after)) == expected


def test_a_link_in_the_index_only(place: Path) -> None:
    tree = FsDriver(Stack(place / "s", [{"a": "old", "d": {"b": Link("a"), "c": "x"}}], {}))
    tree.write("a", b"new", 0)
    assert tree.read("d/b") == b"new"
    before = Tree((os.fsencode(tree.stack.lower[0]),))
    found = list(compare(before, tree_with_upper(tree.stack)))
    tree.close()
    assert [(each.kind, each.path) for each in found if each.path] == [("C", b"a"), ("C", b"d"), ("C", b"d/b")]
    assert sum(each.after for each in found) == 3 and sum(each.before for each in found) == 3


def test_a_link_into_a_directory_that_is_not_read(place: Path) -> None:
    base = layer(place, "base", {"a": {"x": File(b"1")}, "b": Link("a/x"), "c": File(b"1")})
    parted = layer(place, "parted", {"b": File(b"1")})
    assert lines(Tree((base,)), Tree((parted, base))) == ["C b"]
    assert lines(Tree((parted, base)), Tree((base,))) == ["C b"]
    gone = layer(place, "gone", {"b": Whiteout()})
    again = layer(place, "again", {"a": {"x": File(b"1")}, "c": File(b"1")})
    assert lines(Tree((gone, base)), Tree((again,))) == []  # one name of two, and the only one


# --- marks


def test_redirects_and_opaque_directories_count_by_their_effect(place: Path) -> None:
    base = layer(place, "base", {"from": {"a": "1", "b": "2"}, "cut": {"c": "3", "same": "4"}})
    top = layer(place, "top", {
        "from": Whiteout(),
        "to": Dir({"b": Whiteout()}, xattrs={"trusted.overlay.redirect": b"/from"}),
        "cut": Dir({"new": "5", "same": "4"}, opaque="trusted"),
    })  # fmt: skip
    assert lines(Tree((base,)), Tree((top, base))) == ["C cut", "D cut/c", "A cut/new", "D from", "A to", "A to/a"]
    flat = layer(place, "flat", {"to": {"a": "1"}, "cut": {"new": "5", "same": "4"}})
    assert lines(Tree((top, base)), Tree((flat,))) == []


def test_metadata_only_copies(place: Path) -> None:
    base = layer(place, "base", {"f": "data", "g": "data"})
    metacopy = {"trusted.overlay.metacopy": b""}
    top = layer(place, "top", {"f": File(size=4, xattrs=metacopy), "g": File(size=4, mode=0o600, xattrs=metacopy)})
    assert lines(Tree((base,)), Tree((top, base))) == ["C g"]
    other = layer(place, "other", {"f": "atad"})
    assert lines(Tree((top, base)), Tree((top, other, base))) == ["C f"]


def test_escaped_attributes_are_users_attributes(place: Path) -> None:
    escaped = {"trusted.overlay.overlay.opaque": b"y"}
    one, other = trees(place, {"d": Dir()}, {"d": Dir(xattrs=escaped)})
    assert lines(one, other) == ["C d"]
    (place / "third").mkdir()
    build(place / "third", {"d": Dir(xattrs={"trusted.overlay.opaque": b"y", "trusted.overlay.impure": b"y"})})
    os.utime(place / "third", ns=(1, 1))
    assert lines(one, Tree((os.fsencode(place / "third"),))) == []


# --- common layers


def test_the_same_layers_are_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = layer(place, "base", {"big": {f"d{i}": {"f": "x"} for i in range(50)}, "small": {"g": "1"}})
    top = layer(place, "top", {"small": {"h": "2"}})
    looked: list[bytes] = []
    listing = Lookup.listing

    def listed(self: Lookup, node: object) -> list[bytes]:
        looked.append(self._nodes.path(node))  # type: ignore[arg-type]  # only directories are looked at
        return listing(self, node)  # type: ignore[arg-type]

    monkeypatch.setattr(Lookup, "listing", listed)
    assert lines(Tree((base,)), Tree((top, base))) == ["C small", "A small/h"]
    assert set(looked) == {b"", b"small"}
    looked.clear()
    # Nothing is known of the layers below, but the middle one is recorded to hold no redirects.
    middle = layer(place, "middle", {"own": {"deep": {"x": "1"}}})
    other = layer(place, "other", {"else": "2"})
    before, after = Tree((middle, base), frozenset((0,))), Tree((middle, other), frozenset((0,)))
    assert lines(before, after) == ["D big", "A else", "D small"]
    assert b"own" not in looked


def test_a_redirect_may_lead_to_another_layer(place: Path) -> None:
    middle = layer(place, "middle", {"own": {"to": Dir(xattrs={"trusted.overlay.redirect": b"/from"})}})
    one, other = layer(place, "one", {"from": {"a": "1"}}), layer(place, "other", {"from": {"a": "2"}})
    assert lines(Tree((middle, one)), Tree((middle, other))) == [
        "C from", "C from/a", "C own", "C own/to", "C own/to/a"
    ]  # fmt: skip


def test_deeper_than_the_interpreter(place: Path) -> None:
    for name in ("one", "other"):
        (place / name).mkdir()
        fd = os.open(place / name, os.O_PATH)
        for _ in range(1100):
            os.mkdir("d", dir_fd=fd)
            inside = os.open("d", os.O_PATH, dir_fd=fd)
            os.close(fd)
            fd = inside
        os.mknod(name, dir_fd=fd)
        os.close(fd)
    one, other = (Tree((os.fsencode(place / name),)) for name in ("one", "other"))
    found = list(compare(one, other))
    assert [each.kind for each in found[-2:]] == ["D", "A"]
    subprocess.run(["rm", "-rf", "one", "other"], cwd=place, check=True)  # shutil is recursive


# --- bytes


def test_bytes(place: Path) -> None:
    before: Spec = {"gone": {"a": "123", "b": {"c": "45"}, "l": Link("gone/a")}, "f": "1234", "d": {"x": "1"}}
    after: Spec = {"f": "12", "d": "123456", "new": {"g": "1", "h": Link("new/g")}}
    one, other = trees(place, before, after)
    found = {each.path: (each.before, each.after) for each in compare(one, other)}
    assert found == {b"gone": (5, 0), b"f": (4, 2), b"d": (1, 6), b"new": (0, 0), b"new/g": (0, 1), b"new/h": (0, 0)}
    changes = [Change(each.kind, each.path) for each in compare(one, other)]
    assert {each.path: (each.before, each.after) for each in measured(one, other, changes)} == found
    assert list(measured(one, other, [Change("A", b"went/meanwhile")])) == [Change("A", b"went/meanwhile")]


def test_an_unreadable_object_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = trees(place, {"f": "data"}, {"f": "atad"})

    def fail(fd: int, buffer: memoryview, offset: int) -> int:
        raise OSError(5, "Input/output error", b"f")

    monkeypatch.setattr(sysio, "read_into", fail)
    with pytest.raises(UserError, match=r"cannot compare: Input/output error \(f\)"):
        lines(one, other)


# --- a store


def test_images_and_workspaces(place: Path) -> None:
    with Store(os.fsencode(place / "store")) as store:
        base = add_image(store, "base", {"a": "1", "d/b": "2"})
        top = add_layer(store, {"a": "changed"})
        store.images.put(base.__class__(name="site", layers=(top.id, *base.layers), created=base.created))
        store.workspaces.create("site", "w")
        upper = store.workspaces.find("w").upper_path
        fill(upper, {"new": "3"})
        assert [(each.kind, each.path) for each in store.diff(None, "site")] == [("C", b"a")]
        assert [(each.kind, each.path) for each in store.diff("base", "site")] == [("C", b"a")]
        assert [(each.kind, each.path) for each in store.diff("site", "base")] == [("C", b"a")]
        assert [(each.kind, each.path) for each in store.diff(None, "w")] == [("A", b"new")]
        assert [(each.kind, each.path) for each in store.diff("base", "w")] == [("C", b"a"), ("A", b"new")]
        assert [each.kind for each in store.diff(None, "base")] == ["A", "A", "A"]
        with pytest.raises(UserError, match="is no workspace, image or layer"):
            list(store.diff("nothing", "site"))
