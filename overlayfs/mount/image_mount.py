"""What a mount of an image has from the store: layers that stay, and a workspace that is its alone.

The process that the user waits for claims the workspace; its lock goes to the daemon with the descriptor, so there is
no moment in which nobody holds it. The daemon holds it, and the locks of the layers, until the overlay is closed.
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
    """A claimed workspace and the directories of its stack.

    `behind`: the image stands for other layers by now than those the workspace was begun on.
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
    """Claim a workspace of an image for a mount. When the context fails, a new one goes in which nothing was changed.

    MountError when it cannot be had.
    """
    with _opened(store, create) as opened:
        claim = _claim(opened, image, name, ephemeral)
        try:
            found = _found(opened, claim)
        except BaseException:
            claim.hold.release()
            raise
    with claim.hold:
        try:
            yield found
        except BaseException:
            if claim.new and (found.image_mount.ephemeral or _is_untouched(found)):
                _drop(found.image_mount)
            raise


def _is_untouched(claimed: WorkspaceLease) -> bool:
    """Return whether nothing was done in a new workspace, for certain.

    In the foreground the context is the mount itself, and may end by an error after hours of work and commits.
    """
    used = claimed.image_mount
    try:
        with LayerStore(used.store, create=False) as store:
            return not os.listdir(claimed.upper) and store.workspace(used.workspace).record.layers == used.layers
    except (OSError, UserError):
        return False


@contextlib.contextmanager
def _opened(store: bytes, create: bool) -> Iterator[LayerStore]:
    try:
        with LayerStore(store, create) as opened:
            yield opened
    except UsageError:
        raise
    except UserError as error:
        raise MountError(str(error)) from None


def _claim(store: LayerStore, image: str, name: str | None, ephemeral: bool) -> Claim:
    try:
        return store.claim_workspace(image, name, ephemeral)
    except WorkspaceInUseError as error:
        raise mounts.name_workspace_holder(error) from None


def _found(store: LayerStore, claim: Claim) -> WorkspaceLease:
    workspace = claim.workspace
    record = workspace.record
    used = ImageMount(
        store=store.path,
        image=record.image,
        workspace=record.name,
        ephemeral=record.ephemeral,
        layers=record.layers,
        lock=claim.hold.fd,
    )
    lower = tuple(layer.tree_path for layer in store.stack_of(record.name))
    return WorkspaceLease(used, lower, workspace.upper_path, workspace.work_path, claim.behind)


@contextlib.contextmanager
def hold_image(image_mount: ImageMount) -> Iterator[None]:
    """Hold the workspace and the layers, in the daemon; at the end an ephemeral workspace goes."""
    with contextlib.ExitStack() as holds:
        holds.enter_context(HeldLock(os.dup(image_mount.lock)))  # the same lock: the other descriptor is closed soon
        with _opened(image_mount.store, create=False) as store:
            for layer_id in image_mount.layers:
                holds.enter_context(_layer_held(store, layer_id, image_mount))
        yield
        if image_mount.ephemeral:
            _drop(image_mount)


def _layer_held(store: LayerStore, layer_id: str, image_mount: ImageMount) -> HeldLock:
    try:
        return store.layer(layer_id).hold()
    except OSError as error:
        advice = "; raise the limit (ulimit -n)" if error.errno == errno.EMFILE else ""
        many = len(image_mount.layers)
        raise MountError(f"cannot hold the {many} layers of {image_mount.image}: {error.strerror}{advice}") from error


def _drop(image_mount: ImageMount) -> None:
    """Take the workspace away; what fails here is done by the next who opens the store."""
    try:
        with LayerStore(image_mount.store, create=False) as store:
            store.drop_claimed(image_mount.workspace)
    except (OSError, UserError) as error:
        log.warning("workspace %s is left behind: %s", image_mount.workspace, error)
