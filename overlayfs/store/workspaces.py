"""Workspaces: uppers that the store keeps by name for mounts of its images.

A process that mounts, commits or removes a workspace holds its lock exclusively. A new workspace appears by one rename,
already locked, because an ephemeral one is removed as soon as its lock is free.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.format import xattrs
from overlayfs.store import layout, locks, records
from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers
from overlayfs.store.locks import HeldLock
from overlayfs.store.records import ImageRecord, WorkspaceRecord
from overlayfs.store.store_directory import StoreDirectory
from overlayfs.tree.workdir import drop_inherited_acls, remove_tree

_LEAVING = 5.0  # seconds to wait for a daemon whose mount has just ended


class WorkspaceInUseError(UserError):
    """Another process holds the workspace, most likely the daemon of its mount."""

    def __init__(self, path: bytes, name: str) -> None:
        self.path = path
        self.name = name
        super().__init__(f"workspace {name} is mounted; unmount it first (`overlayfs mounts` tells where)")


class Workspace:
    """One workspace, with its record as of the look-up."""

    def __init__(self, store_dir: StoreDirectory, record: WorkspaceRecord) -> None:
        self._store_dir = store_dir
        self.record = record

    @property
    def name(self) -> str:
        """The name the user has given it."""
        return self.record.name

    @property
    def path(self) -> bytes:
        """The absolute path of its directory."""
        return os.path.join(self._store_dir.path, workspace_path(self.name))

    @property
    def upper_path(self) -> bytes:
        """The absolute path of the upper, where changes go."""
        return os.path.join(self.path, layout.UPPER)

    @property
    def work_path(self) -> bytes:
        """The absolute path of the work directory of the upper."""
        return os.path.join(self.path, layout.WORK)

    def open(self) -> int:
        """Open the directory; the caller closes it."""
        return self._store_dir.open(workspace_path(self.name))

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Give the descriptor of the directory within the context."""
        directory = self.open()
        try:
            yield directory
        finally:
            sysio.close(directory)

    # --- the lock --------------------------------------------------------------------------------------

    def try_hold(self, wait: float = 0.0) -> HeldLock | None:
        """Hold the workspace exclusively; None if another process holds it for `wait` seconds.

        Raises UserError if the workspace has been removed.
        """
        try:
            return locks.try_hold(self._store_dir.root, workspace_path(self.name), shared=False, wait=wait)
        except FileNotFoundError:
            raise UserError(f"workspace {self.name} is not there any more; `overlayfs workspaces` lists them") from None

    def hold(self) -> HeldLock:
        """Hold the workspace exclusively; raises WorkspaceInUseError if another process holds it."""
        lock = self.try_hold(_LEAVING)
        if lock is None:
            raise WorkspaceInUseError(self.path, self.name)
        return lock

    # --- the next upper --------------------------------------------------------------------------------

    def prepare_next_upper(self, like: int) -> None:
        """Create the next upper, which looks like the open directory `like`, and its work directory, durably."""
        with self.opened() as directory:
            _create_upper_and_work(directory, layout.NEXT_UPPER, layout.NEXT_WORK, like)

    def rotate_upper(self, like: int) -> None:
        """Make the next upper the upper, after the old one has become a layer; `like` is the layer's open tree.

        Creates the next upper if it was not prepared. Idempotent.
        """
        with self.opened() as directory:
            if not sysio.exists_at(directory, layout.UPPER):
                if not sysio.exists_at(directory, layout.NEXT_UPPER):
                    _create_upper_and_work(directory, layout.NEXT_UPPER, layout.NEXT_WORK, like)
                sysio.rename_at(directory, layout.NEXT_UPPER, directory, layout.UPPER)
            if sysio.exists_at(directory, layout.NEXT_WORK):
                remove_tree(directory, layout.WORK)
                sysio.rename_at(directory, layout.NEXT_WORK, directory, layout.WORK)
            sysio.fsync(directory)

    def drop_next_upper(self) -> None:
        """Remove the next upper if it is not in use."""
        with self.opened() as directory:
            if sysio.exists_at(directory, layout.UPPER):  # else the next one is in use: the old one has become a layer
                for name in (layout.NEXT_UPPER, layout.NEXT_WORK):
                    remove_tree(directory, name)


def _create_upper_and_work(directory: int, upper: bytes, work: bytes, like: int) -> None:
    """Create an upper and its work directory in a workspace, durably; existing ones of these names are removed."""
    for name in (upper, work):
        remove_tree(directory, name)
    _create_upper(directory, upper, like)
    sysio.mkdir_at(directory, work, 0o700)
    sysio.fsync(directory)


def _create_upper(dirfd: int, name: bytes, like: int) -> None:
    """Create an empty directory with owner, mode, times and extended attributes of the open directory `like`.

    The root of a mount shows the attributes of its topmost directory, so a new upper must not change them. Overlay
    attributes are left out: nothing is below an opaque root, and an origin belongs to a copied-up object.
    """
    sysio.mkdir_at(dirfd, name, 0o700)
    found = sysio.stat_at(like, b"")
    attributes = [attribute for attribute in sysio.listxattr_at(like, b"") if not xattrs.is_private(attribute)]
    upper = sysio.open_child(dirfd, name, os.O_PATH | os.O_DIRECTORY)
    try:
        sysio.chown_at(upper, b"", found.st_uid, found.st_gid)
        drop_inherited_acls(upper, b"", attributes)
        for attribute in attributes:
            sysio.setxattr_at(upper, b"", attribute, sysio.getxattr_at(like, b"", attribute))
        sysio.chmod_at(upper, b"", found.st_mode & 0o7777)
        sysio.utimens_at(upper, b"", found.st_atime_ns, found.st_mtime_ns)
    finally:
        sysio.close(upper)


class Claim(NamedTuple):
    """A workspace held by the caller until `lock` is released.

    new: it did not exist before. behind: the image names other layers by now than those the workspace was begun on.
    """

    workspace: Workspace
    lock: HeldLock
    new: bool
    behind: bool = False


def workspace_path(name: str) -> bytes:
    """Return the path of a workspace's directory, relative to the store."""
    return layout.WORKSPACES + b"/" + layout.file_name(name)


class Workspaces:
    """All workspaces of a store; calling it yields them."""

    def __init__(self, store_dir: StoreDirectory, layers: Layers, images: Images) -> None:
        self._store_dir = store_dir
        self._layers = layers
        self._images = images

    # --- finding ---------------------------------------------------------------------------------------

    def __call__(self) -> Iterator[Workspace]:
        """Yield every workspace, by name."""
        found = map(self.read, self._store_dir.names(layout.WORKSPACES))
        return (workspace for workspace in found if workspace is not None)

    def get(self, name: str) -> Workspace | None:
        """Return the workspace `name`, or None if there is none."""
        return self.read(layout.file_name(name)) if layout.is_workspace_name(name) else None

    def find(self, name: str) -> Workspace:
        """Return the workspace `name`; raises UserError if there is none."""
        workspace = self.get(name)
        if workspace is None:
            raise UserError(f"there is no workspace {name}; `overlayfs workspaces` lists them")
        return workspace

    def read(self, file: bytes) -> Workspace | None:
        """Return the workspace in the directory `file`, or None if it has no record; raises UserError if damaged."""
        path = layout.WORKSPACES + b"/" + file + b"/" + layout.RECORD
        try:
            document = self._store_dir.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Workspace(self._store_dir, records.decode(document, WorkspaceRecord, self._store_dir.display_path(path)))

    # --- creating and resuming -------------------------------------------------------------------------

    def create(self, image: str, name: str | None = None) -> Workspace:
        """Create a workspace of an image and return it, not locked; `name` None chooses one.

        Raises UserError if there is no such image, or a workspace of that name.
        """
        record = self._images.find(image)
        claim = self._create_held(record, name or self._free_name(record.name), ephemeral=False)
        claim.lock.release()
        return claim.workspace

    def claim(self, image: str, name: str | None = None, ephemeral: bool = False) -> Claim:
        """Return a workspace of an image, held by the caller: a new one, or the existing workspace `name`.

        An `ephemeral` one is removed as soon as its lock is free. Raises UserError if the workspace belongs to another
        image, WorkspaceInUseError if it is mounted.
        """
        record = self._images.find(image)
        known = self.get(layout.workspace_name(name)) if name is not None else None
        if known is None:
            return self._create_held(record, name or self._free_name(record.name), ephemeral)
        lock = known.hold()
        try:
            workspace = self._resumed(known.name, record, ephemeral)
            return Claim(workspace, lock, new=False, behind=not self._is_based_on(workspace, record))
        except BaseException:
            lock.release()
            raise

    def _resumed(self, name: str, image: ImageRecord, ephemeral: bool) -> Workspace:
        workspace = self.find(name)
        if ephemeral:
            raise UserError(f"workspace {name} is kept; leave --ephemeral out to resume it, or name another one")
        if workspace.record.image != image.name and not self._is_based_on(workspace, image):
            raise UserError(
                f"workspace {name} belongs to {workspace.record.image}, not to {image.name}; "
                "mount that image, or name another workspace"
            )
        return workspace

    def _is_based_on(self, workspace: Workspace, image: ImageRecord) -> bool:
        """Return whether the layers of an image are the lowest ones of a workspace, or equal to those."""
        lowest = workspace.record.layers[-len(image.layers) :]
        return tuple(map(self._images.canonical_id, lowest)) == image.layers

    def _free_name(self, image: str) -> str:
        """Return an unused workspace name that begins like the image's name."""
        stem = image.rpartition(":")[0].rpartition("/")[2][:100]
        while self.get(name := f"{stem}-{secrets.token_hex(3)}") is not None:
            pass
        return name

    def _create_held(self, image: ImageRecord, name: str, ephemeral: bool) -> Claim:
        record = WorkspaceRecord(
            name=layout.workspace_name(name),
            image=image.name,
            layers=image.layers,
            ephemeral=ephemeral,
            created=records.now(),
        )
        with self._store_dir.lock_shared():
            like = self._topmost_layer(image).tree_fd()
            try:
                lock = self._publish(record, like)
            finally:
                sysio.close(like)
        return Claim(Workspace(self._store_dir, record), lock, new=True)

    def _topmost_layer(self, image: ImageRecord) -> Layer:
        """Return the topmost layer of an image; raises UserError if one of its layers is missing."""
        layers = [self._layers.get(layer_id) for layer_id in image.layers]
        for layer_id, layer in zip(image.layers, layers, strict=True):
            if layer is None:
                raise UserError(f"layer {layer_id} of {image.name} is not in the store; import or pull the image again")
        if not layers or layers[0] is None:
            raise UserError(f"image {image.name} has no layer; import something into it first")
        return layers[0]

    def _publish(self, record: WorkspaceRecord, like: int) -> HeldLock:
        def fill(directory: int) -> None:
            _create_upper_and_work(directory, layout.UPPER, layout.WORK, like)
            self._store_dir.write(directory, layout.RECORD, records.encode(record))

        try:
            return self._store_dir.create_locked(layout.WORKSPACES, layout.file_name(record.name), fill, shared=False)
        except FileExistsError:
            raise UserError(f"there is a workspace {record.name} already; name another one") from None

    # --- changing and removing -------------------------------------------------------------------------

    def add_layer(self, name: str, layer_id: str, image: str | None) -> None:
        """Put a layer on top of a workspace's stack and, unless None, note its new image. Idempotent.

        The store's lock must be held.
        """
        workspace = self.find(name)
        record = workspace.record
        layers = record.layers if layer_id in record.layers else (layer_id, *record.layers)
        changed = msgspec.structs.replace(record, layers=layers, image=image or record.image)
        with workspace.opened() as directory:
            self._store_dir.write(directory, layout.RECORD, records.encode(changed))

    def remove(self, name: str) -> None:
        """Remove a workspace with all its changes; raises WorkspaceInUseError while it is mounted."""
        with self.find(layout.workspace_name(name)).hold():
            self.discard(name)
        self._store_dir.empty_trash()

    def remove_held(self, name: str) -> None:
        """Remove a workspace whose lock the caller holds."""
        self.discard(name)
        self._store_dir.empty_trash()

    def discard(self, name: str) -> None:
        """Move a workspace whose lock is held to the trash; `StoreDirectory.empty_trash` deletes it."""
        with self._store_dir.lock_exclusively():
            self._store_dir.move_to_trash(layout.WORKSPACES, layout.file_name(name))
