"""Stores of every format version can be used: an example of each is listed, verified, mounted and committed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.store import layout, verify
from overlayfs.store.store import LayerStore
from tests.cli.conftest import process
from tests.store.make_golden import unpack
from tests.support import leftovers, processes, syscalls
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, dump, same
from tests.support.requirements import need_filesystem, need_program, need_root

EXAMPLES = sorted((Path(__file__).parent / "golden").glob("format-*.tar.gz"))


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store as it was packed, with OVERLAYFS_STORE set to it, and the mount point `m` beside it."""
    need_root()
    need_program("tar")
    unpack(request.param, place / "store")
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    before = processes.children()
    (place / "m").mkdir()
    yield place
    for point in leftovers.mounts_below(place):
        syscalls.umount(os.fsencode(point), 2)
    processes.reap_since(before)


def test_there_is_an_example_of_every_version() -> None:
    names = [path.name for path in EXAMPLES]
    assert names == [f"format-{number}.tar.gz" for number in range(1, layout.FORMAT + 1)]


def test_its_records_are_read(golden: Path) -> None:
    with LayerStore(os.fsencode(golden / "store"), create=False) as store:
        one, two = store.images()
        assert (one.name, one.author, one.architecture, one.config["Env"]) == ("site:1", "ann", "amd64", ["LANG=C"])
        assert (two.name, two.author, two.layers[1:], two.config) == ("site:2", "bob", one.layers, one.config)
        assert [(step.author, step.comment) for step in two.history] == [("ann", "base"), ("bob", "second")]
        top, base = store.stack_of("site:2")
        assert (base.record.message, base.record.state, base.record.flags) == ("base", "complete", ())
        assert (top.record.message, top.record.flags, top.record.below) == (
            "second", ("metacopy", "redirect"), one.layers,
        )  # fmt: skip
        assert [layer.id for layer in store.layers() if store.layers.by_digest(layer.record.digest or "") is None] == []
        (workspace,) = store.workspaces()
        assert (workspace.name, workspace.record.image, workspace.record.layers) == ("draft", "site:2", two.layers)
        assert store.gc() == []


def test_it_verifies(golden: Path) -> None:
    with LayerStore(os.fsencode(golden / "store"), create=False) as store:
        checked = verify.verify(store.directory, None)
        assert (checked.layers, checked.problems, checked.unfinished) == (2, (), ())


def test_it_is_mounted_and_committed(golden: Path) -> None:
    point = golden / "m"
    assert process("overlayfs", "mount", "site:2", "m", "--name", "draft", cwd=golden).code == 0
    assert sorted(os.listdir(point)) == ["etc", "moved", "old", "one", "sparse", "two"]
    assert (point / "moved/doc/text").read_text() == "text\n"
    assert (point / "etc/motd").read_text() == "one\n"
    assert (point / "etc/motd").stat().st_mode & 0o777 == 0o600
    assert os.getxattr(point / "etc/motd", "user.mark") == b"value"
    assert os.listdir(point / "etc") == ["motd"]
    assert os.listdir(point / "old") == []
    assert (point / "one").read_text() == (point / "two").read_text() == "linked\nmore\n"
    assert (point / "one").stat().st_ino == (point / "two").stat().st_ino
    assert (point / "sparse").read_bytes() == bytes(1 << 20) + b"end\n"
    assert process("overlayfs", "umount", "m", cwd=golden).code == 0
    done = process("overlayfs", "commit", "draft", "-t", "site:3", "-m", "third", "--json", cwd=golden)
    assert (done.code, json.loads(done.out)["image"]) == (0, "site:3")
    assert process("overlayfs", "mount", "site:3", "m", "--ephemeral", cwd=golden).code == 0
    assert (point / "sparse").stat().st_size == (1 << 20) + 4
    assert not (point / "link").is_symlink()


def test_the_kernel_mounts_it(golden: Path) -> None:
    """Layers are ordinary overlayfs trees, whatever overlay attributes they have."""
    need_filesystem("overlay")
    with LayerStore(os.fsencode(golden / "store"), create=False) as store:
        lower = ":".join(os.fsdecode(layer.tree_path) for layer in store.stack_of("site:2"))
    options = f"lowerdir={lower},redirect_dir=follow,metacopy=on"
    syscalls.mount(b"overlay", os.fsencode(golden / "m"), b"overlay", 1, options.encode())
    kernel = _picture(golden / "m")
    syscalls.umount(os.fsencode(golden / "m"))
    assert process("overlayfs", "mount", "site:2", "m", "--ephemeral", cwd=golden).code == 0
    same(_picture(golden / "m"), kernel)


def _picture(point: Path) -> Dump:
    raw = PosixRaw(os.fsencode(point))
    try:
        return dump(raw)
    finally:
        raw.close()
