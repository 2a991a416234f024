"""Garbage collection: removes what nothing refers to, what was never finished, and ephemeral workspaces not mounted.

Garbage is found and moved to the trash, by renames, under the store's exclusive lock; it is deleted afterwards, so that
no process waits while a large layer is deleted. What is locked is in use and stays. A dry run decides the same way,
with the same locks, and moves nothing.
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
    """One thing that is removed. kind: "layer", "workspace", "staging" or "trash". size: bytes of its files."""

    kind: str
    name: str
    size: int


class GarbageCollector:
    """Finds the garbage of one store and removes it."""

    def __init__(self, store_dir: StoreDirectory, layers: Layers, images: Images, workspaces: Workspaces) -> None:
        self._store_dir = store_dir
        self._layers = layers
        self._images = images
        self._workspaces = workspaces

    def collect(self, dry_run: bool) -> list[Garbage]:
        """Return the garbage, sorted, and remove it unless `dry_run`.

        Raises UserError if a record is damaged: it may refer to anything.
        """
        sweep = _Sweep(self._store_dir, dry_run)
        with self._store_dir.lock_exclusively():
            for name in self._store_dir.names(layout.TRASH):
                sweep.add("trash", layout.TRASH, name)
            self._sweep_workspaces(sweep)
            for name in self._store_dir.names(layout.STAGING):  # files in it are left-overs: we hold the store's lock
                sweep.collect("staging", layout.STAGING, name)
            self._sweep_layers(sweep)
        store_dir = self._store_dir
        sizes = [_size(store_dir, each.path) for each in sweep.found]
        names = [os.fsdecode(each.name) for each in sweep.found]
        garbage = sorted(map(Garbage, [each.kind for each in sweep.found], names, sizes))
        if not dry_run:
            self._layers.tidy_indexes()
            self._store_dir.empty_trash()
        return garbage

    def drop_ephemeral(self) -> None:
        """Remove the ephemeral workspaces whose mount is gone."""
        dropped = False
        for name in self._store_dir.names(layout.WORKSPACES):
            with contextlib.suppress(UserError, OSError):  # damaged, removed meanwhile, or not removable now
                workspace = self._workspaces.read(name)
                if workspace is not None and workspace.record.ephemeral:
                    dropped |= self._drop(workspace)
        if dropped:
            with contextlib.suppress(OSError):
                self._store_dir.empty_trash()

    def _drop(self, workspace: Workspace) -> bool:
        lock = workspace.try_hold()
        if lock is None:
            return False
        with lock:
            self._workspaces.discard(workspace.name)
        return True

    # --- deciding --------------------------------------------------------------------------------------

    def _sweep_workspaces(self, sweep: "_Sweep") -> None:
        for name in self._store_dir.names(layout.WORKSPACES):
            workspace = self._workspaces.read(name)
            if workspace is None or workspace.record.ephemeral:
                sweep.collect("workspace", layout.WORKSPACES, name)

    def _sweep_layers(self, sweep: "_Sweep") -> None:
        referenced = self._referenced({each.name for each in sweep.found if each.kind == "workspace"})
        for name in self._store_dir.names(layout.LAYERS):
            if os.fsdecode(name) not in referenced:
                sweep.collect("layer", layout.LAYERS, name)

    def _referenced(self, collected: set[bytes]) -> set[str]:
        """Return the ids of all layers that an image, an intent, or a workspace not in `collected` refers to."""
        found: set[str] = set()
        for image in self._images():
            found.update(image.layers)
        for workspace in self._workspaces():
            if layout.file_name(workspace.name) not in collected:
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
    path: bytes  # relative to the store; in the trash once it has been moved


class _Sweep:
    """Collects one thing after the other, each with its lock held during the rename."""

    def __init__(self, store_dir: StoreDirectory, dry_run: bool) -> None:
        self._store_dir = store_dir
        self._dry_run = dry_run
        self.found: list[_Found] = []

    def add(self, kind: str, subdirectory: bytes, name: bytes) -> None:
        """Add what is in the trash already."""
        self.found.append(_Found(kind, name, subdirectory + b"/" + name))

    def collect(self, kind: str, subdirectory: bytes, name: bytes) -> None:
        """Move something to the trash unless it is in use."""
        try:
            lock = locks.try_hold(self._store_dir.root, subdirectory + b"/" + name, shared=False)
        except (FileNotFoundError, NotADirectoryError):
            with contextlib.suppress(FileNotFoundError):  # discarded meanwhile by the process that made it
                self._move(kind, subdirectory, name)  # no lock: that process was killed before creating one
            return
        if lock is not None:
            with lock:
                self._move(kind, subdirectory, name)

    def _move(self, kind: str, subdirectory: bytes, name: bytes) -> None:
        path = subdirectory + b"/" + name
        if not self._dry_run:
            path = layout.TRASH + b"/" + self._store_dir.move_to_trash(subdirectory, name)
        self.found.append(_Found(kind, name, path))


# --- sizes -------------------------------------------------------------------------------------------------


def _size(store_dir: StoreDirectory, path: bytes) -> int:
    """Return the bytes of the regular files at and below a path, hard links once; what vanishes counts 0."""
    try:
        fd = store_dir.open(path, os.O_PATH)
    except FileNotFoundError:
        return 0
    try:
        found = sysio.stat_at(fd, b"")
        return _size_below(fd) if stat.S_ISDIR(found.st_mode) else found.st_size
    finally:
        sysio.close(fd)


def _size_below(root: int) -> int:
    linked: set[tuple[int, int]] = set()
    total = 0
    pending = [b""]
    while pending:
        path = pending.pop()
        try:
            directory = sysio.open_beneath(root, path, os.O_PATH | os.O_DIRECTORY)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            for name, kind in sysio.list_dir(directory):
                if kind == stat.S_IFDIR:
                    pending.append(join(path, name))
                elif kind == stat.S_IFREG:
                    total += _size_of(directory, name, linked)
        except (FileNotFoundError, PermissionError):
            continue
        finally:
            sysio.close(directory)
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
