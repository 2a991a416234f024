"""Commits unmounted uppers to the store; live commits of mounts are in overlayfs.mount.live_commit.

The upper of a workspace becomes the layer itself, by one rename, and the workspace gets a new upper. Any other upper
stays as it is: its layer is a copy. Either way the new layer is on top of the stack, and an image may be put for it.
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
from overlayfs.store.scan import Progress
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

_CREATED_BY = "overlayfs commit"
_COPY = b"copy"
_EMPTY_LAYER = 1  # entries of a layer without changes: the root


class NothingToCommitError(UserError):
    """The upper has no changes."""

    def __init__(self, what: str) -> None:
        super().__init__(f"there is nothing to commit: {what} has no changes; --allow-empty makes a layer all the same")


class CommitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to commit. image: the name of the image to put, if any; `message` and `author` go to the records."""

    image: str | None = None
    message: str = ""
    author: str = ""
    allow_empty: bool = False


def commit_workspace(store: LayerStore, name: str, request: CommitRequest) -> Layer:
    """Make the upper of an unmounted workspace a layer on top of its stack, and return it.

    The layer can be used at once; its state is "hashing" until `hash_layer`. Raises WorkspaceInUseError while the
    workspace is mounted, NothingToCommitError if it has no changes, unless the request allows an empty layer.
    """
    workspace = store.workspaces.find(name)
    with workspace.hold():
        workspace = store.workspaces.find(name)
        below = store.present(workspace.record.layers)
        if not _prepare_upper(workspace, below) and not request.allow_empty:
            raise NothingToCommitError(f"workspace {name}")
        base = base_of(store, workspace.record.image, workspace.record.layers)
        new = NewLayer(
            author=request.author,
            message=request.message,
            below=workspace.record.layers,
            workspace=name,
            image=None if request.image is None else on_top(request.image, below, base, request),
        )
        return store.commit_directory(workspace.upper_path, new)


def _prepare_upper(workspace: Workspace, below: Sequence[Layer]) -> bool:
    """Move what only the work directory knows (the index) into the upper; return whether the upper has changes."""
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
    request: CommitRequest,
    progress: Progress | None = None,
) -> Layer:
    """Make a layer of a copy of an unmounted upper, over the layers `below`, whose trees `config` names; return it.

    `progress(entries, bytes)` is called periodically. Raises MountError while the upper is mounted,
    NothingToCommitError if it has no changes, unless the request allows an empty layer.
    """
    overlay = Overlay(config)
    try:
        if not overlay.is_changed and not request.allow_empty:
            raise NothingToCommitError("the upper")
        return _commit_copy(
            store, below, request, lambda staged: copy_upper(overlay, staged.tree_fd, staged.tree_path, progress)
        )
    finally:
        overlay.close()


def commit_mount(
    store: LayerStore, below: Sequence[Layer], request: CommitRequest, copy: Callable[[bytes], int]
) -> Layer:
    """Make a layer of a copy of the upper of a mount of plain directories, which is over the layers `below`; return it.

    `copy(destination)` makes the daemon copy the upper to a new directory and returns the number of entries in it.
    Raises NothingToCommitError if the upper has no changes, unless the request allows an empty layer.

    The upper itself stays with the mount: each mount of plain directories names its layers, so the next one would show
    less than this one if a commit moved the upper away.
    """

    def fill(staged: StagedLayer) -> None:
        destination = os.path.join(os.path.dirname(staged.tree_path), _COPY)
        if copy(destination) <= _EMPTY_LAYER and not request.allow_empty:
            raise NothingToCommitError("the mount")
        os.rename(destination, staged.tree_path)  # replaces the empty directory of the staged layer

    return _commit_copy(store, below, request, fill)


def _commit_copy(
    store: LayerStore, below: Sequence[Layer], request: CommitRequest, fill: Callable[[StagedLayer], object]
) -> Layer:
    """Publish a staged layer that `fill` copies an upper into, and put the image with it on top."""
    image = None if request.image is None else on_top(request.image, below, None, request)
    with store.layers.stage() as staged:
        fill(staged)
        tree = os.open(staged.tree_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Manifest.build(tree, temp_dir=store.directory.subdirectories[layout.STAGING]) as manifest:
                layer = staged.publish(
                    manifest=manifest,
                    author=request.author,
                    message=request.message,
                    below=tuple(layer.id for layer in below),
                )
        finally:
            sysio.close(tree)
    if image is not None:
        store.images.put(msgspec.structs.replace(image, layers=(layer.id, *image.layers)))
    return layer


def hash_layer(store: LayerStore, layer: Layer, progress: Progress | None = None) -> Layer:
    """Give a layer whose state is "hashing" its manifest; return the layer that images use from now on.

    `progress(entries, bytes)` is called periodically.
    """
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
    """Return the image `image` if its layers are still the lowest ones of `layers`, else None."""
    base = store.images.get(image)
    return base if base is not None and layers[-len(base.layers) :] == base.layers else None


def on_top(name: str, below: Sequence[Layer], base: ImageRecord | None, request: CommitRequest) -> ImageRecord:
    """Return the record of an image of the layers `below`, top first, to be put with a new layer on top.

    Configuration and platform are those of `base`; the history has a step for each layer, including the new one.
    """
    created = records.now()
    author = records.printable(request.author)
    step = History(created=created, author=author, created_by=_CREATED_BY, comment=records.printable(request.message))
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
    """Return a step for each layer, oldest first: the history of the base, then the records of the other layers."""
    steps = () if base is None else base.history
    if base is None or sum(not step.empty_layer for step in steps) != len(base.layers):
        steps, rest = (), below
    else:
        rest = below[: len(below) - len(base.layers)]
    return (*steps, *(_step(layer) for layer in reversed(rest)))


def _step(layer: Layer) -> History:
    record = layer.record
    return History(created=record.created, author=record.author, comment=record.message)
