"""Garbage: what nothing refers to, what nobody finished, what goes with its mount.

Everything is decided and moved to the trash under the store's exclusive lock, by renames; deleting comes after it, so a
large layer keeps nobody waiting. Whatever is locked is in use and stays. A dry run decides the same way, with the same
locks, and moves nothing.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, locks, records
from overlayfs.store.images import Images
from overlayfs.store.layers import Layers
from overlayfs.store.records import Intent
from overlayfs.store.store_directory import StoreDirectory
from overlayfs.store.workspaces import Workspace, Workspaces
from overlayfs.tree.layer import join


class Garbage(NamedTuple):
    """One thing that goes: `kind` is "layer", "workspace", "staging" or "trash"; `size` the bytes of its files."""

    kind: str
    name: str
    size: int


class Collector:
    """Finds the garbage of one store and takes it away."""

    def __init__(self, store_dir: StoreDirectory, layers: Layers, images: Images, workspaces: Workspaces) -> None:
        self._store_dir = store_dir
        self._layers = layers
        self._images = images
        self._workspaces = workspaces

    def collect(self, dry_run: bool) -> list[Garbage]:
        """Return what goes, sorted, and let it go unless `dry_run`."""
        sweep = _Sweep(self._store_dir, dry_run)
        with self._store_dir.lock_exclusively():
            for name in self._store_dir.names(layout.TRASH):
                sweep.note("trash", layout.TRASH, name)
            self._sweep_workspaces(sweep)
            for name in self._store_dir.names(layout.STAGING):  # files in it were left by the dead: we have the lock
                sweep.take("staging", layout.STAGING, name)
            self._sweep_layers(sweep)
        told = sorted(
            Garbage(each.kind, os.fsdecode(each.name), _size(self._store_dir, each.path)) for each in sweep.found
        )
        if not dry_run:
            self._layers.tidy_indexes()
            self._store_dir.empty_trash()
        return told

    def drop_ephemeral(self) -> None:
        """Take away the ephemeral workspaces whose mount is gone."""
        dropped = False
        for name in self._store_dir.names(layout.WORKSPACES):
            with contextlib.suppress(UserError, OSError):  # damaged, gone meanwhile, or not to be had now
                workspace = self._workspaces.read(name)
                if workspace is not None and workspace.record.ephemeral:
                    dropped |= self._drop(workspace)
        if dropped:
            with contextlib.suppress(OSError):
                self._store_dir.empty_trash()

    def _drop(self, workspace: Workspace) -> bool:
        hold = workspace.try_hold()
        if hold is None:
            return False
        with hold:
            self._workspaces.discard(workspace.name)
        return True

    # --- deciding --------------------------------------------------------------------------------------

    def _sweep_workspaces(self, sweep: "_Sweep") -> None:
        for name in self._store_dir.names(layout.WORKSPACES):
            workspace = self._workspaces.read(name)
            if workspace is None or workspace.record.ephemeral:
                sweep.take("workspace", layout.WORKSPACES, name)

    def _sweep_layers(self, sweep: "_Sweep") -> None:
        referred = self._referred({each.name for each in sweep.found if each.kind == "workspace"})
        for name in self._store_dir.names(layout.LAYERS):
            if os.fsdecode(name) not in referred:
                sweep.take("layer", layout.LAYERS, name)

    def _referred(self, going: set[bytes]) -> set[str]:
        """Return the ids of all layers that an image, a workspace that stays, or an adoption refers to."""
        found: set[str] = set()
        for image in self._images.all():
            found.update(image.layers)
        for workspace in self._workspaces.all():
            if layout.file_name(workspace.name) not in going:
                found.update(workspace.record.layers)
        for intent in self._intents():
            found.update((intent.layer,) if intent.image is None else (intent.layer, *intent.image.layers))
        return found

    def _intents(self) -> Iterator[Intent]:
        for name in self._store_dir.names(layout.INTENTS):
            with contextlib.suppress(FileNotFoundError):
                document = self._store_dir.read(layout.INTENTS, name)
                yield records.decode(document, Intent, self._store_dir.display_path(layout.INTENTS, name))


class _Found(NamedTuple):
    kind: str
    name: bytes
    path: bytes  # from the store, where it lies now


class _Sweep:
    """Takes one thing after the other, each with its lock held for the moment of the rename."""

    def __init__(self, store_dir: StoreDirectory, dry_run: bool) -> None:
        self._store_dir = store_dir
        self._dry_run = dry_run
        self.found: list[_Found] = []

    def note(self, kind: str, room: bytes, name: bytes) -> None:
        """Count what needs no taking."""
        self.found.append(_Found(kind, name, room + b"/" + name))

    def take(self, kind: str, room: bytes, name: bytes) -> None:
        """Move something to the trash unless it is in use."""
        try:
            hold = locks.try_hold(self._store_dir.root, room + b"/" + name, shared=False)
        except (FileNotFoundError, NotADirectoryError):
            with contextlib.suppress(FileNotFoundError):  # its maker has discarded it meanwhile
                self._move(kind, room, name)  # no lock: its maker died before making one
            return
        if hold is not None:
            with hold:
                self._move(kind, room, name)

    def _move(self, kind: str, room: bytes, name: bytes) -> None:
        path = room + b"/" + name if self._dry_run else layout.TRASH + b"/" + self._store_dir.move_to_trash(room, name)
        self.found.append(_Found(kind, name, path))


def _size(store_dir: StoreDirectory, path: bytes) -> int:
    """Return the bytes of the regular files at and below a path, hard links once; what vanishes counts nothing."""
    try:
        fd = store_dir.open(path, os.O_PATH)
    except FileNotFoundError:
        return 0
    with locks.HeldLock(fd):
        found = sysio.stat_at(fd, b"")
        return _size_below(fd) if stat.S_ISDIR(found.st_mode) else found.st_size


def _size_below(root: int) -> int:
    linked: set[tuple[int, int]] = set()
    total = 0
    pending = [b""]
    while pending:
        path = pending.pop()
        try:
            with locks.HeldLock(sysio.open_beneath(root, path, os.O_PATH | os.O_DIRECTORY)) as directory:
                for name, kind in sysio.list_dir(directory.fd):
                    if kind == stat.S_IFDIR:
                        pending.append(join(path, name))
                    elif kind == stat.S_IFREG:
                        total += _size_of(directory.fd, name, linked)
        except (FileNotFoundError, PermissionError):
            continue
    return total


def _size_of(directory: int, name: bytes, linked: set[tuple[int, int]]) -> int:
    try:
        found = sysio.stat_at(directory, name)
    except FileNotFoundError:
        return 0
    key = found.st_dev, found.st_ino
    if key in linked:
        return 0
    if found.st_nlink > 1:
        linked.add(key)
    return found.st_size
