"""A store with something of each kind, the operations on it, and what must hold afterwards in any case."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from overlayfs.store.commit import CommitRequest, commit_workspace
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.store.samples import add_image, add_layer, fill, finish

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
        _tree(path)
        for path in (store.workspaces.find(name).upper_path, *(each.tree_path for each in store.stack_of(name)))
    ]


def prepare(base: Path) -> None:
    """Make the store that every operation begins with: two images, a changed workspace, garbage of each kind."""
    with LayerStore(os.fsencode(base)) as store:
        add_image(store, "site:1", {"a": "1"}, {"b": "2"})
        add_image(store, "other", {"c": "3"})
        fill(store.workspaces.create("site:1", "mine").upper_path, {"new": "mine"})
        add_layer(store, {"d": "unused"})
        unhashed = add_layer(store, {"a": "1"}, hashed=False)
        store.images.put(ImageRecord(name="late", layers=(unhashed.id,), created=now()))
    (base / "staging" / "left").mkdir()
    (base / "trash" / "left").write_text("")


def publish(store: LayerStore) -> None:
    add_image(store, "site:1", {"a": "published"}, {"b": "2"})


def tag(store: LayerStore) -> None:
    store.images.tag("other", "site:1")


def commit(store: LayerStore) -> None:
    commit_workspace(store, "mine", CommitRequest(image="site:2", message="mine"))


def commit_over(store: LayerStore) -> None:
    commit_workspace(store, "mine", CommitRequest(image="other"))


def commit_unnamed(store: LayerStore) -> None:
    commit_workspace(store, "mine", CommitRequest())


def hash_late(store: LayerStore) -> None:
    for layer in list(store.layers.unfinished()):
        finish(store, layer)


def make_workspace(store: LayerStore) -> None:
    store.workspaces.create("site:1", "second")


def remove_workspace(store: LayerStore) -> None:
    store.workspaces.remove("mine")


def remove_image(store: LayerStore) -> None:
    store.images.remove("other")


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


class Case(Protocol):
    """An operation, and what the store shows before and after it."""

    before: State
    after: State
    operation: Callable[[LayerStore], None]


def check(case: Case, base: Path, where: str) -> State:
    """The store is as before or as after, gc does what it reports and loses nothing, and the operation can be repeated.

    Returns what was found.
    """
    with LayerStore(os.fsencode(base)) as store:
        found = state(store)
        assert found in (case.before, case.after), where
        assert list((base / "intents").iterdir()) == [], where
        dry = store.gc(dry_run=True)
        assert store.gc() == dry, where
        assert state(store) == found, where
        check_clean(store, base, where)
        if found == case.before:
            case.operation(store)
            assert state(store) == case.after, where
    return found


def check_clean(store: LayerStore, base: Path, where: str) -> None:
    assert [list((base / room).iterdir()) for room in ("staging", "trash")] == [[], []], where
    named = {layer for image in store.images() for layer in image.layers}
    named |= {layer for workspace in store.workspaces() for layer in workspace.record.layers}
    assert set(os.listdir(base / "layers")) == named, where
    for layer in store.layers():
        assert layer.record.digest is None or store.layers.by_digest(layer.record.digest) is not None, where
    for workspace in store.workspaces():
        assert sorted(os.listdir(os.fsdecode(workspace.path))) == ["lock", "record", "upper", "work"], where
