"""Live commits of a mounted image: the upper becomes a layer of the store, and the mount goes on with a new upper.

1. Dirty pages are flushed, the transaction is prepared, the upper's file system is synced, and what only the index of
   the work directory knows is stored in the upper. Requests are served meanwhile.
2. The gate closes. One call on the loop rotates the upper: one rename on the disk, and a walk over the live nodes. It
   never waits for a sync, however large the upper is. The gate opens.
3. The file system is synced again and the records are updated. Until then every fsync waits, so that nothing written
   after the commit is durable before the commit is. Now the layer is usable; another process hashes it.

If the daemon is killed before the rename, the mount is as it was. If it is killed after the rename, the next open of
the store finds the intent and updates the records (overlayfs.store.commit_transaction). If the disk fails in step 3,
the mount goes on with its new upper, and the next commit first repeats that step; until then fsync fails, unless the
rename itself is durable.
"""

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import trio

from overlayfs import sysio
from overlayfs.errors import UserError, oserror
from overlayfs.fs.durability import SyncBarrier
from overlayfs.fs.rotate import Rotation
from overlayfs.fuse.engine import Engine
from overlayfs.mount.control_protocol import CommitImage, CommitImageReply, HashingReply
from overlayfs.mount.options import ImageMount
from overlayfs.store import commit, hashing, layout
from overlayfs.store.commit import CommitRequest
from overlayfs.store.commit_transaction import CommitTransaction, NewLayer
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord, printable
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

log = logging.getLogger(__name__)

_PIECE = 32  # steps of preparation between two checkpoints, so that requests are served meanwhile
_SWITCH_INTERVAL = 0.0005  # seconds; the default of the interpreter is 5 ms
_ATTEMPTS = 5  # to find nothing left to prepare once the gate is closed; the last one prepares the rest there
_ASSUMED_FLAGS = ("metacopy", "redirect")  # the layer may need them; its manifest will show whether it does


class Hashing(Protocol):
    """The hashing of one layer (`overlayfs.store.hashing.HashingProcess` is the usual one)."""

    def poll(self) -> hashing.HashingStatus:
        """Return the progress; never waits."""


class _WithoutProcess:
    """A hashing whose process is being started, or could not be started."""

    def __init__(self, status: hashing.HashingStatus) -> None:
        self._status = status

    def poll(self) -> hashing.HashingStatus:
        """Return the status."""
        return self._status


Hasher = Callable[[bytes, str], Hashing]  # starts the hashing of a layer: the store's directory, the layer's id


class LiveCommits:
    """The commits of one mounted image, one at a time."""

    def __init__(self, engine: Engine, image_mount: ImageMount, hasher: Hasher = hashing.HashingProcess) -> None:
        self._engine = engine
        self._hasher = hasher
        self._overlay = engine.overlay
        self._image_mount = image_mount
        self._one_at_a_time = trio.Lock()
        self._store: LayerStore | None = None  # stays open: that keeps the new layers from gc
        self._hashing: dict[str, Hashing] = {}
        self._pending: tuple[CommitTransaction, SyncBarrier] | None = None  # rotated, but not durable yet

    async def commit(self, request: CommitImage) -> CommitImageReply:
        """Make a layer of all changes that are acknowledged by now. Dirty pages must have been flushed.

        NothingToCommitError if there are none, another UserError with the reason if the commit fails.
        """
        wanted = CommitRequest(
            image=request.image,
            message=printable(request.message),
            author=printable(request.author),
            allow_empty=request.allow_empty,
        )
        async with self._one_at_a_time:
            await self._finish_pending()
            if not wanted.allow_empty and not self._overlay.is_changed:
                raise commit.NothingToCommitError("the mount")
            store = await self._open_store()
            with _short_switch_interval():
                layer, paused = await self._commit(store, wanted)
            image = None if wanted.image is None else layout.image_name(wanted.image)
            return CommitImageReply(layer=layer.id, image=image, held=paused)

    def hashed(self, layer_id: str) -> HashingReply:
        """Return the progress of the hashing of a layer. UserError if this mount has not committed it."""
        found = self._hashing.get(layer_id)
        if found is None:
            raise UserError(f"layer {layer_id} was not committed by this mount")
        status = found.poll()
        return HashingReply(state=status.state, entries=status.entries, size=status.size, told=status.detail)

    def close(self) -> None:
        """Close the store, which unlocks the new layers, and release a transaction that is still pending."""
        if self._pending is not None:
            self._pending[0].release()
            self._pending = None
        if self._store is not None:
            self._store.close()
            self._store = None

    async def _open_store(self) -> LayerStore:
        if self._store is None:
            self._store = await self._engine.threads.run(LayerStore, self._image_mount.store, create=False)
        return self._store

    async def _start_hashing(self, store: bytes, layer_id: str) -> None:
        """Start the process that hashes a layer; the reply to the commit has been sent already."""
        try:
            self._hashing[layer_id] = await self._engine.threads.run(self._hasher, store, layer_id)
        except (OSError, subprocess.SubprocessError) as error:
            log.error("layer %s is not hashed, since no process could be started: %s", layer_id, error)
            self._hashing[layer_id] = _WithoutProcess(hashing.HashingStatus("failed", detail=str(error)))

    # --- one commit ------------------------------------------------------------------------------------

    async def _commit(self, store: LayerStore, wanted: CommitRequest) -> tuple[Layer, float]:
        """Return the new layer, and for how many seconds changes had to wait."""
        run = self._engine.threads.run
        transaction, workspace_fd = await run(self._begin, store, wanted)
        try:
            await run(self._overlay.sync)
            # After the rename the mount and the records must not part: an unmount waits for both.
            with trio.CancelScope(shield=True):
                barrier, paused = await self._rotate(store, transaction, workspace_fd)
                self._pending = transaction, barrier
                await self._finish_pending()
        except BaseException:
            if not transaction.is_committed:
                await run(transaction.rollback)
            raise
        finally:
            sysio.close(workspace_fd)
        return transaction.finalize(), paused

    async def _finish_pending(self) -> None:
        """Make a commit durable whose upper was rotated, if there is one. Until it is, fsyncs wait, or fail."""
        if self._pending is None:
            return
        transaction, barrier = self._pending
        try:
            await self._engine.threads.run(self._make_durable, transaction)
        except BaseException as error:
            barrier.finish(error if isinstance(error, OSError) else oserror(errno.EIO))
            if transaction.is_durable:
                self._overlay.release_syncs(barrier)
            raise
        self._pending = None
        self._overlay.release_syncs(barrier)
        self._hashing[transaction.id] = _WithoutProcess(hashing.HashingStatus("hashing"))
        trio.lowlevel.spawn_system_task(self._start_hashing, self._image_mount.store, transaction.id)

    def _begin(self, store: LayerStore, wanted: CommitRequest) -> tuple[CommitTransaction, int]:
        """Prepare the transaction; return it with an open descriptor of the workspace. Called in a thread."""
        workspace = store.workspaces.find(self._image_mount.workspace)
        new = NewLayer(
            author=wanted.author,
            message=wanted.message,
            flags=_ASSUMED_FLAGS,
            below=workspace.record.layers,
            workspace=workspace.name,
            image=self._image(store, workspace, wanted),
        )
        transaction = store.transactions.prepare(new, self._overlay.upper_root)
        try:
            return transaction, self._open_workspace(workspace)
        except BaseException:
            transaction.rollback()
            raise

    @staticmethod
    def _open_workspace(workspace: Workspace) -> int:
        """Return a descriptor of the workspace, without a new work directory.

        The mount keeps the one it has, with its lock and its staged files.
        """
        directory = workspace.open()
        try:
            sysio.rmdir_at(directory, layout.NEXT_WORK)
        except BaseException:
            sysio.close(directory)
            raise
        return directory

    @staticmethod
    def _image(store: LayerStore, workspace: Workspace, wanted: CommitRequest) -> ImageRecord | None:
        if wanted.image is None:
            return None
        base = commit.base_of(store, workspace.record.image, workspace.record.layers)
        return commit.on_top(wanted.image, store.present(workspace.record.layers), base, wanted)

    async def _rotate(
        self, store: LayerStore, transaction: CommitTransaction, workspace_fd: int
    ) -> tuple[SyncBarrier, float]:
        """Rotate the upper with the gate closed; return the barrier that holds back fsyncs, and the seconds it took."""
        tree = os.path.join(store.path, layout.LAYERS, transaction.id.encode(), layout.TREE)
        rotation = self._overlay.rotation()
        publish = partial(transaction.commit, workspace_fd, layout.UPPER)
        for attempt in range(1, _ATTEMPTS + 1):
            await self._prepare(rotation)
            await self._engine.gate.close()
            began = time.monotonic()
            try:
                self._refuse_passthrough_writers()
                if attempt < _ATTEMPTS and not rotation.is_prepared():
                    continue
                barrier = self._overlay.hold_syncs()
                try:
                    rotation.rotate(transaction.next_upper, tree, publish)
                except BaseException:
                    self._overlay.release_syncs(barrier)
                    raise
                return barrier, time.monotonic() - began
            finally:
                self._engine.gate.open()
        raise AssertionError("the last attempt rotates whatever is left to prepare")

    async def _prepare(self, rotation: Rotation) -> None:
        """Prepare the rotation in small pieces, each of which is a change of its own to the gate."""
        steps = rotation.prepare()
        has_more = True
        while has_more:
            async with self._engine.gate.change():
                has_more = _advance(steps)
            await trio.lowlevel.checkpoint()

    def _refuse_passthrough_writers(self) -> None:
        count = len(self._engine.nodes_written_in_passthrough())
        if count:
            raise UserError(
                f"{count} open files are read and written past the daemon (io=passthrough), so a commit could not "
                "tell what it holds; close them, or mount with io=cached"
            )

    def _make_durable(self, transaction: CommitTransaction) -> None:
        """Sync, then update the records of the workspace and the image. Called in a thread."""
        self._overlay.sync()
        transaction.finalize()


@contextmanager
def _short_switch_interval() -> Iterator[None]:
    """Let the loop interrupt the threads of a commit sooner, so that requests wait less for the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _advance(steps: Iterator[Any]) -> bool:
    """Take `_PIECE` steps; return whether there are more."""
    return all(next(steps, _END) is not _END for _ in range(_PIECE))


_END = object()
