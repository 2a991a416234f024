"""The store: layers, images and workspaces in one directory, shared by several processes without a server.

    with LayerStore(b"/var/lib/overlayfs") as store:
        with store.layers.stage() as staged:
            ...                                    # fill staged.tree_fd
            layer = staged.publish(manifest=Manifest.build(staged.tree_fd), author="me")
        store.images.put(ImageRecord(name="site:1", layers=(layer.id, *base.layers), created=now()))

What the user can mend is raised as `UserError`, whose text is one sentence.
"""

import contextlib
import errno
import os
from typing import Self

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError, oserror
from overlayfs.store.commit_transaction import CommitTransactions, NewLayer
from overlayfs.store.gc import Garbage, GarbageCollector
from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers, Summary
from overlayfs.store.records import LayerRecord
from overlayfs.store.store_directory import StoreDirectory
from overlayfs.store.workspaces import Workspaces


class LayerStore:
    """One open store, a context manager; `create` creates an empty one if there is none.

    `layers`, `images` and `workspaces` have what concerns one kind of object; here is what concerns several. Opening
    takes the same time whatever the store holds: it recovers the commits of killed processes and removes ephemeral
    workspaces whose mount is gone. Raises UserError if the directory is no store that this version can use.
    """

    def __init__(self, path: bytes, create: bool = True) -> None:
        self.directory = StoreDirectory(path, create)
        self.layers = Layers(self.directory)
        self.images = Images(self.directory, self.layers)
        self.workspaces = Workspaces(self.directory, self.layers, self.images)
        self.transactions = CommitTransactions(self.directory, self.layers, self.images, self.workspaces)
        self._collector = GarbageCollector(self.directory, self.layers, self.images, self.workspaces)
        try:
            self.transactions.recover()
            self._collector.drop_ephemeral()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> bytes:
        """The absolute path of the store's directory."""
        return self.directory.path

    def close(self) -> None:
        """Release the protected layers and close all descriptors."""
        self.layers.close()
        self.directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- stacks ----------------------------------------------------------------------------------------

    def stack_of(self, given: str) -> tuple[Layer, ...]:
        """Return the layers, top first, of a workspace, an image, or a layer with those it needs below.

        A name of both a workspace and an image means the workspace; NAME:latest is the image. Raises UserError if the
        name is unknown or a layer is missing.
        """
        return self.present(self.layer_ids(given))

    def layer_ids(self, given: str) -> tuple[str, ...]:
        """Return the ids of the layers that `stack_of` returns, whether or not they are present."""
        workspace = self.workspaces.get(given)
        if workspace is not None:
            return workspace.record.layers
        image = self.images.get(given)
        if image is not None:
            return image.layers
        try:
            layer = self.layers.find(given)
        except UserError:
            raise UserError(
                f"{given} is no workspace, image or layer of the store; `overlayfs images` lists what is there"
            ) from None
        return (layer.id, *layer.record.below)

    def present(self, layer_ids: tuple[str, ...]) -> tuple[Layer, ...]:
        """Return the layers with these ids; raises UserError if one is missing."""
        found = []
        for layer_id in layer_ids:
            layer = self.layers.get(layer_id)
            if layer is None:
                raise UserError(f"layer {layer_id} is missing from the store; import or pull the image again")
            found.append(layer)
        return tuple(found)

    # --- directories that become layers ----------------------------------------------------------------

    def commit_directory(self, tree: bytes, new: NewLayer | None = None) -> Layer:
        """Make the directory `tree`, which nothing else may change, a layer by renaming it; its state is "hashing".

        The layer is protected from gc as after `StagedLayer.publish`. Raises OSError, EXDEV if the tree is not on the
        store's file system; nothing has changed then.
        """
        parent, name = os.path.split(os.path.abspath(tree))
        with contextlib.ExitStack() as closing:
            dirfd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            closing.callback(sysio.close, dirfd)
            root = sysio.open_child(dirfd, name, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(sysio.close, root)
            if sysio.stat_at(root, b"").st_dev != sysio.stat_at(self.directory.root, b"").st_dev:
                raise oserror(errno.EXDEV, tree)
            sysio.syncfs(root)
            transaction = self.transactions.prepare(new or NewLayer(), root)
            closing.callback(transaction.release)
            with transaction:
                transaction.commit(dirfd, name)
                return transaction.finalize()

    def complete_layer(self, layer: Layer, manifest: Summary, flags: tuple[str, ...] | None = None) -> Layer:
        """Give a layer whose state is "hashing" its manifest; `flags` None means those of the manifest.

        Returns the layer that images use from now on: an equal one that was there before, or the layer itself. Raises
        UserError if the layer is gone. Images are changed first, the record last: after a crash in between, the layer
        is hashed again.
        """
        with self.layers.publishing():
            found = self.layers.get(layer.id)
            if found is None:
                raise UserError(f"layer {layer.id} is not in the store any more")
            if found.record.state == "complete":
                return found
            record = _complete(found.record, manifest, manifest.flags if flags is None else flags)
            same = self.layers.find_equal(manifest.digest, record.below)
            if same is not None:
                self.images.replace_layer(layer.id, same.id)
                record = msgspec.structs.replace(record, same_as=same.id)
            self.layers.write_manifest(layer.id, manifest)
            completed = self.layers.write_record(record)
            return completed if same is None else same

    # --- removing --------------------------------------------------------------------------------------

    def remove(self, given: str) -> None:
        """Remove an image or a workspace; raises UserError if the name is of both, or of neither."""
        workspace, image = self.workspaces.get(given), self.images.get(given)
        if workspace is not None and image is not None:
            raise UserError(
                f"{given} is an image and a workspace; write {image.name} for the image, or use --workspace"
            )
        if workspace is not None:
            self.workspaces.remove(given)
        elif image is not None:
            self.images.remove(image.name)
        else:
            raise UserError(f"there is no image and no workspace {given}; `overlayfs images` lists what is there")

    def gc(self, dry_run: bool = False) -> list[Garbage]:
        """Remove what nothing refers to and no process uses, and return it; with `dry_run` only return it."""
        return self._collector.collect(dry_run)


def _complete(record: LayerRecord, manifest: Summary, flags: tuple[str, ...]) -> LayerRecord:
    return msgspec.structs.replace(
        record,
        state="complete",
        digest=manifest.digest,
        size=manifest.size,
        entries=len(manifest.entries),
        flags=flags,
        below=record.below if flags else (),
    )
