"""Verification: every change of a stored file is found and named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from overlayfs.store.layers import Layer
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from overlayfs.store.verify import Checked, Problem, verify
from tests.store.samples import add_image, add_layer
from tests.support.builder import build
from tests.support.spec import Dir, File, Link, Special, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

TREE: Tree = {
    "a": Dir({"file": File(b"content", mode=0o640, uid=7, xattrs={"user.k": b"v"}), "twin": Link("a/file")}),
    "big": bytes(range(256)) * 1024,
    "gone": Whiteout(),
    "link": Symlink(target="a/file"),
    "pipe": Special(kind="p"),
    "null": Special(kind="c", major=1, minor=3),
}


def built(store: LayerStore, tree: Tree | Dir) -> Layer:
    with store.layers.stage() as staged:
        build(Path(os.fsdecode(staged.tree_path)), tree)
        with Manifest.build(staged.tree_fd) as manifest:
            return staged.publish(manifest=manifest)


def check(store: LayerStore, *ids: str) -> Checked:
    return verify(store.directory, ids or None, threads=2)


def found(store: LayerStore) -> dict[bytes, tuple[str, tuple[str, ...]]]:
    return {each.path: (each.kind, each.differs) for each in check(store).problems}


def at(layer: Layer, path: str = "") -> Path:
    return Path(os.fsdecode(layer.tree_path)) / path


def test_a_store_as_it_was_made(store: LayerStore) -> None:
    layer = built(store, TREE)
    add_image(store, "site", {"index": "x"}, {"more": "y"})
    calls: list[tuple[int, int]] = []
    checked = verify(store.directory, None, progress=lambda entries, size: calls.append((entries, size)))
    assert checked.problems == () and checked.unfinished == ()
    assert (checked.layers, checked.entries) == (3, 9 + 2 + 2)
    assert checked.size == layer.record.size + 2
    assert calls == sorted(calls) and calls[-1] == (checked.entries, checked.size)


def _touch(path: Path, change: Callable[[Path], object]) -> None:
    """Change an object without changing its times or those of its directory, as a failing disk would."""
    before = [(each, os.lstat(each)) for each in (path, path.parent)]
    change(path)
    for each, times in before:
        if os.path.lexists(each):
            os.utime(each, ns=(times.st_atime_ns, times.st_mtime_ns), follow_symlinks=False)


def _flip(path: Path, offset: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    with open(path, "r+b") as stream:
        stream.write(data)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


CHANGES: dict[str, tuple[str, Callable[[Path], object], tuple[str, tuple[str, ...]]]] = {
    "content": ("big", _flip, ("damaged", ("content",))),
    "shorter": ("big", lambda p: os.truncate(p, 9), ("damaged", ("content", "size 9 instead of 262144"))),
    "mode": ("big", lambda p: p.chmod(0o600), ("damaged", ("mode 0600 instead of 0644",))),
    "owner": ("big", lambda p: os.chown(p, 1, 2), ("damaged", ("owner 1:2 instead of 0:0",))),
    "added attribute": ("big", lambda p: os.setxattr(p, "user.x", b""), ("damaged", ("attribute user.x",))),
    "attribute": ("a/file", lambda p: os.setxattr(p, "user.k", b"w"), ("damaged", ("attribute user.k",))),
    "directory": ("a", lambda p: p.chmod(0o700), ("damaged", ("mode 0700 instead of 0755",))),
    "target": ("link", lambda p: _replace(p, lambda q: q.symlink_to("a/elif")), ("damaged", ("target",))),
    "type": ("pipe", lambda p: _replace(p, Path.mkdir), ("damaged", ("is a directory instead of a FIFO",))),
    "whiteout": ("gone", lambda p: _replace(p, Path.touch), ("damaged", ("is a file instead of a whiteout",))),
    "missing": ("big", os.unlink, ("missing", ())),
    "extra": ("new", Path.touch, ("extra", ())),
    "device": (
        "null",
        lambda p: _replace(p, lambda q: os.mknod(q, 0o20644, os.makedev(1, 5))),
        ("damaged", ("device 1:5 instead of 1:3",)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_named(store: LayerStore, change: str) -> None:
    path, act, expected = CHANGES[change]
    layer = built(store, TREE)
    where = at(layer, path)
    if not where.exists() and not where.is_symlink():
        times = os.stat(where.parent)
        act(where)
        os.utime(where.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        _touch(where, act)
    report = found(store)
    if change == "attribute":  # of a file of two names
        assert report.pop(b"a/twin") == expected
    assert report == {path.encode(): expected}


def test_times_count(store: LayerStore) -> None:
    layer = built(store, TREE)
    os.utime(at(layer, "big"), ns=(1, 1))
    (at(layer, "a") / "x").touch()
    (at(layer, "a") / "x").unlink()
    time = ("damaged", ("modification time",))
    assert found(store) == {b"big": time, b"a": time}


def test_all_names_of_a_damaged_file_are_named(store: LayerStore) -> None:
    layer = built(store, TREE)
    _touch(at(layer, "a/file"), _flip)
    assert found(store) == {b"a/file": ("damaged", ("content",)), b"a/twin": ("damaged", ("content",))}


def test_a_broken_hard_link_is_named(store: LayerStore) -> None:
    layer = built(store, TREE)
    times = os.stat(at(layer, "a"))
    shutil.copy2(at(layer, "a/twin"), at(layer, "copy"))
    os.chown(at(layer, "copy"), 7, 0)
    os.replace(at(layer, "copy"), at(layer, "a/twin"))
    os.utime(at(layer, "a"), ns=(times.st_atime_ns, times.st_mtime_ns))
    report = found(store)
    assert report == {b"": ("damaged", ("modification time",)), b"a/twin": ("damaged", ("hard link",))}


def test_everything_below_a_missing_directory_is_named(store: LayerStore) -> None:
    layer = built(store, TREE)
    _touch(at(layer, "a"), shutil.rmtree)
    assert found(store) == dict.fromkeys((b"a", b"a/file", b"a/twin"), ("missing", ()))


def test_every_bit_of_every_file_counts(store: LayerStore, place: Path) -> None:
    add_image(store, "site:1", {"f": "text"})
    store.workspaces.create("site:1", "w")
    files = [path for path in (place / "store").rglob("*") if path.is_file() and path.name != "lock"]
    kinds = {path.name for path in files}
    assert {"f", "manifest", "record", "site:1"} < kinds
    for path in files:
        for bit in range(8 * path.stat().st_size):
            _touch(path, lambda p, bit=bit: _flip_bit(p, bit))  # type: ignore[misc]
            assert check(store).problems, f"bit {bit} of {path}"
            _touch(path, lambda p, bit=bit: _flip_bit(p, bit))  # type: ignore[misc]
    assert not check(store).problems


def _flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with open(path, "r+b") as stream:
        stream.write(data)


def test_a_damaged_manifest_and_an_intact_tree(store: LayerStore) -> None:
    layer = built(store, TREE)
    _flip_bit(Path(os.fsdecode(layer.path)) / "manifest", 999)
    assert check(store).problems == (Problem(layer.id, b"", "manifest", ("content",)),)
    _flip_bit(at(layer, "big"), 0)
    assert [each.kind for each in check(store).problems] == ["manifest", "damaged"]


def test_no_manifest(store: LayerStore) -> None:
    layer = built(store, TREE)
    (Path(os.fsdecode(layer.path)) / "manifest").unlink()
    assert check(store).problems == (Problem(layer.id, b"", "manifest", ("missing",)),)


def test_a_layer_that_is_not_hashed_yet(store: LayerStore) -> None:
    layer = add_layer(store, {"f": "x"}, hashed=False)
    assert check(store).unfinished == (layer.id,)


def test_a_missing_layer_is_named_with_its_image(store: LayerStore) -> None:
    image = add_image(store, "site", {"f": "x"})
    layer = store.layers.find(image.layers[0])
    shutil.rmtree(layer.path)
    assert check(store).problems == (Problem("", b"images/site:latest", "missing", (f"layer {layer.id}",)),)
    assert check(store, layer.id).problems == (Problem(layer.id, b"", "missing"),)


def test_an_image_record_under_another_name(store: LayerStore, place: Path) -> None:
    add_image(store, "site", {"f": "x"})
    (place / "store" / "images" / "site:latest").rename(place / "store" / "images" / "other:latest")
    assert [each.kind for each in check(store).problems] == ["record"]


def test_only_the_given_layers(store: LayerStore) -> None:
    good, bad = add_layer(store, {"f": "x"}), add_layer(store, {"g": "y"})
    _flip_bit(at(bad, "g"), 0)
    assert not check(store, good.id).problems
    assert check(store, good.id).layers == 1
    assert {each.layer for each in check(store).problems} == {bad.id}


def test_names_of_any_bytes(store: LayerStore) -> None:
    with store.layers.stage() as staged:
        for name in (b"\xff", b"new\nline", b"a-b", b"a"):
            os.mkdir(os.path.join(staged.tree_path, name))
        (Path(os.fsdecode(staged.tree_path)) / "a" / "x").touch()
        with Manifest.build(staged.tree_fd) as manifest:
            layer = staged.publish(manifest=manifest)
    assert not check(store).problems
    os.rmdir(os.path.join(layer.tree_path, b"\xff"))
    os.mkdir(os.path.join(layer.tree_path, b"a", b"\xfe"))
    kinds = {each.path: each.kind for each in check(store).problems}
    assert kinds == {b"": "damaged", b"\xff": "missing", b"a": "damaged", b"a/\xfe": "extra"}


def test_a_layer_without_an_image_is_no_problem(store: LayerStore) -> None:
    record = ImageRecord(name="x", layers=(add_layer(store, {"f": "x"}).id,), created=now())
    store.images.put(record)
    store.images.remove("x")
    assert not check(store).problems
