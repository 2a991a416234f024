"""Eight processes at once: commits, mounts, gc and rm leave a store that verifies, and no process loses what it uses.

Meanwhile a ninth one is killed, again and again.

OVERLAYFS_TEST_SECONDS=60 makes it a long run (`make test-together`).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.store import commit, verify
from overlayfs.store.commit import CommitRequest
from overlayfs.store.store import LayerStore
from tests.store.samples import add_image, fill
from tests.support import leftovers, processes, syscalls
from tests.support.requirements import need_root

SECONDS = float(os.environ.get("OVERLAYFS_TEST_SECONDS", "8"))
IMAGES = ("site:1", "site:2", "site:3", "other")
EXPECTED = (  # what may be refused while other processes remove what this one has just seen
    "there is no image",
    "is no workspace, image or layer",
    "is not there any more",
    "is not in the store",
    "there is nothing to commit",
    "there is a workspace",
    "in use",
    "is mounted",
    "is missing from the store",
    "belongs to",
)


class Player:
    """One process, which repeats random operations and counts them."""

    def __init__(self, place: Path, number: int) -> None:
        self.place = place
        self.number = number
        self.random = random.Random(number)
        self.counts: dict[str, int] = {}
        self.store = LayerStore(os.fsencode(place / "store"))

    def play(self, until: float) -> None:
        """Repeat until the time is over, or until something unexpected happens."""
        actions = (self.publish, self.publish, self.commit, self.read, self.tag, self.remove, self.collect)
        while time.monotonic() < until:
            action = self.random.choice(actions)
            try:
                action()
                self.count(action.__name__)
            except UserError as error:
                if not any(sentence in str(error) for sentence in EXPECTED):
                    raise
                self.count("refused")
        self.store.close()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def publish(self) -> None:
        """Make an image of a layer that other processes make too, with an own layer on top."""
        shared = {"shared": str(self.random.randrange(4))}
        own = {"own": f"{self.number} {self.random.random()}"}
        add_image(self.store, self.random.choice(IMAGES), shared, own)

    def commit(self) -> None:
        """Create a workspace, change it, commit it, check that everything is there, and remove it."""
        name = f"w{self.number}-{self.random.randrange(1 << 30)}"
        workspace = self.store.workspaces.create(self.random.choice(IMAGES), name)
        text = f"{name} was here"
        fill(workspace.upper_path, {"committed": text})
        layer = commit.commit_workspace(self.store, name, CommitRequest(image=self.random.choice(IMAGES)))
        commit.hash_layer(self.store, layer)
        assert (Path(os.fsdecode(layer.tree_path)) / "committed").read_text() == text
        assert self.store.stack_of(name)[0].id == layer.id
        if self.random.random() < 0.8:
            self.store.workspaces.remove(name)

    def read(self) -> None:
        """Lock the layers of an image: each of them stays complete meanwhile."""
        for layer in self.store.stack_of(self.random.choice(IMAGES)):
            with layer.hold():
                before = sorted(os.listdir(layer.tree_path))
                assert before
                time.sleep(self.random.random() / 50)
                assert sorted(os.listdir(layer.tree_path)) == before

    def tag(self) -> None:
        self.store.images.tag(self.random.choice(IMAGES), self.random.choice(IMAGES))

    def remove(self) -> None:
        self.store.images.remove(self.random.choice(IMAGES))

    def collect(self) -> None:
        self.store.gc()


class Mounter(Player):
    """Mounts images by the program, reads, writes, and unmounts."""

    def play(self, until: float) -> None:
        point = self.place / f"m{self.number}"
        point.mkdir()
        program = Path(sys.executable).with_name("overlayfs")
        while time.monotonic() < until:
            words = [str(program), "mount", self.random.choice(IMAGES), str(point), "--ephemeral"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                assert any(sentence in done.stderr for sentence in EXPECTED), done.stderr
                self.count("refused")
                continue
            names = sorted(os.listdir(point))
            assert names
            (point / "mine").write_text(f"{self.number} {self.random.random()}")
            assert sorted(os.listdir(point)) == sorted({*names, "mine"})
            if self.random.random() < 0.5:
                words = [str(program), "commit", str(point), "-t", self.random.choice(IMAGES), "--wait"]
                subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
                self.count("live commit")
            subprocess.run([program, "umount", point], check=True)
            self.count("mounted")
        self.store.close()


def _start(place: Path, number: int, until: float) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        player = (Mounter if number < 2 else Player)(place, number)
        player.play(until)
        (place / f"counts{number}").write_text(json.dumps(player.counts))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _kill_others(place: Path, until: float) -> None:
    """Start one process after the other, and kill each in the middle of an operation."""
    chance = random.Random(8)
    number = 8
    while time.monotonic() < until:
        child = _start(place, number, until + 60)
        assert not processes.ends(child, chance.random()), "it should have gone on"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        number += 1


@pytest.fixture
def shop(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a store of four images."""
    need_root()
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    before = processes.children()
    with LayerStore(os.fsencode(place / "store")) as store:
        for name in IMAGES:
            add_image(store, name, {"name": name})
    yield place
    for point in leftovers.mounts_below(place):
        syscalls.umount(os.fsencode(point), 2)
    processes.reap_since(before)


@pytest.mark.timeout(SECONDS + 120)
def test_eight_processes(shop: Path) -> None:
    until = time.monotonic() + SECONDS
    children = [_start(shop, number, until) for number in range(8)]
    _kill_others(shop, until)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * 8
    counts: dict[str, int] = {}
    for number in range(8):
        for what, count in json.loads((shop / f"counts{number}").read_text()).items():
            counts[what] = counts.get(what, 0) + count
    assert {"publish", "commit", "read", "tag", "remove", "collect", "mounted", "live commit"} <= set(counts), counts
    print(counts)
    with LayerStore(os.fsencode(shop / "store")) as store:
        _check(store, shop / "store")


def _check(store: LayerStore, base: Path) -> None:
    """Everything that is referred to is there and intact; gc removes everything else."""
    for layer in list(store.layers.unfinished()):
        commit.hash_layer(store, layer)  # the process that made it was killed before
    dry = store.gc(dry_run=True)
    assert store.gc() == dry
    named = {layer for image in store.images() for layer in image.layers}
    named |= {layer for workspace in store.workspaces() for layer in workspace.record.layers}
    there = {layer.id for layer in store.layers()}
    assert named == there == set(os.listdir(base / "layers"))
    assert not any(workspace.record.ephemeral for workspace in store.workspaces())
    for room in ("staging", "trash", "intents"):
        assert list((base / room).iterdir()) == [], room
    content = [layer.record.digest for layer in store.layers() if layer.record.same_as is None]
    assert len(content) == len(set(content))
    found = verify.verify(store.directory, None)
    assert (found.problems, found.unfinished) == ((), ())
