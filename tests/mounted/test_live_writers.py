"""T18: successive commits under writers of each kind; every layer has all writes acknowledged before its commit."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from overlayfs.mount import control_client
from overlayfs.mount.control_protocol import CommitImage
from overlayfs.store.store import LayerStore
from tests.mounted.writers import Appended, Kept, Mapped, NewFiles, Replaced, Unnamed, Writer, files_in
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.drivers import Stack
from tests.support.drivers.forked import ForkedImage, load, unhashed
from tests.support.mutants import seeded
from tests.support.mutants.together import WRITER_KEPT
from tests.support.polling import until
from tests.support.requirements import need, need_root

NAMED: tuple[type[Writer], ...] = (NewFiles, Appended, Kept, Mapped, Replaced)
STEP = 20  # numbers that each writer writes between two commits
IMAGE = "now:1"
SWITCH = 0.0005  # seconds for which one writer may hold the interpreter


@pytest.fixture
def make_tree(place: Path) -> Iterator[Callable[[], ForkedImage]]:
    """Factory of mounted images."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    load()
    with ExitStack() as made:
        made.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH)

        def make() -> ForkedImage:
            with unhashed():  # a process for each layer would cost more than all the rest
                tree = ForkedImage(Stack(place / "s", [{"d": {}}], None), {"engine": engines.current()})
            made.callback(tree.kill)
            return tree

        yield make


class Committed:
    """The files of each writer's directory in the layers of the image, the newest on top."""

    def __init__(self, store: LayerStore) -> None:
        self.store = store
        self.seen: set[str] = set()
        self.files: dict[str, dict[str, Path]] = {}

    def look(self) -> None:
        """Read the layers that were committed since the last call."""
        for layer in reversed(self.store.stack_of(IMAGE)):
            if layer.id not in self.seen:
                self.seen.add(layer.id)
                self._add(Path(os.fsdecode(layer.tree_path)))

    def of(self, writer: Writer) -> dict[str, Path]:
        """The files of a writer's directory."""
        return self.files.get(writer.directory.name, {})

    def _add(self, tree: Path) -> None:
        for directory in tree.iterdir():
            found = {name: path for name, path in files_in(directory).items() if path.is_file()}
            self.files.setdefault(directory.name, {}).update(found)


class Work:
    """Writers of each kind in one mount."""

    def __init__(self, tree: ForkedImage) -> None:
        self.tree = tree
        self.unnamed = Unnamed(tree.stack.mountpoint / "unnamed")
        self.named = [kind(tree.stack.mountpoint / kind.__name__) for kind in NAMED]
        self.all = [*self.named, self.unnamed]

    def commit(self, turns: int) -> list[str]:
        """Make `turns` commits while the writers write; return what is wrong with the layers, or afterwards."""
        wrong: list[str] = []
        with LayerStore(self.tree.store) as store, ExitStack() as running:
            committed = Committed(store)
            for writer in self.all:
                running.enter_context(writer)
            for turn in range(turns):
                wrong += [f"commit {turn}: {word}" for word in self._commit(committed)]
        return wrong + self.lost()

    def _commit(self, committed: Committed) -> list[str]:
        goals = [writer.acknowledged + STEP for writer in self.all]
        until(lambda: all(writer.acknowledged >= goal for writer, goal in zip(self.all, goals, strict=True)))
        before = [writer.acknowledged for writer in self.named]
        control_client.Client.at(os.fsencode(self.tree.stack.mountpoint)).commit_image(CommitImage(image=IMAGE))
        after = [writer.acknowledged + 1 for writer in self.named]  # one write may have returned and not be counted yet
        committed.look()
        bounds = zip(self.named, before, after, strict=True)
        return [word for writer, low, high in bounds for word in writer.compare(committed.of(writer), low, high)]

    def lost(self) -> list[str]:
        """Return what is missing in the end."""
        wrong = [repr(writer.error) for writer in self.all if writer.error is not None]
        for writer in self.named:
            wrong += writer.compare(files_in(writer.directory), writer.acknowledged, writer.acknowledged)
        if self.unnamed.left != self.unnamed.acknowledged:
            wrong.append(f"the file without a name holds {self.unnamed.left} of {self.unnamed.acknowledged} numbers")
        return wrong


@pytest.mark.campaign("T18")
def test_layers_hold_what_was_acknowledged(make_tree: Callable[[], ForkedImage], campaign: Campaign) -> None:
    """Each layer, with those below, holds a whole number of steps between the call and the answer."""
    work, turns = Work(make_tree()), campaign.size(8, 200)
    wrong = work.commit(turns)
    work.tree.remount()
    wrong += work.lost()
    work.tree.close()
    points = sum(writer.acknowledged for writer in work.all)
    campaign.held(f"acknowledged writes under {turns} commits, engine {engines.current()}", points, wrong)


@pytest.mark.campaign("T18")
def test_mutant(make_tree: Callable[[], ForkedImage], campaign: Campaign) -> None:
    with seeded(WRITER_KEPT):
        work = Work(make_tree())
    wrong = work.commit(4)
    campaign.caught(f"{WRITER_KEPT}, engine {engines.current()}", 4, wrong)
