"""Repair: what verification finds is restored from other copies; a killed repair can be repeated."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.library import Store
from overlayfs.store.layers import Layer
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.verify import verify
from tests.support.builder import build
from tests.support.spec import Dir, File, Link, Special, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

TREE: Tree = {
    "a": Dir({
        "file": File(b"content", mode=0o4640, uid=7, xattrs={"user.k": b"v"}),
        "twin": Link("a/file"),
        "empty": "",
    }, xattrs={"trusted.overlay.opaque": b"y"}),
    "big": File(pieces=((0, bytes(range(256)) * 2048), (1 << 22, b"end"))),
    "gone": Whiteout(),
    "link": Symlink(target="a/file", uid=4),
    "pipe": Special(kind="p", mode=0o600),
    "null": Special(kind="c", major=1, minor=3),
    "thin": File(size=9, xattrs={"trusted.overlay.metacopy": b""}),
}  # fmt: skip


def put(store: Store, name: str, tree: Tree | Dir, *below: str) -> Layer:
    with store.layers.stage() as staged:
        build(Path(os.fsdecode(staged.tree_path)), tree)
        with Manifest.build(staged.tree_fd) as manifest:
            layer = staged.publish(manifest=manifest)
    store.images.put(ImageRecord(name=name, layers=(layer.id, *below), created=now()))
    return layer


@pytest.fixture
def store(place: Path) -> Iterator[Store]:
    """The store that is damaged."""
    with Store(os.fsencode(place / "store")) as opened:
        yield opened


@pytest.fixture
def other(place: Path) -> Iterator[Store]:
    """Another store, with the same layer and a second one with one more file."""
    with Store(os.fsencode(place / "other")) as opened:
        put(opened, "site", TREE)
        yield opened


def at(layer: Layer, path: str = "") -> Path:
    return Path(os.fsdecode(layer.tree_path)) / path


def flip(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.write(bytes([path.read_bytes()[0] ^ 1]))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    make(path)


def part(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def file_of(layer: Layer, name: str) -> Path:
    return Path(os.fsdecode(layer.path)) / name


def each_index(layer: Layer) -> list[Path]:
    return list((Path(os.fsdecode(layer.path)).parents[1] / "digests").iterdir())


def each(act: Callable[[Path], object], *paths: Path) -> None:
    """Apply a change to several paths."""
    for path in paths:
        act(path)


def change_attributes(layer: Layer) -> None:
    os.removexattr(at(layer, "a/file"), "user.k")
    os.setxattr(at(layer, "a"), "user.new", b"")


DAMAGES: dict[str, Callable[[Layer], object]] = {
    "content": lambda layer: flip(at(layer, "big")),
    "content of two names": lambda layer: flip(at(layer, "a/file")),
    "a name of two": lambda layer: at(layer, "a/file").unlink(),
    "both names": lambda layer: each(Path.unlink, at(layer, "a/file"), at(layer, "a/twin")),
    "a broken link": lambda layer: part(at(layer, "a/twin")),
    "a file": lambda layer: at(layer, "big").unlink(),
    "a directory": lambda layer: shutil.rmtree(at(layer, "a")),
    "a directory that is a file": lambda layer: replaced(at(layer, "a"), Path.touch),
    "a file that is a directory": lambda layer: replaced(at(layer, "big"), lambda p: (p / "in").mkdir(parents=True)),
    "something new": lambda layer: (at(layer, "x") / "y" / "z").mkdir(parents=True),
    "a whiteout": lambda layer: at(layer, "gone").unlink(),
    "a whiteout that is a file": lambda layer: replaced(at(layer, "gone"), Path.touch),
    "a target": lambda layer: replaced(at(layer, "link"), lambda p: p.symlink_to("elsewhere")),
    "a device": lambda layer: replaced(at(layer, "null"), lambda p: os.mknod(p, 0o20644, os.makedev(1, 5))),
    "a pipe": lambda layer: at(layer, "pipe").unlink(),
    "an empty file": lambda layer: at(layer, "a/empty").unlink(),
    "a metadata-only file": lambda layer: at(layer, "thin").unlink(),
    "mode": lambda layer: at(layer, "a/file").chmod(0o777),
    "owner": lambda layer: os.chown(at(layer, "link"), 9, 9, follow_symlinks=False),
    "attributes": change_attributes,
    "an opaque mark": lambda layer: os.removexattr(at(layer, "a"), "trusted.overlay.opaque"),
    "times": lambda layer: each(lambda p: os.utime(p, ns=(5, 5)), at(layer), at(layer, "a"), at(layer, "big")),
    "the manifest": lambda layer: flip(file_of(layer, "manifest")),
    "no manifest": lambda layer: file_of(layer, "manifest").unlink(),
    "manifest and content": lambda layer: each(flip, file_of(layer, "manifest"), at(layer, "big")),
    "the record": lambda layer: flip(file_of(layer, "record")),
    "an image": lambda layer: flip(file_of(layer, "../../images/site:latest")),
    "memory of registries": lambda layer: file_of(layer, "remote").write_text('{"blobs": []}\n'),
    "the index": lambda layer: each(flip, *each_index(layer)),
    "everything": lambda layer: each(lambda p: replaced(p, Path.touch), *at(layer).iterdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_another_store(place: Path, store: Store, other: Store, damage: str) -> None:
    layer = put(store, "site", TREE)
    DAMAGES[damage](layer)
    assert store.verify().problems
    if damage == "an image":  # the other store's is not made of our layers, a copy's is
        flip(file_of(layer, "../../images/site:latest"))
        subprocess.run(["cp", "-a", "store", "copy"], cwd=place, check=True)
        flip(file_of(layer, "../../images/site:latest"))
    source = place / ("copy" if damage == "an image" else "other")
    before, after = store.repair(source=str(source))
    assert before.problems and not after.problems
    assert not store.verify("site").problems
    assert sorted(os.listdir(layer.path)) == [b"lock", b"manifest", b"record", b"tree"]


def test_holes_stay_holes(store: Store, other: Store) -> None:
    layer = put(store, "site", TREE)
    at(layer, "big").unlink()
    store.repair(source=os.fsdecode(other.path))
    found = at(layer, "big").stat()
    assert found.st_blocks * 512 < found.st_size // 2


def test_from_another_layer_under_another_name(store: Store) -> None:
    base = put(store, "base", {"d": {"elsewhere": File(b"the same content", mode=0o600)}})
    layer = put(store, "site", {"f": File(b"the same content", mode=0o755, uid=3), "g": "lost"}, base.id)
    flip(at(layer, "f"))
    flip(at(layer, "g"))
    _, after = store.repair("site", source="base")
    assert [(each.path, each.kind) for each in after.problems] == [(b"g", "damaged")]
    assert at(layer, "f").read_bytes() == b"the same content" and at(layer, "f").stat().st_uid == 3


def test_a_damaged_copy_is_not_used(store: Store, other: Store) -> None:
    layer = put(store, "site", TREE)
    flip(at(layer, "big"))
    wrong = other.layers.find(other.images.find("site").layers[0])
    flip(at(wrong, "big"))
    content = at(layer, "big").read_bytes()
    _, after = store.repair(source=os.fsdecode(other.path))
    assert [each.path for each in after.problems] == [b"big"]
    assert at(layer, "big").read_bytes() == content


def test_a_mounted_layer_is_not_changed(store: Store, other: Store) -> None:
    layer = put(store, "site", TREE)
    flip(at(layer, "big"))
    with layer.hold(), pytest.raises(UserError, match="is in use"):
        store.repair(source=os.fsdecode(other.path))


def test_nothing_to_do(store: Store, other: Store) -> None:
    put(store, "site", TREE)
    before, after = store.repair(source=os.fsdecode(other.path))
    assert before == after and not before.problems


class Killed(BaseException):
    """The machine stops."""


@pytest.mark.parametrize("damage", ["both names", "a directory that is a file", "attributes", "something new"])
def test_killed_anywhere_and_done_again(
    store: Store, other: Store, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = put(store, "site", TREE)
    point = 0
    while True:
        DAMAGES[damage](layer)
        left = [point]

        def blow(call: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        monkeypatch.setattr(sysio, "fault_hook", blow)
        try:
            store.repair(source=os.fsdecode(other.path))
        except Killed:
            pass
        monkeypatch.setattr(sysio, "fault_hook", None)
        store.repair(source=os.fsdecode(other.path))
        assert not verify(store.directory, None).problems, f"killed at change {point}"
        assert sorted(os.listdir(layer.path)) == [b"lock", b"manifest", b"record", b"tree"]
        if left[0] >= 0:
            break
        point += 1
    assert point > 5
    store.gc()
    assert os.listdir(os.path.join(store.path, b"staging")) == []
