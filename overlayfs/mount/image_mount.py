"""What a mount of an image holds in the store: the locks of its layers, and a workspace that it holds exclusively.

The process that the user waits for locks the workspace and passes the lock to the daemon with the descriptor, so that
it is never free in between. The daemon keeps it, and the locks of the layers, until the overlay is closed.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

from overlayfs.errors import MountError, UsageError, UserError
from overlayfs.mount import mounts
from overlayfs.mount.options import ImageMount
from overlayfs.store.locks import HeldLock
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Claim, WorkspaceInUseError

log = logging.getLogger(__name__)


class WorkspaceLease(NamedTuple):
    """A locked workspace and the directories of its stack.

    behind: the name of the image stands for other layers by now than when the workspace was created.
    """

    image_mount: ImageMount
    lower: tuple[bytes, ...]
    upper: bytes
    work: bytes
    behind: bool


@contextlib.contextmanager
def lease_workspace(
    store: bytes, image: str, name: str | None, ephemeral: bool, create: bool
) -> Iterator[WorkspaceLease]:
    """Lock a workspace of an image for a mount, and create it if need be.

    name: None for a new one; ephemeral: it is to be removed after the mount; create: whether the store may be created.
    If the context fails, a new workspace is removed again, unless it was changed. MountError if it cannot be locked.
    """
    with _open_store(store, create) as opened:
        claim = _claim(opened, image, name, ephemeral)
        try:
            lease = _lease(opened, claim)
        except BaseException:
            claim.lock.release()
            raise
    with claim.lock:
        try:
            yield lease
        except BaseException:
            if claim.new and (lease.image_mount.ephemeral or _is_untouched(lease)):
                _remove_workspace(lease.image_mount)
            raise


def _is_untouched(lease: WorkspaceLease) -> bool:
    """Return whether it is certain that a new workspace was not changed.

    In the foreground the context is the mount itself, and may end by an error after hours of work and commits.
    """
    used = lease.image_mount
    try:
        with LayerStore(used.store, create=False) as store:
            return not os.listdir(lease.upper) and store.workspaces.find(used.workspace).record.layers == used.layers
    except (OSError, UserError):
        return False


@contextlib.contextmanager
def _open_store(store: bytes, create: bool) -> Iterator[LayerStore]:
    try:
        with LayerStore(store, create) as opened:
            yield opened
    except UsageError:
        raise
    except UserError as error:
        raise MountError(str(error)) from None


def _claim(store: LayerStore, image: str, name: str | None, ephemeral: bool) -> Claim:
    try:
        return store.workspaces.claim(image, name, ephemeral)
    except WorkspaceInUseError as error:
        raise mounts.name_workspace_holder(error) from None


def _lease(store: LayerStore, claim: Claim) -> WorkspaceLease:
    workspace = claim.workspace
    record = workspace.record
    used = ImageMount(
        store=store.path,
        image=record.image,
        workspace=record.name,
        ephemeral=record.ephemeral,
        layers=record.layers,
        lock=claim.lock.fd,
    )
    lower = tuple(layer.tree_path for layer in store.stack_of(record.name))
    return WorkspaceLease(used, lower, workspace.upper_path, workspace.work_path, claim.behind)


@contextlib.contextmanager
def hold_image(image_mount: ImageMount) -> Iterator[None]:
    """Keep the workspace and the layers locked, in the daemon; at the end, remove an ephemeral workspace."""
    with contextlib.ExitStack() as holds:
        # The inherited descriptor of the same lock is closed when the mount is ready.
        holds.enter_context(HeldLock(os.dup(image_mount.lock)))
        with _open_store(image_mount.store, create=False) as store:
            for layer_id in image_mount.layers:
                holds.enter_context(_lock_layer(store, layer_id, image_mount))
        yield
        if image_mount.ephemeral:
            _remove_workspace(image_mount)


def _lock_layer(store: LayerStore, layer_id: str, image_mount: ImageMount) -> HeldLock:
    try:
        return store.layers.find(layer_id).hold()
    except OSError as error:
        advice = "; raise the limit (ulimit -n)" if error.errno == errno.EMFILE else ""
        many = len(image_mount.layers)
        raise MountError(f"cannot hold the {many} layers of {image_mount.image}: {error.strerror}{advice}") from error


def _remove_workspace(image_mount: ImageMount) -> None:
    """Remove the workspace; if that fails, the next open of the store does it."""
    try:
        with LayerStore(image_mount.store, create=False) as store:
            store.workspaces.remove_held(image_mount.workspace)
    except (OSError, UserError) as error:
        log.warning("workspace %s is left behind: %s", image_mount.workspace, error)
