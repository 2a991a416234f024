"""Workspaces: uppers that the store keeps by name for mounts of its images.

Who mounts, commits or removes a workspace holds its lock exclusively. A new one appears by one rename, locked already,
so an ephemeral one, which goes when nobody holds it, lives from the start as long as its mount.
"""

import os
import secrets
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import fresh, layout, locks, records
from overlayfs.store.images import Images
from overlayfs.store.layers import Layers
from overlayfs.store.locks import Hold
from overlayfs.store.place import Place
from overlayfs.store.records import ImageRecord, WorkspaceRecord

_LEAVING = 5.0  # seconds to wait for a daemon whose mount has just ended


class WorkspaceInUseError(UserError):
    """Somebody else holds a workspace, most likely as its mount."""

    def __init__(self, path: bytes, name: str) -> None:
        self.path = path
        self.name = name
        super().__init__(f"workspace {name} is mounted; unmount it first (`overlayfs mounts` tells where)")


class Workspace:
    """One workspace and its record as it was when it was looked up."""

    def __init__(self, place: Place, record: WorkspaceRecord) -> None:
        self._place = place
        self.record = record

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.record.name

    @property
    def room_path(self) -> bytes:
        """Its directory, counted from the store."""
        return workspace_path(self.name)

    @property
    def path(self) -> bytes:
        """Its directory, absolute."""
        return os.path.join(self._place.path, self.room_path)

    @property
    def upper_path(self) -> bytes:
        """Where changes go, absolute."""
        return os.path.join(self.path, layout.UPPER)

    @property
    def work_path(self) -> bytes:
        """The work directory of the upper, absolute."""
        return os.path.join(self.path, layout.WORK)

    def open(self) -> int:
        """Open the directory; the caller closes it."""
        return self._place.open(self.room_path)

    def hold(self, wait: float = 0.0) -> Hold | None:
        """Be the only one who uses it; None when somebody else does for `wait` seconds. UserError when it is gone."""
        try:
            return locks.hold(self._place.root, self.room_path, shared=False, wait=wait)
        except FileNotFoundError:
            raise UserError(f"workspace {self.name} is not there any more; `overlayfs workspaces` lists them") from None

    def demand(self) -> Hold:
        """Do the same; WorkspaceInUseError when somebody else uses it, and goes on doing so."""
        hold = self.hold(_LEAVING)
        if hold is None:
            raise WorkspaceInUseError(self.path, self.name)
        return hold


class Claim(NamedTuple):
    """A workspace that is the caller's until `hold` is released.

    `new`: it was not there before. `behind`: the image stands for other layers by now than those it was begun on.
    """

    workspace: Workspace
    hold: Hold
    new: bool
    behind: bool = False


def workspace_path(name: str) -> bytes:
    """Return where a workspace lies, counted from the store."""
    return layout.WORKSPACES + b"/" + layout.file_name(name)


class Workspaces:
    """All workspaces of a store."""

    def __init__(self, place: Place, layers: Layers, images: Images) -> None:
        self._place = place
        self._layers = layers
        self._images = images

    def all(self) -> Iterator[Workspace]:
        """Yield every workspace, by name."""
        found = map(self.read, self._place.names(layout.WORKSPACES))
        return (workspace for workspace in found if workspace is not None)

    def get(self, name: str) -> Workspace | None:
        """Return the workspace with a name, None if there is none, or can be none."""
        return self.read(layout.file_name(name)) if layout.is_workspace_name(name) else None

    def find(self, name: str) -> Workspace:
        """Return the workspace with a name; UserError if there is none."""
        workspace = self.get(name)
        if workspace is None:
            raise UserError(f"there is no workspace {name}; `overlayfs workspaces` lists them")
        return workspace

    def read(self, file: bytes) -> Workspace | None:
        path = layout.WORKSPACES + b"/" + file + b"/" + layout.RECORD
        try:
            document = self._place.read(self._place.root, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Workspace(self._place, records.decode(document, WorkspaceRecord, self._place.shown(path)))

    # --- making and resuming ---------------------------------------------------------------------------

    def claim(self, image: str, name: str | None, ephemeral: bool) -> Claim:
        """Return a workspace for a mount of an image, new or resumed by its name.

        UserError when it is mounted, or belongs to another image.
        """
        record = self._images.find(image)
        known = self.get(layout.workspace_name(name)) if name is not None else None
        if known is None:
            return self.create(record, name or self.free_name(record.name), ephemeral)
        hold = known.demand()
        try:
            workspace = self._resumed(known.name, record, ephemeral)
            return Claim(workspace, hold, new=False, behind=not self._lies_on(workspace, record))
        except BaseException:
            hold.release()
            raise

    def _resumed(self, name: str, image: ImageRecord, ephemeral: bool) -> Workspace:
        workspace = self.find(name)
        if ephemeral:
            raise UserError(f"workspace {name} is kept; leave --ephemeral out to resume it, or name another one")
        if workspace.record.image != image.name and not self._lies_on(workspace, image):
            raise UserError(
                f"workspace {name} belongs to {workspace.record.image}, not to {image.name}; "
                "mount that image, or name another workspace"
            )
        return workspace

    def _lies_on(self, workspace: Workspace, image: ImageRecord) -> bool:
        """Return whether the layers of an image are the lowest ones of a workspace, or equal to those."""
        lowest = workspace.record.layers[-len(image.layers) :]
        return tuple(map(self._images.standing_for, lowest)) == image.layers

    def free_name(self, image: str) -> str:
        """Return a name for a workspace of an image that no other has."""
        stem = image.rpartition(":")[0].rpartition("/")[2][:100]
        while self.get(name := f"{stem}-{secrets.token_hex(3)}") is not None:
            pass
        return name

    def create(self, image: ImageRecord, name: str, ephemeral: bool) -> Claim:
        """Make a workspace and hold it; UserError when there is one of that name."""
        record = WorkspaceRecord(
            name=layout.workspace_name(name),
            image=image.name,
            layers=image.layers,
            ephemeral=ephemeral,
            created=records.now(),
        )
        with self._place.adding():
            hold = self._stage(record)
        return Claim(Workspace(self._place, record), hold, new=True)

    def _stage(self, record: WorkspaceRecord) -> Hold:
        staging = self._place.rooms[layout.STAGING]
        name = b"workspace-" + secrets.token_hex(8).encode()
        sysio.mkdir_at(staging, name, 0o700)
        directory = sysio.open_child(staging, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            hold = locks.make(directory, shared=False)
            try:
                self._fill(directory, record)
                self._publish(name, record)
            except BaseException:
                hold.release()
                raise
        finally:
            sysio.close(directory)
        return hold

    def _fill(self, directory: int, record: WorkspaceRecord) -> None:
        layers = [self._layers.get(layer_id) for layer_id in record.layers]
        if not layers:
            raise UserError(f"image {record.image} has no layer; import something into it first")
        for layer_id, layer in zip(record.layers, layers, strict=True):
            if layer is None:
                raise UserError(
                    f"layer {layer_id} of {record.image} is not in the store; import or pull the image again"
                )
        assert layers[0] is not None
        like = layers[0].tree_fd()
        try:
            fresh.make_pair(directory, layout.UPPER, layout.WORK, like)
        finally:
            sysio.close(like)
        self._place.write(directory, layout.RECORD, records.encode(record))

    def _publish(self, staged: bytes, record: WorkspaceRecord) -> None:
        rooms = self._place.rooms
        target = layout.file_name(record.name)
        try:
            sysio.rename_at(rooms[layout.STAGING], staged, rooms[layout.WORKSPACES], target, sysio.RENAME_NOREPLACE)
        except FileExistsError:
            raise UserError(f"there is a workspace {record.name} already; name another one") from None
        sysio.fsync(rooms[layout.WORKSPACES])

    # --- changing --------------------------------------------------------------------------------------

    def write(self, record: WorkspaceRecord) -> Workspace:
        """Replace the record of a workspace. The store's lock must be held."""
        workspace = Workspace(self._place, record)
        directory = workspace.open()
        try:
            self._place.write(directory, layout.RECORD, records.encode(record))
        finally:
            sysio.close(directory)
        return workspace

    def lengthen(self, name: str, layer_id: str, image: str | None) -> Workspace:
        """Put a layer on top of a workspace's stack, if it is not there yet. The store's lock must be held."""
        record = self.find(name).record
        layers = record.layers if layer_id in record.layers else (layer_id, *record.layers)
        return self.write(msgspec.structs.replace(record, layers=layers, image=image or record.image))

    def remove(self, name: str) -> None:
        """Take a workspace away with all that was changed in it; UserError while it is mounted."""
        with self.find(name).demand():
            self.discard(name)
        self._place.empty_trash()

    def discard(self, name: str) -> None:
        """Take away a workspace whose lock is held; what was in it is deleted by `Place.empty_trash`."""
        with self._place.removing():
            self._place.discard(layout.WORKSPACES, layout.file_name(name))
