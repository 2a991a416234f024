"""`overlayfs diff`, `squash` and `verify` with real mounts and a real registry."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overlayfs.store.store import LayerStore
from tests.cli.conftest import Ended, process, program
from tests.cli.test_terminal import Terminal
from tests.oci import registries
from tests.store.samples import add_image
from tests.support import leftovers, processes, requirements, syscalls

FIRST = {"etc/motd": "of v1\n", "etc/hosts": "localhost\n", "index": "old\n"}
SECOND = {"etc/motd": "of v2\n", "style": "plain\n"}


@pytest.fixture
def shop(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a store, to which OVERLAYFS_STORE is set: images `v1` and `v2`, mount points `m` and `n`."""
    requirements.need_root()
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    before = processes.children()
    for name in ("m", "n"):
        (place / name).mkdir()
    with LayerStore(os.fsencode(place / "store")) as store:
        add_image(store, "v1", FIRST)
        add_image(store, "v2", FIRST, SECOND)
    yield place
    for point in leftovers.mounts_below(place):
        syscalls.umount(os.fsencode(point), 2)
    processes.reap_since(before)


def cli(shop: Path, *words: str) -> Ended:
    return process("overlayfs", *words, cwd=shop)


def done(shop: Path, *words: str) -> str:
    ended = cli(shop, *words)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def answer(shop: Path, *words: str) -> Any:
    return json.loads(done(shop, *words, "--json"))


def trees(shop: Path) -> list[Path]:
    return sorted((shop / "store/layers").glob("*/tree"))


# --- diff


def test_images(shop: Path) -> None:
    assert done(shop, "diff", "v2") == "C /etc\nC /etc/motd\nA /style\n"
    assert done(shop, "diff", "v2", "v1") == "C /etc\nC /etc/motd\nA /style\n"
    assert done(shop, "diff", "v1", "v2") == "C /etc\nC /etc/motd\nD /style\n"
    assert done(shop, "diff", "v1", "v1") == ""
    assert done(shop, "diff", "v1") == "A /etc\nA /etc/hosts\nA /etc/motd\nA /index\n"
    assert done(shop, "diff", "v2", "v1", "--stat") == "1 added, 2 changed, 0 deleted; 12 B in, 6 B out\n"
    assert answer(shop, "diff", "v2", "v1", "--stat") == {
        "added": 1, "changed": 2, "deleted": 0, "bytes_in": 12, "bytes_out": 6
    }  # fmt: skip
    changes = [{"kind": kind, "path": path} for kind, path in (("C", "/etc"), ("C", "/etc/motd"), ("A", "/style"))]
    assert answer(shop, "diff", "v2", "v1") == {"changes": changes}


def test_mounts_and_workspaces_are_alike(shop: Path) -> None:
    done(shop, "mount", "v2", "m", "--name", "draft")
    (shop / "m/etc/hosts").unlink()
    (shop / "m/index").write_text("new\n")
    (shop / "m/etc").rename(shop / "m/moved")
    mounted, against = done(shop, "diff", "m"), done(shop, "diff", "m", "v1")
    sizes = done(shop, "diff", "m", "--stat")
    assert mounted == "D /etc\nC /index\nA /moved\nA /moved/motd\n"
    assert against == "C /\nD /etc\nC /index\nA /moved\nA /moved/motd\nA /style\n"
    assert sizes == "2 added, 1 changed, 1 deleted; 10 B in, 20 B out\n"
    assert done(shop, "diff", "draft", "v1") == against
    assert done(shop, "diff", "v1", "m") == "C /\nA /etc\nA /etc/hosts\nA /etc/motd\nC /index\nD /moved\nD /style\n"
    assert done(shop, "diff", str(shop / "m"), "draft") == ""
    done(shop, "umount", "m")
    assert done(shop, "diff", "draft") == mounted
    assert done(shop, "diff", "draft", "--stat") == sizes
    done(shop, "mount", "v2", "m", "--ephemeral")
    done(shop, "mount", "v1", "n", "--ephemeral")
    assert done(shop, "diff", "m", "n") == "C /etc\nC /etc/motd\nA /style\n"


def test_a_mount_of_plain_directories(shop: Path) -> None:
    for name in "lu":
        (shop / name).mkdir()
    (shop / "l/one").write_text("x")
    os.link(shop / "l/one", shop / "l/two")
    done(shop, "mount", "--lower", "l", "--upper", "u", "m")
    (shop / "m/one").write_text("y")
    assert done(shop, "diff", "m") == "C /one\nC /two\n"  # one file, whose second name only the index knows of
    assert done(shop, "diff", "m", "v1").splitlines()[-2:] == ["A /one", "A /two"]
    done(shop, "umount", "m")
    done(shop, "mount", "--lower", "l", "m")
    assert done(shop, "diff", "m") == "A /one\nA /two\n"


def test_an_unknown_name(shop: Path) -> None:
    ended = cli(shop, "diff", "nothing")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        "overlayfs: nothing is no workspace, image or layer of the store; `overlayfs images` lists what is there\n"
    )
    assert "is not a mount of overlayfs" in cli(shop, "diff", "./m").err


# --- squash


def test_squash(shop: Path) -> None:
    layer = done(shop, "squash", "v2", "-t", "small", "-m", "all in one").strip()
    assert done(shop, "diff", "small", "v2") == ""
    (listed,) = [each for each in answer(shop, "layers")["layers"] if each["id"] == layer]
    assert (listed["message"], listed["images"], listed["state"]) == ("all in one", ["small:latest"], "complete")
    made = answer(shop, "squash", "v2", "-t", "again:1", "--last", "2")
    assert made == {"image": "again:1", "layer": layer, "layers": [layer], "size": 26, "entries": 6}
    done(shop, "mount", "small", "m", "--ephemeral")
    assert (shop / "m/etc/motd").read_text() == "of v2\n"
    ended = cli(shop, "squash", "v2", "-t", "x", "--last", "3")
    assert (ended.code, ended.err) == (
        1, "overlayfs: v2:latest has 2 layers; squash between 1 and that many of them\n"
    )  # fmt: skip
    assert cli(shop, "squash", "v2", "-t", "x", "--last", "0").code == 2
    assert cli(shop, "squash", "v2").code == 2


def test_an_interrupted_squash_leaves_nothing(shop: Path) -> None:
    with LayerStore(os.fsencode(shop / "store")) as store:
        add_image(store, "big", {f"{number // 100}/{number}": "content" for number in range(8000)})
    before = {path: sorted(os.listdir(shop / "store" / path)) for path in ("layers", "images", "staging", "trash")}
    terminal = Terminal()
    words = [program("overlayfs"), "squash", "big", "-t", "small"]
    running = subprocess.Popen(words, cwd=shop, stdout=subprocess.PIPE, stderr=terminal.theirs)
    terminal.started()
    terminal.wait_for(b" entries, ")
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60)[0] == b"" and running.returncode == 130
    terminal.rest()
    assert before == {path: sorted(os.listdir(shop / "store" / path)) for path in before}


# --- verify


def damage(shop: Path) -> Path:
    (path,) = [tree / "etc/hosts" for tree in trees(shop) if (tree / "etc/hosts").exists()]
    times = path.stat()
    path.write_text("localhosT\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path


def test_verify(shop: Path) -> None:
    assert done(shop, "verify") == "2 layers, 9 entries, 32 B: as recorded\n"
    assert done(shop, "verify", "v1") == "1 layer, 5 entries, 20 B: as recorded\n"
    assert done(shop, "verify", "v1", "-q") == ""
    layer = damage(shop).parents[2].name
    assert cli(shop, "verify") == Ended(1, f"damaged layer {layer[:12]} /etc/hosts: content\n", "")
    found = cli(shop, "verify", layer[:8], "--json")
    document = json.loads(found.out)
    assert found.code == 1
    assert document["problems"] == [
        {"layer": layer, "path": "/etc/hosts", "kind": "damaged", "differs": ["content"]}
    ]  # fmt: skip
    assert document["repaired"] == []
    ended = cli(shop, "verify", "nothing")
    assert ended.code == 1 and "is no workspace, image or layer" in ended.err


def test_a_damaged_record_is_named_and_the_rest_is_verified(shop: Path) -> None:
    record = trees(shop)[0].parent / "record"
    record.write_bytes(record.read_bytes().replace(b"complete", b"compIete"))
    ended = cli(shop, "verify")
    layer = trees(shop)[0].parent.name
    assert (ended.code, ended.err) == (1, "")
    assert ended.out == f"damaged layer {layer[:12]} record: content\n"


def test_repair_from_another_store(shop: Path) -> None:
    shutil.copytree(shop / "store", shop / "copy", symlinks=True)
    path = damage(shop)
    layer = path.parents[2].name
    out = done(shop, "verify", "--repair-from", "copy")
    assert out.splitlines() == [
        f"repaired damaged layer {layer[:12]} /etc/hosts: content", "2 layers, 9 entries, 32 B: as recorded"
    ]  # fmt: skip
    assert path.read_text() == "localhost\n"


def test_repair_does_not_wait_for_a_layer_in_use(shop: Path) -> None:
    damage(shop)
    done(shop, "mount", "v1", "m", "--ephemeral")
    ended = cli(shop, "verify", "--repair-from", "v2")
    assert ended.code == 1 and "is in use; unmount what uses it first" in ended.err


def test_repair_from_a_registry(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "auth.json").write_text("{}")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(shop / "auth.json"))
    with registries.registry(shop / "registry") as host:
        done(shop, "push", "v2", f"{host}/site:v2", "--plain-http")
        path = damage(shop)
        out = done(shop, "verify", "v2", "--repair-from", f"{host}/site:v2", "--plain-http")
    assert out.splitlines()[0] == f"repaired damaged layer {path.parents[2].name[:12]} /etc/hosts: content"
    assert path.read_text() == "localhost\n"
    assert os.listdir(shop / "store/staging") == []
    assert subprocess.run(["ls", shop / "store/images"], capture_output=True, check=True).stdout.count(b"\n") == 2
