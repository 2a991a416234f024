"""Adoption: a directory tree becomes a layer by one rename, without a copy, and what follows from it follows.

    adoption = store.begin_adoption(NewLayer(workspace="w"))        # slow: makes all but the tree, durable
    ...                                                             # the gate closes, the tree is synced
    adoption.take(dirfd, b"upper")                                  # one rename: from here on it is the layer's tree
    ...                                                             # the gate opens
    layer = adoption.settle()                                       # the workspace and the image follow

Before `take` nothing has happened that anybody can see; after it everything that belongs to it will happen, since an
intent file lies there: `recover` finishes what a killed process began. Nobody sees the layer before its tree.

    intents/ID    written before the tree moves, removed when all is settled
    layers/ID/    record first, then the tree: the opposite of a staged layer

Whoever adopts holds the layer's lock shared and the workspace's exclusively, so that `recover` leaves him alone.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import fresh, layout, locks, records
from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers, layer_path
from overlayfs.store.locks import Hold
from overlayfs.store.place import Place
from overlayfs.store.records import ImageRecord, Intent, LayerRecord
from overlayfs.store.workspaces import Workspaces, workspace_path


@dataclass(frozen=True)
class NewLayer:
    """What a tree is to be as a layer, beside its content: what its record says, and what follows from it.

    `created` is a time as `records.now` writes it, None for this moment. `workspace`, whose lock the caller holds, gets
    the layer on top of its stack, and a fresh upper. `image` is put with the layer on top of its `layers`.
    """

    author: str = ""
    message: str = ""
    flags: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    created: str | None = None
    workspace: str | None = None
    image: ImageRecord | None = None

    def record(self) -> LayerRecord:
        """Return the record of a new layer, not hashed yet."""
        return LayerRecord(
            id=layout.new_id(),
            state="hashing",
            created=self.created or records.now(),
            author=records.printable(self.author),
            message=records.printable(self.message),
            flags=self.flags,
            below=self.below,
        )


class Adoption:
    """One tree on its way to being a layer. `id` is the layer's, `next_upper` and `next_work` are absolute paths.

    With a workspace, those two lie ready in it; `settle` gives them their places. A context: leaving it before `take`
    undoes all, leaving it after `take` settles. Where even that fails the tree has moved and nothing has followed yet:
    call `settle` again when it may succeed, or `let_go`, and whoever opens the store next recovers.
    """

    def __init__(self, adopter: "Adopter", intent: Intent, hold: Hold, like: int | None) -> None:
        self._adopter = adopter
        self._intent = intent
        self._hold = hold
        self._taken_from: int | None = None
        self.is_lasting = False
        self.settled = False
        if intent.workspace is not None and like is not None:
            adopter.prepare_workspace(intent.workspace, like)
        self._directory = adopter.place.open(layer_path(intent.layer))

    @property
    def id(self) -> str:
        """The id of the layer that is to be."""
        return self._intent.layer

    @property
    def next_upper(self) -> bytes:
        """The upper that the workspace gets, absolute."""
        return self._in_workspace(layout.NEXT_UPPER)

    @property
    def next_work(self) -> bytes:
        """Its work directory, absolute."""
        return self._in_workspace(layout.NEXT_WORK)

    def _in_workspace(self, name: bytes) -> bytes:
        assert self._intent.workspace is not None
        return os.path.join(self._adopter.place.path, workspace_path(self._intent.workspace), name)

    @property
    def is_taken(self) -> bool:
        """Whether the tree has moved."""
        return self._taken_from is not None

    def take(self, dirfd: int, name: bytes) -> None:
        """Make the directory `name` in `dirfd` the layer's tree: the one step that counts, a single system call.

        What is in it must be on the disk already; that it is here now is, when `is_lasting` is true. `dirfd` is open
        for reading. OSError EXDEV when it lies on another file system.
        """
        parent = os.dup(dirfd)
        try:
            sysio.rename_at(dirfd, name, self._directory, layout.TREE, sysio.RENAME_NOREPLACE)
        except BaseException:
            sysio.close(parent)
            raise
        self._taken_from = parent

    def settle(self) -> Layer:
        """Let the workspace and the image follow, and return the layer, kept from gc as after `publish`.

        May be called again when it has failed.
        """
        assert self._taken_from is not None, "there is nothing to settle before the tree has moved"
        adopter = self._adopter
        if not self.settled:
            sysio.fsync(self._directory)
            sysio.fsync(self._taken_from)
            self.is_lasting = True
            with adopter.place.adding():
                adopter.follow(self._intent)
            adopter.layers.retain(self.id, self._hold)
            self._end()
        layer = adopter.layers.get(self.id)
        assert layer is not None
        return layer

    def cancel(self) -> None:
        """Undo what was prepared; nothing has moved yet."""
        assert self._taken_from is None, "the tree is the layer's by now"
        try:
            self._adopter.undo(self._intent)
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Leave what is not settled to whoever opens the store next."""
        if not self.settled:
            self._hold.release()
            self._end()

    def _end(self) -> None:
        sysio.close(self._directory)
        if self._taken_from is not None:
            sysio.close(self._taken_from)
        self.settled = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.settled:
            return
        if self._taken_from is not None:
            self.settle()
        else:
            self.cancel()


class Adopter:
    """Begins adoptions in a store and finishes those whose process was killed."""

    def __init__(self, place: Place, layers: Layers, images: Images, workspaces: Workspaces) -> None:
        self.place = place
        self.layers = layers
        self._images = images
        self._workspaces = workspaces

    def begin(self, new: NewLayer, like: int | None = None) -> Adoption:
        """Prepare everything but the tree; the workspace's fresh upper will look like the open directory `like`."""
        record, image = new.record(), new.image
        if image is not None:
            name = layout.image_name(image.name)
            image = msgspec.structs.replace(image, name=name, layers=(record.id, *image.layers))
        intent = Intent(layer=record.id, workspace=new.workspace, image=image)
        with contextlib.ExitStack() as failing:
            with self.place.adding():
                self._check_layers(image)
                hold = self._make_directory(record)
                failing.callback(hold.release)
                failing.callback(self._undo_begun, intent)
                self.place.write(self.place.rooms[layout.INTENTS], record.id.encode(), records.encode(intent))
            adoption = Adoption(self, intent, hold, like)
            failing.pop_all()
        return adoption

    def _undo_begun(self, intent: Intent) -> None:
        """Take back a beginning that failed; what fails here too is left for `recover` and gc."""
        with contextlib.suppress(OSError):
            self.undo(intent)

    def _check_layers(self, image: ImageRecord | None) -> None:
        for layer_id in () if image is None else image.layers[1:]:
            if self.layers.get(layer_id) is None:
                raise UserError(f"layer {layer_id} is not in the store, so {image and image.name} cannot be made of it")

    def _make_directory(self, record: LayerRecord) -> Hold:
        rooms, name = self.place.rooms, record.id.encode()
        sysio.mkdir_at(rooms[layout.STAGING], name, 0o700)
        directory = sysio.open_child(rooms[layout.STAGING], name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            hold = locks.make(directory, shared=True)
            try:
                self.place.write(directory, layout.RECORD, records.encode(record))
                sysio.rename_at(rooms[layout.STAGING], name, rooms[layout.LAYERS], name)
                sysio.fsync(rooms[layout.LAYERS])
            except BaseException:
                hold.release()
                raise
        finally:
            sysio.close(directory)
        return hold

    def prepare_workspace(self, name: str, like: int) -> None:
        """Make the next upper and work directory of a workspace."""
        directory = self._workspaces.find(name).open()
        try:
            fresh.make_pair(directory, layout.NEXT_UPPER, layout.NEXT_WORK, like)
        finally:
            sysio.close(directory)

    # --- after the step that counts --------------------------------------------------------------------

    def follow(self, intent: Intent) -> None:
        """Do what follows from an adopted tree. May be done again; the store's lock must be held."""
        if intent.workspace is not None:
            self._renew(intent)
        if intent.image is not None:
            self._images.put_locked(intent.image)
        self._forget_intent(intent)

    def _renew(self, intent: Intent) -> None:
        assert intent.workspace is not None
        workspace = self._workspaces.find(intent.workspace)
        with contextlib.ExitStack() as closing:
            directory = workspace.open()
            closing.callback(sysio.close, directory)
            tree = self.place.open(layer_path(intent.layer) + b"/" + layout.TREE)
            closing.callback(sysio.close, tree)
            fresh.renew(directory, tree)
        self._workspaces.lengthen(workspace.name, intent.layer, None if intent.image is None else intent.image.name)

    def undo(self, intent: Intent) -> None:
        """Take back what was prepared for a tree that has not moved."""
        if intent.workspace is not None:
            self._drop_next(intent.workspace)
        with self.place.removing():
            self._forget_intent(intent)
            with contextlib.suppress(FileNotFoundError):
                self.place.discard(layout.LAYERS, intent.layer.encode())
        self.place.empty_trash()

    def _drop_next(self, name: str) -> None:
        workspace = self._workspaces.get(name)
        if workspace is None:
            return
        directory = workspace.open()
        try:
            if sysio.exists_at(directory, layout.UPPER):  # else the next one is in use: it belongs to a tree that moved
                fresh.drop_next(directory)
        finally:
            sysio.close(directory)

    def _forget_intent(self, intent: Intent) -> None:
        intents = self.place.rooms[layout.INTENTS]
        with contextlib.suppress(FileNotFoundError):
            sysio.unlink_at(intents, intent.layer.encode())
        sysio.fsync(intents)

    # --- after a crash ---------------------------------------------------------------------------------

    def recover(self) -> None:
        """Finish or undo the adoptions of processes that are gone; those of living ones are left alone.

        One that cannot be finished now, as the disk is full or a record damaged, must not keep the rest of the store
        from being used; gc leaves alone what an intent refers to.
        """
        for name in self.place.names(layout.INTENTS):
            with contextlib.suppress(OSError, UserError):
                self._recover(name)

    def _recover(self, name: bytes) -> None:
        document = self.place.read(self.place.rooms[layout.INTENTS], name)
        intent = records.decode(document, Intent, self.place.shown(layout.INTENTS, name))
        with contextlib.ExitStack() as stack:
            if not all(self._held(stack, intent)) or not self.place.exists(layout.INTENTS + b"/" + name):
                return  # somebody is at it, or has done it while we asked for the locks
            if self.layers.get(intent.layer) is None:
                self.undo(intent)
            else:
                with self.place.adding():
                    self.follow(self._still_possible(intent))

    def _held(self, stack: contextlib.ExitStack, intent: Intent) -> Iterator[bool]:
        """Take the locks of a recovery; a False among them says that somebody is still at it."""
        paths = [layer_path(intent.layer)]
        if intent.workspace is not None:
            paths.append(workspace_path(intent.workspace))
        for path in paths:
            try:
                hold = locks.hold(self.place.root, path, shared=False)
            except FileNotFoundError:
                continue
            if hold is not None:
                stack.enter_context(hold)
            yield hold is not None

    def _still_possible(self, intent: Intent) -> Intent:
        """Leave out a workspace that was removed meanwhile."""
        if intent.workspace is None or self._workspaces.get(intent.workspace) is not None:
            return intent
        return msgspec.structs.replace(intent, workspace=None)
