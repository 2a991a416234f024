"""The commands for stores, with real mounts: images are mounted, changed, committed, listed and removed."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overlayfs.mount import mounts, unmount
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from overlayfs_cli import store_option
from tests.cli.conftest import Ended, Run, process, program
from tests.store.samples import add_image, add_layer
from tests.support import leftovers, processes, requirements, syscalls
from tests.support.polling import until


@pytest.fixture
def shop(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a store, to which OVERLAYFS_STORE is set, and the mount points `m` and `n`."""
    requirements.need_root()
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    before = processes.children()
    for name in ("m", "n"):
        (place / name).mkdir()
    yield place
    for point in leftovers.mounts_below(place):
        syscalls.umount(os.fsencode(point), 2)
    processes.reap_since(before)


@pytest.fixture
def site(shop: Path) -> Path:
    """The directory, with an image `site:v1` of two layers in its store."""
    with LayerStore(os.fsencode(shop / "store")) as store:
        add_image(store, "site:v1", {"etc/motd": "of v1\n", "index": "old\n"}, {"style": "plain\n"})
    return shop


def cli(shop: Path, *words: str) -> Ended:
    return process("overlayfs", *words, cwd=shop)


def done(shop: Path, *words: str) -> str:
    """Run a command, which must succeed and print nothing on standard error."""
    ended = cli(shop, *words)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def answer(shop: Path, *words: str) -> Any:
    return json.loads(done(shop, *words, "--json"))


def daemon(shop: Path, point: str) -> int:
    mounts = answer(shop, "mounts")["mounts"]
    return next(int(mount["pid"]) for mount in mounts if mount["mountpoint"] == str(shop / point))


# --- mounting


def test_a_workspace_is_kept_resumed_and_removed(site: Path) -> None:
    assert done(site, "mount", "site:v1", "m", "--name", "draft") == ""
    (site / "m/new").write_text("mine")
    done(site, "umount", "m")
    assert not (site / "m/new").exists()
    assert answer(site, "workspaces")["workspaces"][0]["mountpoint"] is None
    done(site, "mount", "site:v1", "m", "--name", "draft")
    assert (site / "m/new").read_text() == "mine"
    assert answer(site, "workspaces")["workspaces"][0]["mountpoint"] == str(site / "m")
    refused = cli(site, "rm", "draft")
    assert refused.code == 1
    assert refused.err.startswith(f"overlayfs: workspace draft is in use by the mount at {site / 'm'} (pid ")
    refused = cli(site, "mount", "site:v1", "n", "--name", "draft")
    assert refused.code == 32
    assert "workspace draft is in use by the mount at" in refused.err
    done(site, "umount", "m")
    assert done(site, "rm", "draft") == ""
    assert answer(site, "workspaces") == {"workspaces": []}
    assert (site / "store/trash").is_dir() and not any((site / "store/trash").iterdir())


def test_a_workspace_keeps_its_layers_when_the_image_moves_on(site: Path) -> None:
    done(site, "mount", "site:v1", "m", "--name", "draft")
    done(site, "umount", "m")
    with LayerStore(os.fsencode(site / "store")) as store:
        add_image(store, "site:v1", {"index": "another\n"})
    again = cli(site, "mount", "site:v1", "m", "--name", "draft")
    assert again == (0, "", "overlayfs: note: workspace draft keeps the layers that site:v1 had when it was created\n")
    assert (site / "m/index").read_text() == "old\n"
    done(site, "mount", "site:v1", "n", "--ephemeral")
    assert (site / "n/index").read_text() == "another\n"


def test_one_image_is_mounted_twice(site: Path) -> None:
    first = done(site, "mount", "site:v1", "m").strip()
    second = done(site, "mount", "site:v1", "n").strip()
    (site / "m/index").write_text("changed")
    assert (site / "n/index").read_text() == "old\n"
    assert done(site, "workspaces", "-q").split() == sorted((first, second))
    found = {mount["workspace"]: mount for mount in answer(site, "mounts")["mounts"]}
    assert found[first]["image"] == "site:v1"
    assert found[first]["store"] == str(site / "store")
    assert found[first]["upper"] == str(site / "store/workspaces" / first / "upper")
    table = done(site, "mounts")
    assert first in table and "site:v1" in table


@pytest.mark.parametrize("killed", [False, True])
def test_an_ephemeral_mount_leaves_nothing(site: Path, killed: bool) -> None:
    assert done(site, "mount", "site:v1", "m", "--ephemeral") == ""
    (site / "m/new").write_text("gone soon")
    assert answer(site, "workspaces")["workspaces"][0]["ephemeral"] is True
    assert answer(site, "gc", "--dry-run")["garbage"] == []
    if killed:
        pid = daemon(site, "m")
        os.kill(pid, signal.SIGKILL)
        processes.reap(pid)
        assert answer(site, "workspaces")["workspaces"] == []
        done(site, "umount", "m")
    else:
        done(site, "umount", "m")
        assert not any((site / "store/workspaces").iterdir())
    assert not any((site / "store/trash").iterdir())


def test_what_is_mounted_is_not_garbage(site: Path) -> None:
    done(site, "mount", "site:v1", "m", "--ephemeral")
    done(site, "rm", "site:v1")
    assert done(site, "gc") == ""
    assert (site / "m/style").read_text() == "plain\n"
    done(site, "umount", "m")
    dry = answer(site, "gc", "--dry-run")
    assert len(dry["garbage"]) == 2 and dry["size"] > 0
    assert answer(site, "gc") == dry
    assert done(site, "layers") == ""


def test_a_mount_that_fails_leaves_no_workspace(site: Path) -> None:
    assert cli(site, "mount", "site:v1", "nowhere").code == 32
    assert done(site, "workspaces") == ""
    done(site, "mount", "site:v1", "m", "--name", "kept")
    done(site, "umount", "m")
    assert cli(site, "mount", "site:v1", "nowhere", "--name", "kept").code == 32
    assert done(site, "workspaces", "-q") == "kept\n"


def test_a_mount_of_an_image_in_the_foreground(site: Path) -> None:
    words = ("mount", "site:v1", "m", "-f", "--ephemeral")
    running = subprocess.Popen([program("overlayfs"), *words], cwd=site)
    until(lambda: running.poll() is not None or os.path.ismount(site / "m"))
    assert (site / "m/style").read_text() == "plain\n"
    done(site, "umount", "m")
    assert running.wait(20) == 0
    assert not any((site / "store/workspaces").iterdir())


def test_work_survives_a_mount_in_the_foreground_that_ends_by_an_error(site: Path) -> None:
    """Its workspace is new, as after a mount that failed, but it has changes."""
    running = subprocess.Popen(
        [program("overlayfs"), "mount", "site:v1", "m", "-f", "--name", "draft"], cwd=site, stderr=subprocess.PIPE
    )
    until(lambda: running.poll() is not None or os.path.ismount(site / "m"))
    (site / "m/new").write_text("hours of work")
    unmount.abort(mounts.find(os.fsencode(site / "m")))
    _, written = running.communicate(timeout=20)
    assert running.returncode == 32 and b"was cut off from the kernel" in written
    done(site, "mount", "site:v1", "m", "--name", "draft")
    assert (site / "m/new").read_text() == "hours of work"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("mount nothing m", 32, "there is no image nothing:latest; `overlayfs images` lists them"),
        ("mount No! m", 32, "'No!' is not an image name; write NAME[:TAG]"),
        ("mount site:v1 m --name ../x", 32, "'../x' is not a workspace name"),
        ("mount site:v1 m --lower a", 2, "an image brings its own layers"),
        ("mount site:v1 m -o upperdir=a,workdir=b", 2, "an image brings its own layers"),
        ("mount --lower store m --ephemeral", 2, "--name, --ephemeral and --store belong to a mount of an image"),
        ("mount site:v1 m n", 2, "too many arguments: n"),
        ("mount site:v1 m --store nowhere", 32, "there is no store at "),
        ("images --store nowhere", 1, "there is no store at "),
        ("log nothing", 1, "nothing is no workspace, image or layer of the store"),
        ("tag nothing new", 1, "there is no image nothing:latest"),
        ("tag site:v1 Bad", 1, "'Bad' is not an image name"),
        ("rm a/b", 1, "there is no image and no workspace a/b"),
        ("rm nothing", 1, "there is no image and no workspace nothing"),
        ("commit nothing", 1, "there is no workspace nothing"),
        ("commit --upper n --lower m -t x", 1, "m is not a layer of the store; import it first"),
    ],
)
def test_refusals(site: Path, words: str, code: int, sentence: str) -> None:
    ended = cli(site, *words.split())
    assert ended.code == code
    assert ended.err.startswith(f"overlayfs: {sentence}") and ended.err.count("\n") == 1
    assert ended.out == ""
    assert not (site / "nowhere").exists()


@pytest.mark.parametrize("command", ["rm", "log", "tag", "commit", "mount"])
def test_names_that_are_not_utf8(site: Path, command: str) -> None:
    words: tuple[str | bytes, ...] = (b"\xff", "m") if command in ("tag", "mount") else (b"\xff",)
    ended = process("overlayfs", command, *words, cwd=site)
    assert ended.code == (32 if command == "mount" else 1)
    assert ended.err.startswith("overlayfs: ") and ended.err.count("\n") == 1 and "defect" not in ended.err


# --- committing


def test_a_workspace_becomes_an_image(site: Path) -> None:
    done(site, "mount", "site:v1", "m", "--name", "draft")
    (site / "m/index").write_text("new\n")
    (site / "m/etc").rename(site / "m/conf")
    (site / "m/style").unlink()
    done(site, "umount", "m")
    upper = os.stat(site / "store/workspaces/draft/upper").st_ino
    made = done(site, "commit", "draft", "-t", "site:v2", "-m", "new page\nand more").strip()
    assert os.stat(site / f"store/layers/{made}/tree").st_ino == upper
    assert answer(site, "log", "site:v2")["layers"][0] | {"created": "", "digest": "", "size": 0} == {
        "id": made, "created": "", "author": "root", "message": "new page\nand more", "size": 0, "state": "complete",
        "digest": "",
    }  # fmt: skip
    assert "new page" in done(site, "log", "site:v2").splitlines()[1]
    done(site, "mount", "site:v2", "n", "--ephemeral")
    assert sorted(os.listdir(site / "n")) == ["conf", "index"]
    assert (site / "n/conf/motd").read_text() == "of v1\n"
    done(site, "mount", "site:v1", "m", "--name", "draft")
    assert (site / "m/index").read_text() == "new\n"
    done(site, "umount", "m", "n")
    refused = cli(site, "commit", "draft", "-t", "site:v3")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("overlayfs: there is nothing to commit: workspace draft has no changes; --allow")
    empty = answer(site, "commit", "draft", "-t", "site:v3", "--allow-empty")
    assert (empty["image"], empty["entries"], empty["size"], empty["state"]) == ("site:v3", 1, 0, "complete")
    assert done(site, "log", "site:v3", "-q").splitlines()[:2] == [empty["layer"], made]


def test_hard_links_stay_linked_through_a_commit(shop: Path) -> None:
    """The index, which joins names that were never copied up, is not part of a layer."""
    with LayerStore(os.fsencode(shop / "store")) as store, store.layers.stage() as staged:
        tree = Path(os.fsdecode(staged.tree_path))
        (tree / "d").mkdir()
        (tree / "one").write_text("data")
        os.link(tree / "one", tree / "d/two")
        layer = staged.publish(manifest=None)
        store.images.put(ImageRecord(name="pair", layers=(layer.id,), created=now()))
    done(shop, "mount", "pair", "m", "--name", "draft")
    with (shop / "m/one").open("a") as file:
        file.write(" more")
    done(shop, "umount", "m")
    done(shop, "commit", "draft", "-t", "pair:2")
    done(shop, "mount", "pair:2", "m", "--ephemeral")
    one, two = (shop / "m/one").stat(), (shop / "m/d/two").stat()
    assert (shop / "m/d/two").read_text() == "data more"
    assert (one.st_ino, one.st_nlink) == (two.st_ino, two.st_nlink) == (one.st_ino, 2)


def test_a_plain_upper_is_copied(site: Path) -> None:
    done(site, "mount", "site:v1", "m", "--ephemeral")
    layers = done(site, "log", "site:v1", "-q").split()
    done(site, "umount", "m")
    lower = [word for layer in layers for word in ("--lower", str(site / "store/layers" / layer / "tree"))]
    for name in ("u", "u.work"):
        (site / name).mkdir()
    done(site, "mount", *lower, "--upper", "u", "m")
    (site / "m/style").write_text("bold\n")
    refused = cli(site, "commit", "--upper", "u", *lower, "-t", "site:v2")
    assert refused.code == 1 and "is in use by the mount at" in refused.err
    done(site, "umount", "m")
    made = answer(site, "commit", "--upper", "u", *lower, "-t", "site:v2", "-m", "copied")
    assert (site / "u/style").read_text() == "bold\n"
    assert (made["image"], made["entries"], made["size"]) == ("site:v2", 2, 5)
    assert done(site, "log", "site:v2", "-q").split() == [made["layer"], *layers]


# --- listing


def test_own_and_shared_bytes(shop: Path) -> None:
    with LayerStore(os.fsencode(shop / "store")) as store:
        base = add_layer(store, {"a": "12345"})
        for name, text in (("one", "1"), ("two", "22")):
            top = add_layer(store, {"b": text})
            store.images.put(ImageRecord(name=name, layers=(top.id, base.id), created=now()))
        unused = add_layer(store, {"c": "333"}, message="not used\nby anything")
    found = {each["name"]: each for each in answer(shop, "images")["images"]}
    assert [found["two:latest"][key] for key in ("size", "own", "shared")] == [7, 2, 5]
    layers = {each["id"]: each for each in answer(shop, "layers")["layers"]}
    assert (layers[base.id]["own"], layers[base.id]["shared"]) == (0, 5)
    assert layers[base.id]["images"] == ["one:latest", "two:latest"]
    assert (layers[unused.id]["own"], layers[unused.id]["images"]) == (3, [])
    table = done(shop, "layers")
    assert f"{unused.id[:12]}  complete  " in table and table.rstrip().endswith("not used")
    assert done(shop, "images", "-q") == "one:latest\ntwo:latest\n"
    assert sorted(done(shop, "layers", "-q").split()) == sorted(layers)
    assert "7 B   2 B  5 B" in done(shop, "images")


def test_tag_and_rm(site: Path) -> None:
    done(site, "tag", "site:v1", "registry.example:5000/site")
    assert done(site, "images", "-q") == "registry.example:5000/site:latest\nsite:v1\n"
    half = cli(site, "rm", "nothing", "site:v1")
    assert (half.code, half.out) == (1, "") and "nothing" in half.err
    assert done(site, "images", "-q") == "registry.example:5000/site:latest\n"
    assert done(site, "gc") == ""


def test_a_name_of_an_image_and_a_workspace(site: Path) -> None:
    done(site, "tag", "site:v1", "both")
    done(site, "mount", "both", "m", "--name", "both")
    done(site, "umount", "m")
    refused = cli(site, "rm", "both")
    assert refused.code == 1
    assert refused.err == (
        "overlayfs: both is an image and a workspace; write both:latest for the image, or use --workspace\n"
    )
    done(site, "rm", "--workspace", "both")
    done(site, "rm", "both")
    assert done(site, "images", "-q") == "site:v1\n"


def test_a_layer_is_found_by_the_start_of_its_id(site: Path) -> None:
    top, base = done(site, "log", "site:v1", "-q").split()
    assert done(site, "log", top[:10], "-q") == f"{top}\n"
    digest = answer(site, "log", base)["layers"][0]["digest"]
    assert done(site, "log", digest[:20], "-q") == f"{base}\n"


def test_the_default_store(overlayfs: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store may be missing, unlike a named one: it counts as empty."""
    monkeypatch.delenv("OVERLAYFS_STORE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(place))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert store_option.path(None) == os.fsencode(place / "overlayfs")
    assert overlayfs("images") == (0, "", "")
    assert json.loads(overlayfs("images", "--json").out) == {"images": []}
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "named"))
    assert store_option.path(None) == os.fsencode(place / "named")
    assert overlayfs("images").code == 1
    assert store_option.path(b"given") == b"given"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("OVERLAYFS_STORE")
    assert store_option.path(None) == b"/var/lib/overlayfs"


def test_another_format_is_refused(site: Path) -> None:
    (site / "store/store").write_text('{"format": 9}\n')
    ended = cli(site, "images")
    assert ended == (
        1,
        "",
        f"overlayfs: the store {site / 'store'} has format 9, this program knows format 1; "
        "use the version of overlayfs that made it\n",
    )
