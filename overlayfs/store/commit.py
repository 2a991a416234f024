"""Commits into the store of uppers that are not mounted.

The upper of a workspace becomes the layer itself, by one rename, and the workspace gets a fresh one. Any other upper
stays what it is: its layer is a copy. Either way the stack has the new layer on top, and an image may be put for it.
"""

import os
from collections.abc import Callable, Sequence

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.fs.config import StackConfig
from overlayfs.fs.overlay import Overlay
from overlayfs.store import layout, records
from overlayfs.store.commit_transaction import NewLayer
from overlayfs.store.copy_upper import copy_upper
from overlayfs.store.layers import Layer, StagedLayer
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import History, ImageRecord
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

Progress = Callable[[int, int], None]
_BY = "overlayfs commit"
_COPY = b"copy"
_ROOT_ONLY = 1  # entries of a layer that changes nothing


class NothingToCommitError(UserError):
    """The upper holds no change."""

    def __init__(self, what: str) -> None:
        super().__init__(f"there is nothing to commit: {what} has no changes; --allow-empty makes a layer all the same")


class CommitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a commit: the image to put, if any, and what the records say."""

    image: str | None = None
    message: str = ""
    author: str = ""
    allow_empty: bool = False


def commit_workspace(store: LayerStore, name: str, wish: CommitRequest) -> Layer:
    """Make the upper of an unmounted workspace a layer, which lies on top of its stack from then on.

    The layer is usable at once and its state "hashing": `hash_layer` comes next. WorkspaceInUseError while it is
    mounted, NothingToCommitError when nothing was changed.
    """
    workspace = store.workspace(name)
    with workspace.hold():
        workspace = store.workspace(name)
        below = store.stack_of_workspace(workspace)
        if not _settle(workspace, below) and not wish.allow_empty:
            raise NothingToCommitError(f"workspace {name}")
        base = base_of(store, workspace.record.image, workspace.record.layers)
        new = NewLayer(
            author=wish.author,
            message=wish.message,
            below=workspace.record.layers,
            workspace=name,
            image=None if wish.image is None else on_top(wish.image, below, base, wish),
        )
        return store.commit_directory(workspace.upper_path, new)


def _settle(workspace: Workspace, below: Sequence[Layer]) -> bool:
    """Let the upper say all that only its work directory knew; return whether it changes anything."""
    lower = tuple(layer.tree_path for layer in below)
    overlay = Overlay(StackConfig(lower=lower, upper=workspace.upper_path, work=workspace.work_path))
    try:
        if not overlay.is_changed:
            return False
        for _ in overlay.rotation().prepare():
            pass
        return True
    finally:
        overlay.close()


def commit_upper(
    store: LayerStore,
    config: StackConfig,
    below: Sequence[Layer],
    wish: CommitRequest,
    progress: Progress | None = None,
) -> Layer:
    """Make a layer from a copy of an upper that is not mounted, over the layers `below`, whose trees `config` names.

    `progress` is told entries and bytes now and then. MountError when the upper is mounted.
    """
    overlay = Overlay(config)
    try:
        if not overlay.is_changed and not wish.allow_empty:
            raise NothingToCommitError("the upper")
        return _commit_copy(
            store, below, wish, lambda staged: copy_upper(overlay, staged.tree_fd, staged.tree_path, progress)
        )
    finally:
        overlay.close()


def commit_mount(store: LayerStore, below: Sequence[Layer], wish: CommitRequest, copy: Callable[[bytes], int]) -> Layer:
    """Make a layer from a copy of the upper of a mount of plain directories, which lie over the layers `below`.

    `copy(destination)` has the daemon copy the upper to a new directory, and returns how many entries that holds.

    The upper itself stays with the mount: every mount of plain directories names its layers, so the next one would
    show less than this one if a commit moved the upper away.
    """

    def fill(staged: StagedLayer) -> None:
        destination = os.path.join(os.path.dirname(staged.tree_path), _COPY)
        if copy(destination) <= _ROOT_ONLY and not wish.allow_empty:
            raise NothingToCommitError("the mount")
        os.rename(destination, staged.tree_path)  # over the empty directory of the staged layer

    return _commit_copy(store, below, wish, fill)


def _commit_copy(
    store: LayerStore, below: Sequence[Layer], wish: CommitRequest, fill: Callable[[StagedLayer], object]
) -> Layer:
    """Publish a staged layer that `fill` has copied an upper into, and put the image on top of it."""
    image = None if wish.image is None else on_top(wish.image, below, None, wish)
    with store.new_layer() as staged:
        fill(staged)
        tree = os.open(staged.tree_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Manifest.build(tree, temp_dir=store.directory.subdirectories[layout.STAGING]) as manifest:
                layer = staged.publish(
                    manifest=manifest,
                    author=wish.author,
                    message=wish.message,
                    below=tuple(layer.id for layer in below),
                )
        finally:
            sysio.close(tree)
    if image is not None:
        store.put_image(msgspec.structs.replace(image, layers=(layer.id, *image.layers)))
    return layer


def hash_layer(store: LayerStore, layer: Layer, progress: Progress | None = None) -> Layer:
    """Work out the manifest of a layer whose state is "hashing"; returns the layer that images use from then on."""
    with layer.hold():
        tree = layer.tree_fd()
        try:
            with Manifest.build(
                tree, progress=progress, temp_dir=store.directory.subdirectories[layout.STAGING]
            ) as manifest:
                return store.complete_layer(layer, manifest)
        finally:
            sysio.close(tree)


# --- the image ------------------------------------------------------------------------------------------------


def base_of(store: LayerStore, image: str, layers: tuple[str, ...]) -> ImageRecord | None:
    """Return the image that a stack was begun from, None when its name is gone or stands for another stack by now."""
    base = store.find_image(image)
    return base if base is not None and layers[-len(base.layers) :] == base.layers else None


def on_top(name: str, below: Sequence[Layer], base: ImageRecord | None, wish: CommitRequest) -> ImageRecord:
    """Return an image of the layers `below`, top first, to be put with one more on top.

    Configuration and platform are those of `base`; the history has a step for each layer, the new one included.
    """
    created = records.now()
    author = records.printable(wish.author)
    step = History(created=created, author=author, created_by=_BY, comment=records.printable(wish.message))
    made = ImageRecord(
        name=layout.image_name(name),
        layers=tuple(layer.id for layer in below),
        created=created,
        author=author,
        history=(*_history(below, base), step),
    )
    if base is None:
        return made
    return msgspec.structs.replace(
        made,
        architecture=base.architecture,
        os=base.os,
        variant=base.variant,
        config=base.config,
        annotations=base.annotations,
    )


def _history(below: Sequence[Layer], base: ImageRecord | None) -> tuple[History, ...]:
    """Return a step for each layer, oldest first: those that the base tells, and what the records of others say."""
    told = () if base is None else base.history
    if base is None or sum(not step.empty_layer for step in told) != len(base.layers):
        told, rest = (), below
    else:
        rest = below[: len(below) - len(base.layers)]
    return (*told, *(_step(layer) for layer in reversed(rest)))


def _step(layer: Layer) -> History:
    record = layer.record
    return History(created=record.created, author=record.author, comment=record.message)
