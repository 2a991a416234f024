"""T5: the power fails while the store is changed; a layer is absent or complete, and the next run heals the rest."""

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from overlayfs import StackConfig
from overlayfs.library import Store
from overlayfs.oci import image_import
from overlayfs.store import squash
from overlayfs.store.commit import CommitRequest, commit_upper
from overlayfs.store.store import LayerStore
from tests.crash.power.conftest import Memory
from tests.crash.power.live import LiveCommit
from tests.crash.power.session import Verdict
from tests.crash.stores import OPERATIONS, State, check, prepare, state
from tests.support.campaign import Campaign
from tests.support.watched import KINDS, Recording, watched
from tests.support.writelog import State as Moment

Operation = Callable[[LayerStore], None]
TOGETHER = 4  # operations on one disk
QUICK = ("commit", "import", "collect", "remove_image")

pytestmark = [pytest.mark.campaign("T5"), pytest.mark.timeout(1200)]


def _store(base: Path) -> Store:
    return Store(os.fsencode(base))


def _operations(place: Path) -> dict[str, Operation]:
    """Every operation that changes a store."""
    archive = place / "archive.tar"
    with tarfile.open(archive, "w") as file:
        for number in range(5):
            (place / "member").write_bytes(b"imported" * 500 * number)
            file.add(place / "member", f"d{number}/member")
    (place / "tree" / "d").mkdir(parents=True)
    (place / "tree" / "d" / "f").write_bytes(b"a tree" * 1000)

    def import_archive(store: LayerStore) -> None:
        image_import.import_image(store, os.fsencode(archive), "imported", image_import.ImportOptions())

    def import_directory(store: LayerStore) -> None:
        image_import.import_image(store, os.fsencode(place / "tree"), "tree", image_import.ImportOptions())

    def commit_copy(store: LayerStore) -> None:
        upper = place / "upper"
        with suppress(FileExistsError):
            (upper / "up").mkdir(parents=True)
            (upper / "up" / "copied").write_bytes(b"copied" * 100)
            (upper / "work").mkdir()
        layers = store.stack_of("site:1")
        lower = tuple(layer.tree_path for layer in layers)
        config = StackConfig(lower=lower, upper=os.fsencode(upper / "up"), work=os.fsencode(upper / "work"))
        commit_upper(store, config, layers, CommitRequest(image="copy"))

    def flatten(store: LayerStore) -> None:
        squash.squash_image(store, "site:1", "flat")

    return {
        **OPERATIONS,
        "import": import_archive,
        "import a directory": import_directory,
        "commit a copy": commit_copy,
        "squash": flatten,
    }


class Case:
    """One operation: what a store shows before it, and after it without a fault."""

    def __init__(self, name: str, operation: Operation, place: Path) -> None:
        self.name = name
        self.operation = operation
        base = place / name
        prepare(base)
        with _store(base) as store:
            self.before: State = state(store)
            operation(store)
        with _store(base) as store:
            self.after: State = state(store)

    def record(self, disk: Path, mark: Callable[[str], None], sync: Callable[[], None]) -> None:
        """Record the operation on a disk: after `done` it must not be undone."""
        prepare(disk / self.name)
        sync()
        mark(f"{self.name} start")
        with _store(disk / self.name) as store:
            self.operation(store)
            mark(f"{self.name} done")
        sync()
        mark(f"{self.name} end")

    def judge(self, recording: Recording, every: int) -> Verdict:
        """Try every n-th moment."""
        verdict = Verdict()
        start, done, end = (recording.marked(f"{self.name} {word}") for word in ("start", "done", "end"))
        for moment in islice(recording.states(start, end, Random(1)), every // 2, None, every):
            verdict.states += 1
            verdict.violations += self._wrong(recording, moment, done < moment.position)
        return verdict

    def _wrong(self, recording: Recording, moment: Moment, done: bool) -> Iterator[str]:
        try:
            with recording.after(moment) as point:
                self._check(point / self.name, done)
        except Exception as error:  # whatever prevents the use of the store
            yield f"{recording.kind} {self.name}: {error!r}, with {moment}"

    def _check(self, base: Path, done: bool) -> None:
        with _store(base) as store:
            assert not store.verify().problems, store.verify().problems
        found = check(self, base, self.name)
        assert found == self.after or not done, "it was done, and is undone"


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_a_store(campaign: Campaign, memory: Memory, kind: str) -> None:
    found = Verdict()
    names = list(_operations(memory.fresh()) if campaign.full else QUICK)
    for first in range(0, len(names), TOGETHER):
        place = memory.fresh()
        operations = _operations(place)
        cases = [Case(name, operations[name], place) for name in names[first : first + TOGETHER]]
        with watched(kind, place / "disk") as disk:
            for case in cases:
                case.record(disk.point, disk.mark, disk.sync)
        recording = disk.recording()
        for case in cases:
            found.add(case.judge(recording, every=campaign.size(16, 1)))
    campaign.held(f"changes of a store on {kind}", found.states, found.violations)


@pytest.mark.parametrize("kind", KINDS)
def test_commits_of_a_mounted_image(campaign: Campaign, memory: Memory, kind: str) -> None:
    """While a program appends to a file and makes each record durable: none of those is lost."""
    with watched(kind, memory.fresh() / "disk") as disk:
        commit = LiveCommit(disk)
    found = commit.judge(disk.recording(), every=campaign.size(24, 1))
    campaign.held(f"commits of a mounted image on {kind}", found.states, found.violations)


@pytest.mark.parametrize("kind", KINDS)
def test_making_a_store(campaign: Campaign, memory: Memory, kind: str) -> None:
    """A partly created store is completed by the next process that opens it."""
    with watched(kind, memory.fresh() / "disk") as disk:
        disk.mark("start")
        _store(disk.point / "new").close()
        disk.sync()
        disk.mark("end")
    recording = disk.recording()
    wrong = []
    states = list(recording.states(recording.marked("start"), recording.marked("end"), Random(1)))
    for moment in states:
        with recording.after(moment) as point:
            wrong += _unusable(point / "new")
    campaign.held(f"making a store on {kind}", len(states), wrong)


def _unusable(base: Path) -> list[str]:
    try:
        prepare(base)
    except Exception as error:
        return [repr(error)]
    return []
