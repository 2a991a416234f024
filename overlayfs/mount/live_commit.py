"""LiveCommits of a mounted image: the upper becomes a layer of the store, and the mount goes on with a fresh one.

1. Dirty pages of the mount are written out, the transaction is prepared, the upper's file system is synced, and what
   only the index of the work directory knows becomes names. All that while requests are served.
2. The gate closes, and one call on the loop changes the seats: one rename on the disk, a walk over the live nodes.
   Nothing in it waits for a disk to sync, whatever the upper's size. The gate opens.
3. The file system is synced again, and the records follow; until then every fsync waits, so nothing that comes after
   the commit is durable before the commit is. From here on the layer is usable. It is hashed by another process.

Killed before the rename: the mount as it was. Killed after it: whoever opens the store next finds the intent and lets
the records follow (overlayfs.store.commit_transaction). Where the disk fails in 3 the mount goes on, on its new upper,
and the next commit begins with what is missing; fsync fails until then, unless the rename itself is durable.
"""

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import trio

from overlayfs import sysio
from overlayfs.errors import UserError, oserror
from overlayfs.fs.durability import SyncBarrier
from overlayfs.fs.rotate import Rotation
from overlayfs.fuse.engine import Engine
from overlayfs.mount.options import ImageMount
from overlayfs.mount.protocol import CommitImage, CommitImageReply, HashingReply
from overlayfs.store import commit, hashing, layout
from overlayfs.store.commit import CommitRequest
from overlayfs.store.commit_transaction import CommitTransaction, NewLayer
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord, printable
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

log = logging.getLogger(__name__)

_PIECE = 32  # steps of settling between which other requests have their turn
_SWITCH = 0.0005  # seconds that a thread may keep the interpreter while another one waits for it; else 5 ms
_ATTEMPTS = 5  # to find the upper settled with the gate closed; the last one settles the rest there
_CONSERVATIVE = ("metacopy", "redirect")  # what the layer may hold, until its manifest says what it does


class Followed(Protocol):
    """A hashing that has begun (`overlayfs.store.hashing.HashingProcess` is one)."""

    def look(self) -> hashing.HashingStatus:
        """Return how far it is; never waits."""


class _Beginning:
    """A hashing whose process is being started, or could not be."""

    def __init__(self, found: hashing.HashingStatus) -> None:
        self._found = found

    def look(self) -> hashing.HashingStatus:
        """Return what is known."""
        return self._found


Hasher = Callable[[bytes, str], Followed]


class LiveCommits:
    """All commits of one mounted image, one at a time."""

    def __init__(self, engine: Engine, image_mount: ImageMount, hasher: Hasher = hashing.HashingProcess) -> None:
        self._engine = engine
        self._hasher = hasher
        self._overlay = engine.overlay
        self._lodging = image_mount
        self._turn = trio.Lock()
        self._store: LayerStore | None = None  # keeps the new layers from gc as long as the daemon lives
        self._hashing: dict[str, Followed] = {}
        self._unsettled: tuple[CommitTransaction, SyncBarrier] | None = None

    async def commit(self, request: CommitImage) -> CommitImageReply:
        """Make a layer of what was acknowledged until now; UserError with a sentence when there is none to make.

        Dirty pages must have been written out.
        """
        wanted = CommitRequest(
            image=request.image,
            message=printable(request.message),
            author=printable(request.author),
            allow_empty=request.allow_empty,
        )
        async with self._turn:
            await self._catch_up()
            if not wanted.allow_empty and not self._overlay.is_changed:
                raise commit.NothingToCommitError("the mount")
            store = await self._opened()
            with _prompt_threads():
                made, held = await self._carry_out(store, wanted)
            image = None if wanted.image is None else layout.image_name(wanted.image)
            return CommitImageReply(layer=made.id, image=image, held=held)

    def hashed(self, layer_id: str) -> HashingReply:
        """Return how far the hashing of a layer is that was committed here."""
        found = self._hashing.get(layer_id)
        if found is None:
            raise UserError(f"layer {layer_id} was not committed by this mount")
        seen = found.look()
        return HashingReply(state=seen.state, entries=seen.entries, size=seen.size, told=seen.told)

    def close(self) -> None:
        """Let go of the store: the mount's own hold of its layers must be there no longer than the mount."""
        if self._unsettled is not None:
            self._unsettled[0].release()
            self._unsettled = None
        if self._store is not None:
            self._store.close()
            self._store = None

    async def _opened(self) -> LayerStore:
        if self._store is None:
            self._store = await self._engine.threads.run(LayerStore, self._lodging.store, create=False)
        return self._store

    async def _begin_hashing(self, store: bytes, layer_id: str) -> None:
        """Start the process that hashes; who has committed has his answer already."""
        try:
            self._hashing[layer_id] = await self._engine.threads.run(self._hasher, store, layer_id)
        except (OSError, subprocess.SubprocessError) as error:
            log.error("layer %s is not hashed, for no process could be started: %s", layer_id, error)
            self._hashing[layer_id] = _Beginning(hashing.HashingStatus("failed", told=str(error)))

    # --- one commit ------------------------------------------------------------------------------------

    async def _carry_out(self, store: LayerStore, wanted: CommitRequest) -> tuple[Layer, float]:
        run = self._engine.threads.run
        transaction, directory = await run(self._begin, store, wanted)
        try:
            await run(self._overlay.sync)
            # From the rename on the mount and the records belong together: an unmount waits for both.
            with trio.CancelScope(shield=True):
                barrier, held = await self._switch(store, transaction, directory)
                self._unsettled = transaction, barrier
                await self._catch_up()
        except BaseException:
            if not transaction.is_committed:
                await run(transaction.rollback)
            raise
        finally:
            sysio.close(directory)
        return transaction.finalize(), held

    async def _catch_up(self) -> None:
        """Settle the transaction whose tree has moved, if there is one. Until it is lasting fsyncs wait, or fail."""
        if self._unsettled is None:
            return
        transaction, barrier = self._unsettled
        try:
            await self._engine.threads.run(self._make_lasting, transaction)
        except BaseException as error:
            barrier.finish(error if isinstance(error, OSError) else oserror(errno.EIO))
            if transaction.is_durable:
                self._overlay.release_syncs(barrier)
            raise
        self._unsettled = None
        self._overlay.release_syncs(barrier)
        self._hashing[transaction.id] = _Beginning(hashing.HashingStatus("hashing"))
        trio.lowlevel.spawn_system_task(self._begin_hashing, self._lodging.store, transaction.id)

    def _begin(self, store: LayerStore, wanted: CommitRequest) -> tuple[CommitTransaction, int]:
        """Prepare the transaction; return it with an open descriptor of the workspace. In a thread."""
        workspace = store.workspace(self._lodging.workspace)
        new = NewLayer(
            author=wanted.author,
            message=wanted.message,
            flags=_CONSERVATIVE,
            below=workspace.record.layers,
            workspace=workspace.name,
            image=self._image(store, workspace, wanted),
        )
        transaction = store.begin_commit(new, self._overlay.upper_root)
        try:
            return transaction, self._keep_work(workspace)
        except BaseException:
            transaction.rollback()
            raise

    @staticmethod
    def _keep_work(workspace: Workspace) -> int:
        """Return a descriptor of a workspace whose mount keeps its work directory: its locks, and what is staged."""
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
        return commit.on_top(wanted.image, store.stack_of_workspace(workspace), base, wanted)

    async def _switch(
        self, store: LayerStore, transaction: CommitTransaction, directory: int
    ) -> tuple[SyncBarrier, float]:
        tree = os.path.join(store.path, layout.LAYERS, transaction.id.encode(), layout.TREE)
        rotation = self._overlay.rotation()
        for attempt in range(1, _ATTEMPTS + 1):
            await self._prepare(rotation)
            await self._engine.gate.close()
            began = time.monotonic()
            try:
                self._refuse_unseen_writers()
                if attempt < _ATTEMPTS and not rotation.is_prepared():
                    continue
                barrier = self._overlay.hold_syncs()
                try:
                    rotation.rotate(transaction.next_upper, tree, lambda: transaction.commit(directory, layout.UPPER))
                except BaseException:
                    self._overlay.release_syncs(barrier)
                    raise
                return barrier, time.monotonic() - began
            finally:
                self._engine.gate.open()
        raise AssertionError("the last attempt settles what is left")

    async def _prepare(self, rotation: Rotation) -> None:
        """Settle in small pieces, each a change of its own."""
        steps = rotation.prepare()
        going_on = True
        while going_on:
            async with self._engine.gate.change():
                going_on = _advance(steps)
            await trio.lowlevel.checkpoint()

    def _refuse_unseen_writers(self) -> None:
        count = len(self._engine.nodes_written_in_passthrough())
        if count:
            raise UserError(
                f"{count} open files are read and written past the daemon (io=passthrough), so a commit could not "
                "tell what it holds; close them, or mount with io=cached"
            )

    def _make_lasting(self, transaction: CommitTransaction) -> None:
        """Sync, then let the workspace and the image follow. In a thread."""
        self._overlay.sync()
        transaction.finalize()


@contextmanager
def _prompt_threads() -> Iterator[None]:
    """Let the loop take its turn from the threads of a commit sooner: what these do in Python is done in pieces."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _advance(steps: Iterator[Any]) -> bool:
    """Take some steps; return whether there are more."""
    return all(next(steps, _END) is not _END for _ in range(_PIECE))


_END = object()
