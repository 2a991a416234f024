"""Images for tests: stacks of layers as values, in a store, and their merged trees."""

import os
import subprocess
from pathlib import Path

from overlayfs import Overlay, StackConfig
from overlayfs.fs import Changes
from overlayfs.store.layers import Layer
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import History, ImageRecord
from overlayfs.store.store import LayerStore
from tests.support.builder import build
from tests.support.drivers.overlay import FsRaw
from tests.support.dump import Dump, dump
from tests.support.spec import Dir, File, Link, Special, Symlink, Tree, Whiteout

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
BASE: Tree = {
    "bin": {"su": File(b"su" * 3000, mode=0o4755), "ping": File(b"p", xattrs={"security.capability": CAPABILITY})},
    "etc": Dir({"motd": b"welcome", "passwd": File(b"root", uid=1, gid=2)}, mode=0o2750, uid=3),
    "lib": {"one": b"1", "sub": {"two": b"2"}},
    "hard": Link("bin/su"),
    "link": Symlink("../outside"),
    "hole": File(pieces=((1 << 20, b"data"),), size=3 << 20),
    "null": Special("c", 1, 3),
    "old": {"x": b"x"},
    "pipe": Special("p"),
}
TOP: Tree = {
    "bin": {"ping": Whiteout(), "new": b"new"},
    "etc": Dir({"motd": File(b"changed", xattrs={"user.x": b"v"})}, mode=0o750),
    "lib": Dir({"sub": {"three": b"3"}}, opaque="trusted"),
    "old": Whiteout(),
    "pipe": {"now": b"a directory"},
}
CONFIG = {
    "Env": ["PATH=/bin", "EMPTY="],
    "Entrypoint": ["/bin/su"],
    "Cmd": ["-"],
    "Labels": {"a": "b"},
    "User": "7:8",
    "WorkingDir": "/etc",
    "ExposedPorts": {"80/tcp": {}},
    "StopSignal": "SIGTERM",
}
HISTORY = (
    History(created="2020-01-01T00:00:00Z", created_by="ADD base", author="one"),
    History(created="2020-01-02T00:00:00Z", created_by="ENV", comment="nothing", empty_layer=True),
    History(created="2020-01-03T00:00:00Z", created_by="RUN top", comment="top"),
)


def add(store: LayerStore, tree: Tree | Dir) -> Layer:
    """Publish a layer."""
    with store.layers.stage() as staged:
        build(Path(os.fsdecode(staged.tree_path)), tree)
        with Manifest.build(staged.tree_fd) as manifest:
            return staged.publish(manifest=manifest)


def add_image(store: LayerStore, name: str = "sample:1", *trees: Tree | Dir) -> ImageRecord:
    """Make an image of layers, the top one last; of BASE and TOP if none are given."""
    layers = [add(store, tree) for tree in trees or (BASE, TOP)]
    return store.images.put(
        ImageRecord(
            name=name,
            layers=tuple(layer.id for layer in reversed(layers)),
            created="2020-01-03T00:00:00Z",
            author="somebody",
            architecture="amd64",
            config=CONFIG,
            history=HISTORY if not trees else (),
            annotations={"org.example": "kept"},
        )
    )


def add_marked_image(store: LayerStore, place: Path, name: str) -> ImageRecord:
    """Make an image whose top layer has redirects and a metacopy, as the commit of a mount makes them."""
    base = add(store, {"d": {"f": b"f", "sub": {"g": b"g"}}, "big": b"b" * 9000, "other": {"x": b"x"}})
    for directory in ("upper", "work"):
        (place / directory).mkdir()
    overlay = Overlay(StackConfig((base.tree_path,), os.fsencode(place / "upper"), os.fsencode(place / "work")))
    overlay.names.rename(overlay.root, b"d", overlay.resolve(b"other"), b"moved")
    overlay.names.unlink(overlay.resolve(b"other/moved/sub"), b"g")
    overlay.set_attributes(overlay.resolve(b"big"), Changes(mode=0o4711))
    overlay.close()
    with store.layers.stage() as staged:
        subprocess.run(["cp", "-aT", place / "upper", os.fsdecode(staged.tree_path)], check=True)
        with Manifest.build(staged.tree_fd) as manifest:
            assert set(manifest.flags) == {"redirect", "metacopy"}
            top = staged.publish(manifest=manifest, flags=manifest.flags, below=(base.id,))
    return store.images.put(ImageRecord(name=name, layers=(top.id, base.id), created="2020-01-01T00:00:00Z"))


def view(store: LayerStore, name: str) -> Dump:
    """The merged tree of an image."""
    stack = tuple(store.layers.find(each).tree_path for each in store.images.find(name).layers)
    overlay = Overlay(StackConfig(lower=stack))
    try:
        return dump(FsRaw(overlay))
    finally:
        overlay.close()


def unlinked(found: Dump) -> Dump:
    """The tree without the root's attributes, which differ between file systems."""
    return {path: entry for path, entry in found.items() if path}
