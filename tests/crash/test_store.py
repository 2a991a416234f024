"""A store stopped at any changing call is, when it is opened again, as before or as after: never a third state."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayfs.errors import UserError
from overlayfs.store import committing
from overlayfs.store.committing import Commit
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.crash.harness import Fuse, Stopped
from tests.store.samples import add_image, add_layer, fill, finish
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
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

    def copy(self) -> Path:
        """Return a fresh copy of the prepared store."""
        self._count += 1
        made = self._place / f"store{self._count}"
        shutil.copytree(self._place / "template", made)
        return made


def _die_at(base: Path, operation: Callable[[LayerStore], None], at: int) -> None:
    """Run an operation in a process that ends at a changing call, so that the kernel alone cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with LayerStore(os.fsencode(base)) as store, Fuse(at):
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


@every_operation
def test_stopped_at_every_call(place: Path, name: str) -> None:
    bench = Bench(place, name)
    assert (bench.before == bench.after) == (name in ("hash_late", "collect"))
    for at in range(1, len(bench.calls) + 1):
        base = bench.copy()
        _die_at(base, bench.operation, at)
        _check(bench, base, f"at {bench.calls[at - 1]}, call {at} of {len(bench.calls)}")
        shutil.rmtree(base)


def test_opening_with_a_full_disk(place: Path) -> None:
    """What a killed process left may have to wait for room; the store can be used before, and gc makes some."""
    bench = Bench(place, "commit")
    at = bench.calls.index("rename_at", bench.calls.index("syncfs")) + 1
    left = bench.copy()
    for later in range(at, len(bench.calls) + 1):
        shutil.rmtree(left)
        left = bench.copy()
        _die_at(left, bench.operation, later)
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


@every_operation
def test_failing_at_every_call(place: Path, name: str) -> None:
    """A full disk at any call: the same, and the process goes on."""
    bench = Bench(place, name)
    for at in range(1, len(bench.calls) + 1):
        base = bench.copy()
        with LayerStore(os.fsencode(base)) as store, Fuse(at, errno.ENOSPC), suppress(OSError, UserError):
            bench.operation(store)
        _check(bench, base, f"at {bench.calls[at - 1]}, call {at} of {len(bench.calls)}")
        shutil.rmtree(base)
