"""A commit of a mounted image under running programs: they continue, and the layer has all acknowledged writes."""

import fcntl
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.mount import control_client
from overlayfs.mount.control_protocol import CommitImage
from overlayfs.store.store import LayerStore
from tests.mounted.conftest import PROGRAM, Mount
from tests.mounted.images import IMAGE, ImageMount
from tests.mounted.writers import NewFiles, files_in
from tests.support import engines, processes
from tests.support.campaign import Campaign
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, dump
from tests.support.polling import until
from tests.support.requirements import need, need_root

WRITERS = 4


@pytest.fixture
def made(place: Path) -> Iterator[ImageMount]:
    """An image, not mounted."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    found = ImageMount(place)
    yield found
    found.finish()


@pytest.fixture
def image(made: ImageMount) -> ImageMount:
    """An image, mounted."""
    made.start()
    return made


def shown_by(point: Path) -> Dump:
    """Everything that a mount shows."""
    raw = PosixRaw(os.fsencode(point))
    try:
        return dump(raw)
    finally:
        raw.close()


def inodes(root: Path) -> dict[str, int]:
    """The inode number of every path."""
    return {
        os.path.join(directory, name): os.lstat(os.path.join(directory, name)).st_ino
        for directory, directories, files in os.walk(root)
        for name in (*directories, *files)
    }


# --- programs that continue ----------------------------------------------------------------------------------


def test_tree_numbers_and_the_layer(image: ImageMount) -> None:
    """Every kind of change in an upper; after a remount the tree is the same."""
    point = image.point
    (point / "new").write_bytes(b"new")
    (point / "d" / "f").chmod(0o600)
    (point / "d").rename(point / "moved")
    (point / "doomed").unlink()
    (point / "dir").mkdir()
    os.symlink("new", point / "link")
    (point / "one").write_bytes(b"written by one name")
    shown, numbers = shown_by(point), inodes(point)
    made = image.commit("-t", "site:2", "-m", "first")
    assert shown_by(point) == shown
    assert inodes(point) == numbers
    assert (image.tree(made) / "new").read_bytes() == b"new"
    assert not os.listdir(image.workspace / "upper")
    (point / "moved" / "inner" / "leaf").write_bytes(b"changed")
    (point / "dir").rmdir()
    shown, numbers = shown_by(point), inodes(point)
    image.commit("-t", "site:3")
    assert shown_by(point) == shown
    assert inodes(point) == numbers
    image.unmount()
    image.start("site:3")
    assert shown_by(point) == shown
    assert inodes(point) == numbers
    image.unmount()


def test_open_files(image: ImageMount) -> None:
    """Readers and writers, O_APPEND, a lock, and an unlinked file."""
    path = image.point / "file"
    with (
        path.open("w+b", buffering=0) as writer,
        path.open("rb", buffering=0) as reader,
        path.open("ab", buffering=0) as appender,
        (image.point / "unnamed").open("w+b", buffering=0) as unnamed,
    ):
        writer.write(b"before, ")
        unnamed.write(b"before, ")
        fcntl.flock(writer, fcntl.LOCK_EX)
        (image.point / "unnamed").unlink()
        number = os.fstat(writer.fileno()).st_ino
        made = image.commit()
        assert reader.read() == b"before, "
        appender.write(b"appended, ")
        writer.write(b"WRITTEN, ")
        unnamed.write(b"after")
        assert os.fstat(writer.fileno()).st_ino == path.stat().st_ino == number
        with pytest.raises(BlockingIOError):
            fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fsync(writer.fileno())
        assert path.read_bytes() == b"before, WRITTEN,  "  # the append was one byte longer
        assert os.pread(unnamed.fileno(), 100, 0) == b"before, after"
        assert (image.tree(made) / "file").read_bytes() == b"before, "
        assert not (image.tree(made) / "unnamed").exists()
    image.unmount()


def test_appending_continues_at_the_end(image: ImageMount) -> None:
    path = image.point / "log"
    with path.open("ab", buffering=0) as log:
        for turn in range(5):
            log.write(b"%d\n" % turn)
            image.commit()
        log.write(b"end\n")
    assert path.read_bytes() == b"0\n1\n2\n3\n4\nend\n"
    image.unmount()


def test_shared_mappings(image: ImageMount) -> None:
    """What was stored before the commit is in the layer, what is stored after it is not, and both are in the file."""
    path = image.point / "mapped"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as memory:
        memory[0:6] = b"before"
        made = image.commit()
        memory[4096:4101] = b"after"
        assert memory[0:6] == b"before"
        again = image.commit()
        assert (image.tree(again) / "mapped").read_bytes() == b"before".ljust(4096, b"\0") + b"after".ljust(4096, b"\0")
        memory[4096:4102] = b"latest"
        memory.flush()
        committed = (image.tree(made) / "mapped").read_bytes()
        assert committed == b"before".ljust(8192, b"\0")
        assert path.read_bytes() == b"before".ljust(4096, b"\0") + b"latest".ljust(4096, b"\0")
    image.unmount()


def test_working_directory_and_listing(image: ImageMount) -> None:
    """A program whose working directory is in the mount, and one that is listing a directory."""
    directory = image.point / "many"
    directory.mkdir()
    for number in range(2000):
        (directory / f"{number:04}").touch()
    program = (
        "import os, sys\n"
        "entries = os.scandir('.')\n"
        "found = [next(entries).name for _ in range(10)]\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "found += [entry.name for entry in entries]\n"
        "open('made', 'w').close()\n"
        "print(len(found), len(set(found)), os.path.basename(os.getcwd()))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        image.commit()
        reader.stdin.write("\n")
        reader.stdin.close()
        assert reader.stdout.read() == "2000 2000 many\n"
    assert os.listdir(image.workspace / "upper" / "many") == ["made"]
    image.unmount()


# --- writers at work ---------------------------------------------------------------------------------------


@pytest.mark.campaign("T18")
@pytest.mark.timeout(240)
def test_killed_at_any_moment(made: ImageMount, campaign: Campaign) -> None:
    """kill -9 while commits and writers run: all that was acknowledged is there after the next mount."""
    acknowledged, lost = 0, list[str]()
    for turn in range(campaign.size(3, 10)):
        made.start()
        writers = [NewFiles(made.point / f"t{turn}w{number}") for number in range(WRITERS)]
        with writers[0], writers[1], writers[2], writers[3]:
            until(lambda: all(writer.acknowledged > 10 for writer in writers))  # noqa: B023
            before = processes.children()
            committing = _commits_until_killed(made)
            until(lambda: os.listdir(made.store / "intents"))
            until(lambda: all(writer.acknowledged > 30 + 10 * turn for writer in writers))  # noqa: B023
            made.kill()
            committing.join()
        processes.reap_since(before - {*made.pids})
        made.start()
        for writer in writers:
            assert writer.error is not None
            acknowledged += writer.acknowledged
            lost += writer.compare(files_in(writer.directory), writer.acknowledged, writer.acknowledged + 1)
        made.commit("-t", "site:now", "--allow-empty")
        made.unmount()
    with LayerStore(os.fsencode(made.store)) as store:
        store.gc()
    assert os.listdir(made.store / "intents") == []
    campaign.held(f"acknowledged writes, kill -9 during commits, engine {engines.current()}", acknowledged, lost)


def _commits_until_killed(made: ImageMount) -> threading.Thread:
    def run() -> None:
        with suppress(UserError):  # the daemon is gone
            while True:
                control_client.Client.at(os.fsencode(made.point)).commit_image(CommitImage(allow_empty=True))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# --- results ------------------------------------------------------------------------------------------


def _overlayfs(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=60, check=False)


def test_the_results_of_the_commands(image: ImageMount) -> None:
    point = str(image.point)
    refused = _overlayfs("commit", point, "-t", "site:2")
    assert refused.returncode == 1
    assert refused.stderr == (
        "overlayfs: there is nothing to commit: the mount has no changes; --allow-empty makes a layer all the same\n"
    )
    (image.point / "new").touch()
    made = image.commit("-t", "site:2", "-m", "words", "--author", "me")
    assert made["image"] == "site:2"
    (mount,) = (m for m in json.loads(_overlayfs("mounts", "--json").stdout)["mounts"] if m["mountpoint"] == point)
    assert mount["image"] == "site:2"
    assert len(mount["lower"]) == 2
    with LayerStore(os.fsencode(image.store)) as store:
        record = store.layers.find(made["layer"]).record
    assert (record.message, record.author, record.state) == ("words", "me", "complete")
    image.unmount()


def test_usable_before_it_is_hashed(image: ImageMount) -> None:
    (image.point / "new").write_bytes(b"new")
    before = processes.children()
    client = control_client.Client.at(os.fsencode(image.point))
    layer = client.commit_image(CommitImage(image="site:2")).layer
    with LayerStore(os.fsencode(image.store)) as store:
        assert store.images.find("site:2").layers[0] == layer
    assert (image.tree({"layer": layer}) / "new").read_bytes() == b"new"
    until(lambda: client.hashing(layer).state == "done")
    processes.reap_since(before)
    with LayerStore(os.fsencode(image.store)) as store:
        assert store.layers.find(layer).record.digest is not None
    image.unmount()


def test_a_mount_knows_its_store(image: ImageMount) -> None:
    refused = _overlayfs("commit", str(image.point), "--store", str(image.store))
    assert refused.returncode == 2
    assert refused.stderr == "overlayfs: a mount of an image knows its store; leave --store out\n"
    image.unmount()


# --- mounts of directories ---------------------------------------------------------------------------------


def test_directories_that_are_in_no_store(made: ImageMount, mount: Mount) -> None:
    mount.start()
    (mount.point / "new").touch()
    refused = _overlayfs("commit", str(mount.point), "-t", "site:2", "--store", str(made.store))
    assert refused.returncode == 1
    assert "is not a layer of the store; import it first" in refused.stderr
    mount.unmount()


def test_a_mount_over_layers_by_their_paths(made: ImageMount, mount: Mount) -> None:
    """The layer is a copy: the next mount of the same directories must show no less."""
    with LayerStore(os.fsencode(made.store)) as store:
        lower = os.fsdecode(store.stack_of(IMAGE)[0].tree_path)
    mount.stack.lower = [lower]
    mount.start()
    words = ("commit", str(mount.point), "-t", "site:2", "-m", "words", "--store", str(made.store))
    refused = _overlayfs(*words)
    assert refused.stderr.startswith("overlayfs: there is nothing to commit")
    (mount.point / "new").write_bytes(b"new")
    (mount.point / "d").rename(mount.point / "moved")
    shown = shown_by(mount.point)
    done = _overlayfs(*words)
    assert done.returncode == 0, done.stderr
    assert shown_by(mount.point) == shown
    assert (mount.stack.upper / "new").exists()
    mount.unmount()
    with LayerStore(os.fsencode(made.store)) as store:
        image = store.images.find("site:2")
        assert image.layers[0] == done.stdout.strip()
        assert store.layers.find(image.layers[0]).record.state == "complete"
        assert [each.kind for each in store.gc()] == []
    made.start("site:2")
    assert shown_by(made.point) == shown
    made.unmount()


# --- what stays --------------------------------------------------------------------------------------------


def test_a_layer_in_use_is_not_garbage(image: ImageMount) -> None:
    """The newest layer is referred to by the workspace and held by the mount."""
    (image.point / "new").write_bytes(b"new")
    made = image.commit()
    with LayerStore(os.fsencode(image.store)) as store:
        assert [found.kind for found in store.gc()] == []
    assert (image.point / "new").read_bytes() == b"new"
    assert image.tree(made).exists()
    image.unmount()
