"""Commit transactions: a directory becomes the tree of a layer by one rename, and the records follow.

    transaction = store.transactions.prepare(NewLayer(workspace="w"))    # prepare: slow, durable, all but the tree
    ...                                                          # the gate closes, the tree is synced
    transaction.commit(dirfd, b"upper")                          # one rename: it is the layer's tree from here on
    ...                                                          # the gate opens
    layer = transaction.finalize()                               # workspace and image are updated

Before `commit` nothing is visible to others. After it everything will follow even if this process is killed: an intent
file is in place, and `recover` rolls it forward. No reader sees the layer before its tree.

    intents/ID    written before the tree moves, removed when everything has followed
    layers/ID/    the record first, then the tree; a staged layer gets them the other way round

The process holds the layer's lock shared and the workspace's exclusively, so that `recover` in another process leaves
the transaction alone.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, locks, records
from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers, layer_path
from overlayfs.store.locks import HeldLock
from overlayfs.store.records import ImageRecord, Intent, LayerRecord
from overlayfs.store.store_directory import StoreDirectory
from overlayfs.store.workspaces import Workspaces, workspace_path


@dataclass(frozen=True)
class NewLayer:
    """What a new layer's record says, and what follows from the layer.

    `created` is a time as `records.now` writes it; None means now. `workspace`, whose lock the caller holds, gets the
    layer on top of its stack and a new upper. `image` is put with the layer on top of its `layers`.
    """

    author: str = ""
    message: str = ""
    flags: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    created: str | None = None
    workspace: str | None = None
    image: ImageRecord | None = None

    def record(self) -> LayerRecord:
        """Return the record of a new layer that has not been hashed."""
        return LayerRecord(
            id=layout.new_id(),
            state="hashing",
            created=self.created or records.now(),
            author=records.printable(self.author),
            message=records.printable(self.message),
            flags=self.flags,
            below=self.below,
        )


class CommitTransaction:
    """One directory that is about to become a layer.

    A context manager: leaving it before `commit` rolls back, leaving it after `commit` finalizes. If finalizing fails,
    the tree has moved and nothing has followed yet: call `finalize` again when it may succeed, or `release`, and the
    next process that opens the store recovers.
    """

    def __init__(self, transactions: "CommitTransactions", intent: Intent, lock: HeldLock) -> None:
        self._transactions = transactions
        self._intent = intent
        self._lock = lock
        self._source_dir: int | None = None  # where the tree came from, once it has moved
        self.is_durable = False
        self.is_closed = False
        self._layer_dir = transactions.store_dir.open(layer_path(intent.layer))

    @property
    def id(self) -> str:
        """The id of the new layer."""
        return self._intent.layer

    @property
    def next_upper(self) -> bytes:
        """The absolute path of the workspace's new upper, which `finalize` moves to its final name."""
        return self._in_workspace(layout.NEXT_UPPER)

    @property
    def next_work(self) -> bytes:
        """The absolute path of the work directory of `next_upper`."""
        return self._in_workspace(layout.NEXT_WORK)

    def _in_workspace(self, name: bytes) -> bytes:
        assert self._intent.workspace is not None
        return os.path.join(self._transactions.store_dir.path, workspace_path(self._intent.workspace), name)

    @property
    def is_committed(self) -> bool:
        """Whether the tree has moved."""
        return self._source_dir is not None

    def commit(self, dirfd: int, name: bytes) -> None:
        """Make the directory `name` in `dirfd` the layer's tree. This is the commit point: a single system call.

        The content must have been synced; the move itself is durable when `is_durable` is true. `dirfd` must be open
        for reading. Raises OSError, EXDEV if the directory is on another file system.
        """
        source_dir = os.dup(dirfd)
        try:
            sysio.rename_at(dirfd, name, self._layer_dir, layout.TREE, sysio.RENAME_NOREPLACE)
        except BaseException:
            sysio.close(source_dir)
            raise
        self._source_dir = source_dir

    def finalize(self) -> Layer:
        """Update the workspace and the image, and return the layer, protected from gc as after `publish`.

        May be called again when it has failed.
        """
        assert self._source_dir is not None, "there is nothing to finalize before the tree has moved"
        transactions = self._transactions
        if not self.is_closed:
            sysio.fsync(self._layer_dir)
            sysio.fsync(self._source_dir)
            self.is_durable = True
            with transactions.store_dir.lock_shared():
                transactions.roll_forward(self._intent)
            transactions.layers.protect(self.id, self._lock)
            self._close()
        layer = transactions.layers.get(self.id)
        assert layer is not None
        return layer

    def rollback(self) -> None:
        """Undo what was prepared. The tree must not have moved."""
        assert self._source_dir is None, "the tree is the layer's by now"
        try:
            self._transactions.roll_back(self._intent)
        finally:
            self.release()

    def release(self) -> None:
        """Release the lock and the descriptors; what is not finalized is left to `recover`. Idempotent."""
        if not self.is_closed:
            self._lock.release()
            self._close()

    def _close(self) -> None:
        sysio.close(self._layer_dir)
        if self._source_dir is not None:
            sysio.close(self._source_dir)
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_closed:
            return
        if self._source_dir is not None:
            self.finalize()
        else:
            self.rollback()


class CommitTransactions:
    """Prepares the commit transactions of a store, and recovers those of killed processes."""

    def __init__(self, store_dir: StoreDirectory, layers: Layers, images: Images, workspaces: Workspaces) -> None:
        self.store_dir = store_dir
        self.layers = layers
        self._images = images
        self._workspaces = workspaces

    def prepare(self, new: NewLayer, like: int | None = None) -> CommitTransaction:
        """Prepare everything but the tree.

        `like` is an open directory whose owner, mode and attributes the workspace's new upper gets. Raises UserError if
        a layer of the image is not in the store.
        """
        record, image = new.record(), new.image
        if image is not None:
            name = layout.image_name(image.name)
            image = msgspec.structs.replace(image, name=name, layers=(record.id, *image.layers))
        intent = Intent(layer=record.id, workspace=new.workspace, image=image)
        with contextlib.ExitStack() as undo:
            with self.store_dir.lock_shared():
                self._check_layers(image)
                lock = self._create_layer_directory(record)
                undo.callback(lock.release)
                undo.callback(self._roll_back_quietly, intent)
                intents = self.store_dir.subdirectories[layout.INTENTS]
                self.store_dir.write(intents, record.id.encode(), records.encode(intent))
            if intent.workspace is not None and like is not None:
                self._workspaces.find(intent.workspace).prepare_next_upper(like)
            transaction = CommitTransaction(self, intent, lock)
            undo.pop_all()
        return transaction

    def _check_layers(self, image: ImageRecord | None) -> None:
        for layer_id in () if image is None else image.layers[1:]:
            if self.layers.get(layer_id) is None:
                raise UserError(f"layer {layer_id} is not in the store, so {image and image.name} cannot be made of it")

    def _create_layer_directory(self, record: LayerRecord) -> HeldLock:
        def fill(directory: int) -> None:
            self.store_dir.write(directory, layout.RECORD, records.encode(record))

        return self.store_dir.create_locked(layout.LAYERS, record.id.encode(), fill, shared=True)

    def _roll_back_quietly(self, intent: Intent) -> None:
        """Undo a preparation that failed; whatever fails here as well is left to `recover` and gc."""
        with contextlib.suppress(OSError):
            self.roll_back(intent)

    # --- forward or back -------------------------------------------------------------------------------

    def roll_forward(self, intent: Intent) -> None:
        """Update workspace and image once the tree has moved. Idempotent; the store's lock must be held."""
        if intent.workspace is not None:
            workspace = self._workspaces.find(intent.workspace)
            tree = self.store_dir.open(layer_path(intent.layer) + b"/" + layout.TREE)
            try:
                workspace.rotate_upper(tree)
            finally:
                sysio.close(tree)
            image = None if intent.image is None else intent.image.name
            self._workspaces.add_layer(workspace.name, intent.layer, image)
        if intent.image is not None:
            self._images.put_locked(intent.image)
        self._remove_intent(intent)

    def roll_back(self, intent: Intent) -> None:
        """Remove what was prepared for a tree that has not moved."""
        workspace = None if intent.workspace is None else self._workspaces.get(intent.workspace)
        if workspace is not None:
            workspace.drop_next_upper()
        with self.store_dir.lock_exclusively():
            self._remove_intent(intent)
            with contextlib.suppress(FileNotFoundError):
                self.store_dir.move_to_trash(layout.LAYERS, intent.layer.encode())
        self.store_dir.empty_trash()

    def _remove_intent(self, intent: Intent) -> None:
        intents = self.store_dir.subdirectories[layout.INTENTS]
        with contextlib.suppress(FileNotFoundError):
            sysio.unlink_at(intents, intent.layer.encode())
        sysio.fsync(intents)

    # --- after a crash ---------------------------------------------------------------------------------

    def recover(self) -> None:
        """Roll the transactions of killed processes forward or back; those of running processes are left alone.

        A transaction that cannot be recovered now (full disk, damaged record) does not keep the rest of the store from
        being used: gc keeps everything an intent refers to.
        """
        for name in self.store_dir.names(layout.INTENTS):
            with contextlib.suppress(OSError, UserError):
                self._recover(name)

    def _recover(self, name: bytes) -> None:
        document = self.store_dir.read(layout.INTENTS, name)
        intent = records.decode(document, Intent, self.store_dir.display_path(layout.INTENTS, name))
        with contextlib.ExitStack() as stack:
            if not all(self._try_locks(stack, intent)) or not self.store_dir.exists(layout.INTENTS + b"/" + name):
                return  # its process is running, or another process has recovered it meanwhile
            if self.layers.get(intent.layer) is None:
                self.roll_back(intent)
            else:
                with self.store_dir.lock_shared():
                    self.roll_forward(self._without_removed_workspace(intent))

    def _try_locks(self, stack: contextlib.ExitStack, intent: Intent) -> Iterator[bool]:
        """Lock layer and workspace until `stack` is closed; yield False for a lock that another process holds."""
        paths = [layer_path(intent.layer)]
        if intent.workspace is not None:
            paths.append(workspace_path(intent.workspace))
        for path in paths:
            try:
                lock = locks.try_hold(self.store_dir.root, path, shared=False)
            except FileNotFoundError:
                continue
            if lock is not None:
                stack.enter_context(lock)
            yield lock is not None

    def _without_removed_workspace(self, intent: Intent) -> Intent:
        if intent.workspace is None or self._workspaces.get(intent.workspace) is not None:
            return intent
        return msgspec.structs.replace(intent, workspace=None)
