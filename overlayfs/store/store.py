"""The store: layers, images and workspaces in one directory, for several processes at once and without a server.

    with LayerStore(b"/var/lib/overlayfs") as store:
        with store.new_layer() as staged:
            ...                                    # fill staged.tree_fd
            layer = staged.publish(manifest=Manifest.build(staged.tree_fd), author="me")
        store.put_image(ImageRecord(name="site:1", layers=(layer.id, *base.layers), created=now()))

Failures that a person can mend are `UserError` with one sentence.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Self

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError, oserror
from overlayfs.store import layout
from overlayfs.store.commit_transaction import CommitTransaction, CommitTransactions, NewLayer
from overlayfs.store.gc import Collector, Garbage
from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers, StagedLayer, Summary
from overlayfs.store.records import ImageRecord, LayerRecord
from overlayfs.store.store_directory import StoreDirectory
from overlayfs.store.workspaces import Claim, Workspace, Workspaces


class LayerStore:
    """One open store; `create` makes an empty one where there is none.

    Opening does not look at the layers. It finishes what killed processes began to adopt, and takes away ephemeral
    workspaces whose mount is gone.
    """

    def __init__(self, path: bytes, create: bool = True) -> None:
        self.directory = StoreDirectory(path, create)
        self._layers = Layers(self.directory)
        self._images = Images(self.directory, self._layers)
        self._workspaces = Workspaces(self.directory, self._layers, self._images)
        self._transactions = CommitTransactions(self.directory, self._layers, self._images, self._workspaces)
        self._collector = Collector(self.directory, self._layers, self._images, self._workspaces)
        try:
            self._transactions.recover()
            self._collector.drop_ephemeral()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> bytes:
        """The directory of the store, absolute."""
        return self.directory.path

    def close(self) -> None:
        """Let go of the layers that are kept, and of the descriptors."""
        self._layers.close()
        self.directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- layers ----------------------------------------------------------------------------------------

    def new_layer(self) -> StagedLayer:
        """Begin a layer: fill its tree, then publish it."""
        return self._layers.stage()

    def layer(self, given: str) -> Layer:
        """Return the layer with an id or digest that begins so; UserError for none and for several."""
        return self._layers.find(given)

    def layer_of_tree(self, path: bytes) -> Layer:
        """Return the layer whose tree is this directory; UserError when it belongs to none of this store."""
        given = os.path.basename(os.path.dirname(os.path.realpath(path)))
        layer = self._layers.get(os.fsdecode(given)) if layout.is_id(os.fsdecode(given)) else None
        if layer is None or not os.path.samefile(layer.tree_path, path):
            raise UserError(f"{os.fsdecode(path)} is not a layer of the store; import it first, and mount the image")
        return layer

    def layers(self) -> Iterator[Layer]:
        """Yield every layer, by id."""
        return self._layers.all()

    def by_digest(self, digest: str) -> Layer | None:
        """Return the layer with this content or None; kept from gc until an image names it or the store closes."""
        return self._layers.by_digest(digest)

    def by_diff_id(self, diff_id: str) -> Layer | None:
        """Return the layer that this canonical tar (``sha256:HEX``) makes, or None; kept as with `by_digest`."""
        return self._layers.by_diff_id(diff_id)

    def note_diff_id(self, layer: Layer, diff_id: str) -> Layer:
        """Remember the sha256 of a layer's canonical tar, which somebody has worked out."""
        return self._layers.note_diff_id(layer, diff_id)

    def begin_commit(self, new: NewLayer, like: int | None = None) -> CommitTransaction:
        """Prepare that a tree becomes a layer by one rename; `overlayfs.store.commit_transaction` says how to go on.

        The fresh upper of the workspace will look like the open directory `like`.
        """
        return self._transactions.prepare(new, like)

    def commit_directory(self, tree: bytes, new: NewLayer | None = None) -> Layer:
        """Make the directory `tree`, which nobody changes, a layer by renaming it; its state is "hashing".

        The layer is kept from gc as after `StagedLayer.publish`. OSError EXDEV when the tree is not on the store's file
        system; nothing has happened then.
        """
        parent, name = os.path.split(os.path.abspath(tree))
        with contextlib.ExitStack() as closing:
            dirfd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            closing.callback(sysio.close, dirfd)
            root = sysio.open_child(dirfd, name, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(sysio.close, root)
            self._check_same_file_system(root, tree)
            sysio.syncfs(root)
            transaction = self.begin_commit(new or NewLayer(), root)
            closing.callback(transaction.release)
            with transaction:
                transaction.commit(dirfd, name)
                return transaction.finalize()

    def _check_same_file_system(self, fd: int, path: bytes) -> None:
        if sysio.stat_at(fd, b"").st_dev != sysio.stat_at(self.directory.root, b"").st_dev:
            raise oserror(errno.EXDEV, path)

    def complete_layer(self, layer: Layer, manifest: Summary, flags: tuple[str, ...] | None = None) -> Layer:
        """Give a layer whose state is "hashing" its manifest; `flags` None means those of the manifest.

        Returns the layer that images use from now on: an equal one that was there before, or the layer itself. Raises
        UserError if the layer is gone. Images are changed first, the record last: after a crash in between, the layer
        is hashed again.
        """
        with self._layers.publishing():
            found = self._layers.get(layer.id)
            if found is None:
                raise UserError(f"layer {layer.id} is not in the store any more")
            if found.record.state == "complete":
                return found
            record = _complete(found.record, manifest, manifest.flags if flags is None else flags)
            same = self._layers.equal(manifest.digest, record.below)
            if same is not None:
                self._images.replace_layer(layer.id, same.id)
                record = msgspec.structs.replace(record, same_as=same.id)
            self._layers.write_manifest(layer.id, manifest)
            completed = self._layers.write_record(record)
            return completed if same is None else same

    def unfinished(self) -> Iterator[Layer]:
        """Yield the layers that still have to be hashed."""
        return self._layers.unfinished()

    # --- images ----------------------------------------------------------------------------------------

    def image(self, name: str) -> ImageRecord:
        """Return the image NAME[:TAG]; UserError if there is none."""
        return self._images.find(name)

    def images(self) -> Iterator[ImageRecord]:
        """Yield every image, by name."""
        return self._images.all()

    def put_image(self, record: ImageRecord) -> ImageRecord:
        """Make a name stand for a stack, in one step; UserError when a layer is not in the store."""
        return self._images.put(record)

    def tag(self, old: str, new: str) -> ImageRecord:
        """Give an image a second name; what that name stood for loses it."""
        return self._images.tag(old, new)

    def remove_image(self, name: str) -> None:
        """Take a name away; the layers stay until gc. UserError if there is none."""
        self._images.remove(name)

    def stack_of(self, given: str) -> tuple[Layer, ...]:
        """Return the layers, top first, that a workspace, an image or a layer with what it needs below stands for.

        A name that is both a workspace's and an image's means the workspace; NAME:latest is the image.
        """
        return tuple(map(self._present, self._ids_of(given)))

    def stack_of_workspace(self, workspace: Workspace) -> tuple[Layer, ...]:
        """Return the layers of a workspace, top first; UserError when one is missing."""
        return tuple(map(self._present, workspace.record.layers))

    def _ids_of(self, given: str) -> tuple[str, ...]:
        workspace = self.find_workspace(given)
        if workspace is not None:
            return workspace.record.layers
        image = self.find_image(given)
        if image is not None:
            return image.layers
        try:
            layer = self.layer(given)
        except UserError:
            raise UserError(
                f"{given} is no workspace, image or layer of the store; `overlayfs images` lists what is there"
            ) from None
        return (layer.id, *layer.record.below)

    def _present(self, layer_id: str) -> Layer:
        layer = self._layers.get(layer_id)
        if layer is None:
            raise UserError(f"layer {layer_id} is missing from the store; import or pull the image again")
        return layer

    def find_image(self, given: str) -> ImageRecord | None:
        """Return the image NAME[:TAG], None if there is none or it cannot be a name."""
        try:
            return self._images.get(given)
        except UserError:
            return None

    def size_of(self, layer_id: str) -> int:
        """Return the bytes of a layer's files as its record knows them; 0 when it is gone or still being hashed."""
        layer = self._layers.get(layer_id)
        return 0 if layer is None else layer.record.size

    def remove(self, given: str) -> None:
        """Take an image or a workspace away; UserError when a name could mean both, or neither."""
        workspace, image = self.find_workspace(given), self.find_image(given)
        if workspace is not None and image is not None:
            raise UserError(
                f"{given} is an image and a workspace; write {image.name} for the image, or use --workspace"
            )
        if workspace is not None:
            self.remove_workspace(given)
        elif image is not None:
            self.remove_image(image.name)
        else:
            raise UserError(f"there is no image and no workspace {given}; `overlayfs images` lists what is there")

    # --- workspaces ------------------------------------------------------------------------------------

    def workspace(self, name: str) -> Workspace:
        """Return the workspace with a name; UserError if there is none."""
        return self._workspaces.find(name)

    def find_workspace(self, given: str) -> Workspace | None:
        """Return the workspace with a name, None if there is none."""
        return self._workspaces.get(given)

    def workspaces(self) -> Iterator[Workspace]:
        """Yield every workspace, by name."""
        return self._workspaces.all()

    def new_workspace(self, image: str, name: str | None = None) -> Workspace:
        """Make a workspace for an image and return it, free to be mounted; UserError when there is one of that name."""
        record = self.image(image)
        made = self._workspaces.create(record, name or self._workspaces.free_name(record.name), ephemeral=False)
        made.hold.release()
        return made.workspace

    def claim_workspace(self, image: str, name: str | None = None, ephemeral: bool = False) -> Claim:
        """Return a workspace of an image, made or, when `name` exists, resumed; its lock is the caller's.

        An `ephemeral` one goes as soon as nobody holds its lock. UserError when it is mounted or another image's.
        """
        return self._workspaces.claim(image, name, ephemeral)

    def drop_claimed(self, name: str) -> None:
        """Take away a workspace whose lock the caller holds."""
        self._workspaces.discard(name)
        self.directory.empty_trash()

    def remove_workspace(self, name: str) -> None:
        """Take a workspace away with all that was changed in it; UserError while it is mounted."""
        self._workspaces.remove(layout.workspace_name(name))

    # --- taking away -----------------------------------------------------------------------------------

    def gc(self, dry_run: bool = False) -> list[Garbage]:
        """Take away what nothing refers to and nobody uses, and return it; with `dry_run` only return it."""
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
