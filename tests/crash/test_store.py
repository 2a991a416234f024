"""A store stopped at any changing call is, when it is opened again, as before or as after: never a third state."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayfs.errors import UserError
from overlayfs.store import committing
from overlayfs.store.committing import Commit
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.crash.harness import TEARABLE, Fuse, Stopped, closed_again
from tests.store.samples import add_image, add_layer, fill, finish
from tests.support.campaign import Campaign
from tests.support.points import Points, chosen
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
Tree = tuple[tuple[str, str], ...]


class State(NamedTuple):
    """What a store shows: the trees of each image, and of each workspace with its upper on top."""

    images: dict[str, list[Tree]]
    workspaces: dict[str, list[Tree]]


def _tree(path: bytes) -> Tree:
    base = Path(os.fsdecode(path))
    files = sorted(file for file in base.rglob("*") if file.is_file())
    return tuple((str(file.relative_to(base)), file.read_text()) for file in files)


def state(store: LayerStore) -> State:
    """Look at everything, by content: ids differ from run to run."""
    return State(
        {image.name: [_tree(layer.tree_path) for layer in store.stack_of(image.name)] for image in store.images()},
        {each.name: _stack(store, each.name) for each in store.workspaces()},
    )


def _stack(store: LayerStore, name: str) -> list[Tree]:
    """Return the trees of a workspace, its upper first."""
    return [
        _tree(path) for path in (store.workspace(name).upper_path, *(each.tree_path for each in store.stack_of(name)))
    ]


def prepare(base: Path) -> None:
    """Make the store that every operation begins with: two images, a changed workspace, garbage of each kind."""
    with LayerStore(os.fsencode(base)) as store:
        add_image(store, "site:1", {"a": "1"}, {"b": "2"})
        add_image(store, "other", {"c": "3"})
        fill(store.new_workspace("site:1", "mine").upper_path, {"new": "mine"})
        add_layer(store, {"d": "nobody's"})
        unhashed = add_layer(store, {"a": "1"}, hashed=False)
        store.put_image(ImageRecord(name="late", layers=(unhashed.id,), created=now()))
    (base / "staging" / "left").mkdir()
    (base / "trash" / "left").write_text("")


def publish(store: LayerStore) -> None:
    add_image(store, "site:1", {"a": "published"}, {"b": "2"})


def tag(store: LayerStore) -> None:
    store.tag("other", "site:1")


def commit(store: LayerStore) -> None:
    committing.commit_workspace(store, "mine", Commit(image="site:2", message="mine"))


def commit_over(store: LayerStore) -> None:
    committing.commit_workspace(store, "mine", Commit(image="other"))


def commit_unnamed(store: LayerStore) -> None:
    committing.commit_workspace(store, "mine", Commit())


def hash_late(store: LayerStore) -> None:
    for layer in list(store.unfinished()):
        finish(store, layer)


def make_workspace(store: LayerStore) -> None:
    store.new_workspace("site:1", "second")


def remove_workspace(store: LayerStore) -> None:
    store.remove_workspace("mine")


def remove_image(store: LayerStore) -> None:
    store.remove_image("other")


def collect(store: LayerStore) -> None:
    store.gc()


OPERATIONS: dict[str, Callable[[LayerStore], None]] = {
    each.__name__: each
    for each in (
        publish,
        tag,
        commit,
        commit_over,
        commit_unnamed,
        hash_late,
        make_workspace,
        remove_workspace,
        remove_image,
        collect,
    )
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


class Bench:
    """Copies of one prepared store, and what an operation makes of it when nothing goes wrong."""

    def __init__(self, place: Path, name: str) -> None:
        need_root()
        self._place = place
        self._count = 0
        self.operation = OPERATIONS[name]
        prepare(place / "template")
        with LayerStore(os.fsencode(place / "template")) as store:
            self.before = state(store)
        whole = self.copy()
        with LayerStore(os.fsencode(whole)) as store, Fuse() as fuse:
            self.operation(store)
        self.calls = fuse.calls
        with LayerStore(os.fsencode(whole)) as store:
            self.after = state(store)

    @contextmanager
    def tried(self) -> Iterator[Path]:
        """Give a fresh copy of the prepared store and remove it."""
        base = self.copy()
        try:
            yield base
        finally:
            shutil.rmtree(base)

    def copy(self) -> Path:
        """Return a fresh copy of the prepared store."""
        self._count += 1
        made = self._place / f"store{self._count}"
        shutil.copytree(self._place / "template", made)
        return made


def _die_at(base: Path, operation: Callable[[LayerStore], None], fuse: Fuse) -> None:
    """Run an operation in a process that ends at a changing call, so that the kernel alone cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with LayerStore(os.fsencode(base)) as store, fuse:
                operation(store)
        except Stopped:
            os._exit(STOPPED)
        finally:
            os._exit(FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED


def _check(bench: Bench, base: Path, where: str) -> None:
    """The store is as before or as after, gc does what it says and loses nothing, and the operation can be done."""
    with LayerStore(os.fsencode(base)) as store:
        found = state(store)
        assert found in (bench.before, bench.after), where
        assert list((base / "intents").iterdir()) == [], where
        dry = store.gc(dry_run=True)
        assert store.gc() == dry, where
        assert state(store) == found, where
        _check_clean(store, base, where)
        if found == bench.before:
            bench.operation(store)
            assert state(store) == bench.after, where


def _check_clean(store: LayerStore, base: Path, where: str) -> None:
    assert [list((base / room).iterdir()) for room in ("staging", "trash")] == [[], []], where
    named = {layer for image in store.images() for layer in image.layers}
    named |= {layer for workspace in store.workspaces() for layer in workspace.record.layers}
    assert set(os.listdir(base / "layers")) == named, where
    for layer in store.layers():
        assert layer.record.digest is None or store.by_digest(layer.record.digest) is not None, where
    for workspace in store.workspaces():
        assert sorted(os.listdir(os.fsdecode(workspace.path))) == ["lock", "record", "upper", "work"], where


def _stop_at(bench: Bench, fuses: Iterable[Fuse]) -> Points:
    points = Points()
    for fuse in fuses:
        where = f"at {bench.calls[fuse.at - 1]}, call {fuse.at} of {len(bench.calls)}"
        with points.at(where), bench.tried() as base:
            _die_at(base, bench.operation, fuse)
            _check(bench, base, where)
    return points


@pytest.mark.campaign("T1")
@every_operation
def test_stopped_at_every_call(campaign: Campaign, place: Path, name: str) -> None:
    bench = Bench(place, name)
    assert (bench.before == bench.after) == (name in ("hash_late", "collect"))
    points = _stop_at(bench, (Fuse(at) for at in chosen(campaign, len(bench.calls), 8)))
    campaign.held("changes of a store stopped at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T1")
@pytest.mark.parametrize("name", ["publish", "tag", "commit", "hash_late", "make_workspace"])
def test_stopped_in_the_middle_of_every_write(campaign: Campaign, place: Path, name: str) -> None:
    bench = Bench(place, name)
    writes = [at for at, call in enumerate(bench.calls, 1) if call in TEARABLE]
    fuses = (Fuse(writes[number - 1], torn=True) for number in chosen(campaign, len(writes), 2))
    points = _stop_at(bench, fuses)
    campaign.held("changes of a store stopped in the middle of every write", points.tried, points.violations)


def test_opening_with_a_full_disk(place: Path) -> None:
    """What a killed process left may have to wait for room; the store can be used before, and gc makes some."""
    bench = Bench(place, "commit")
    at = bench.calls.index("rename_at", bench.calls.index("syncfs")) + 1
    left = bench.copy()
    for later in range(at, len(bench.calls) + 1):
        shutil.rmtree(left)
        left = bench.copy()
        _die_at(left, bench.operation, Fuse(later))
        if any((left / "intents").iterdir()) and not (left / "workspaces/mine/upper").exists():
            break
    for failing in range(1, 30):
        base = place / "full"
        shutil.copytree(left, base)
        with Fuse(failing, errno.ENOSPC) as fuse, LayerStore(os.fsencode(base)) as store:
            assert [image.name for image in store.images()][:2] == ["late:latest", "other:latest"]
            with suppress(OSError):
                store.gc()
        with LayerStore(os.fsencode(base)) as store:
            assert state(store) == bench.after, f"at {fuse.calls[failing - 1]}"
        shutil.rmtree(base)


def _fail_at(campaign: Campaign, place: Path, name: str, lasting: bool, quick: int) -> Points:
    """A disk that fails, for a moment or until somebody mends it: the same, and the process goes on."""
    bench = Bench(place, name)
    points = Points()
    for error in ERRORS if campaign.full else ERRORS[:1]:
        for at in chosen(campaign, len(bench.calls), quick):
            where = f"{errno.errorcode[error]} at {bench.calls[at - 1]}, call {at} of {len(bench.calls)}"
            with points.at(f"{name}: {where}"), bench.tried() as base, closed_again():
                _fail(base, bench.operation, Fuse(at, error, lasting))
                _check(bench, base, where)
    return points


def _fail(base: Path, operation: Callable[[LayerStore], None], fuse: Fuse) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(LayerStore(os.fsencode(base)))
        stack.enter_context(fuse)
        stack.enter_context(suppress(OSError, UserError))
        operation(store)


@pytest.mark.campaign("T3")
@every_operation
def test_failing_at_every_call(campaign: Campaign, place: Path, name: str) -> None:
    points = _fail_at(campaign, place, name, lasting=False, quick=6)
    campaign.held("changes of a store failing at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T3")
@every_operation
def test_failing_from_every_call_on(campaign: Campaign, place: Path, name: str) -> None:
    points = _fail_at(campaign, place, name, lasting=True, quick=3)
    campaign.held("changes of a store failing from every changing call on", points.tried, points.violations)
