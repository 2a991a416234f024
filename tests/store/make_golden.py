"""Makes the golden example of a store: `python -m tests.store.make_golden NAME.tar.gz`, as root.

It is made once for each version of the format and then only unpacked, so that stores of that version stay readable.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from overlayfs.fs import Caller, Changes, Overlay, StackConfig
from overlayfs.store import commit
from overlayfs.store.commit import CommitRequest
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.store.samples import fill

ROOT = Caller(0, 0)


def make(base: Path) -> None:
    """Make a store with two images of two layers, marks of each kind in the upper one, and a changed workspace."""
    with LayerStore(os.fsencode(base)) as store:
        with store.layers.stage() as staged:
            _base(Path(os.fsdecode(staged.tree_path)))
            with Manifest.build(staged.tree_fd) as manifest:
                layer = staged.publish(manifest=manifest, author="ann", message="base")
        config = {"Env": ["LANG=C"], "Cmd": ["/bin/true"]}
        store.images.put(
            ImageRecord(
                name="site:1", layers=(layer.id,), created=now(), author="ann", architecture="amd64", config=config
            )
        )
        _change(store, "draft", _first)
        made = commit.commit_workspace(store, "draft", CommitRequest(image="site:2", message="second", author="bob"))
        commit.hash_layer(store, made)
        _change(store, "draft", _second)


def _base(tree: Path) -> None:
    fill(
        os.fsencode(tree), {"etc/motd": "one\n", "etc/hosts": "localhost\n", "share/doc/text": "text\n", "old/x": "x\n"}
    )
    (tree / "one").write_text("linked\n")
    os.link(tree / "one", tree / "two")
    (tree / "link").symlink_to("etc/motd")
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 20)
    os.setxattr(tree / "etc" / "motd", "user.mark", b"value")
    (tree / "etc" / "motd").chmod(0o640)
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(0, 1_000_000_000), follow_symlinks=False)


def _change(store: LayerStore, name: str, change: object) -> None:
    workspace = store.workspaces.get(name) or store.workspaces.create("site:1", name)
    lower = tuple(layer.tree_path for layer in store.present(workspace.record.layers))
    overlay = Overlay(StackConfig(lower=lower, upper=workspace.upper_path, work=workspace.work_path))
    assert callable(change)
    try:
        change(overlay)
    finally:
        overlay.close()


def _first(overlay: Overlay) -> None:
    root = overlay.root
    etc = overlay.lookup(root, b"etc")
    overlay.names.unlink(etc, b"hosts")
    overlay.set_attributes(overlay.lookup(etc, b"motd"), Changes(mode=0o600))
    overlay.names.rename(root, b"share", root, b"moved")
    old = overlay.lookup(root, b"old")
    overlay.names.unlink(old, b"x")
    overlay.names.rmdir(root, b"old")
    overlay.names.mkdir(root, b"old", 0o755, ROOT)
    _append(overlay, b"one", b"more\n")


def _second(overlay: Overlay) -> None:
    # No hard links: their index in the work directory is valid on this file system only.
    _append(overlay, b"sparse", b"end\n")
    overlay.names.unlink(overlay.root, b"link")


def _append(overlay: Overlay, name: bytes, data: bytes) -> None:
    node = overlay.lookup(overlay.root, name)
    fh = overlay.files.open(node, os.O_WRONLY)
    overlay.files.write(fh, overlay.attributes(node).size, data)
    overlay.files.release(fh)


def pack(base: Path, target: Path) -> None:
    """Pack a store with all its attributes and devices."""
    words = [
        "tar",
        "--create",
        "--auto-compress",
        "--sparse",
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
        "--sort=name",
    ]
    subprocess.run([*words, "--file", str(target), "--directory", str(base), "."], check=True)


def unpack(source: Path, base: Path) -> None:
    """Unpack such a store into a new directory; needs root."""
    base.mkdir()
    words = ["tar", "--extract", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--preserve-permissions"]
    subprocess.run([*words, "--same-owner", "--file", str(source), "--directory", str(base)], check=True)


def main(target: Path) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        make(place / "store")
        pack(place / "store", target)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
