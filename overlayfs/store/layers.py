"""Layers at rest: how one is staged, published or adopted, found and held.

A layer is there when both its record and its tree are. One that is staged gets its record last and appears by one
rename; one that is adopted has its record first and is there when the tree is renamed into it. Who makes a layer holds
its lock shared from birth, so that nothing takes it before something refers to it.
"""

import contextlib
import os
from collections.abc import Iterator, Sized
from typing import Protocol, Self

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, locks, records
from overlayfs.store.locks import HeldLock
from overlayfs.store.records import LayerRecord
from overlayfs.store.store_directory import StoreDirectory

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_PATIENCE = 10.0  # seconds that a reader waits for a repair to end


class Summary(Protocol):
    """What the store asks of a manifest (`overlayfs.store.manifest.Manifest` is one)."""

    @property
    def digest(self) -> str:
        """``sha256:HEX`` of what `write` writes."""

    @property
    def size(self) -> int:
        """Bytes of all regular files, hard links once."""

    @property
    def entries(self) -> Sized:
        """All entries."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Which marks that count on layers below are in it: "redirect", "metacopy"."""

    def write(self, fd: int) -> None:
        """Write the manifest to an open, empty file."""


class Layer:
    """One layer of the store and its record as it was when it was looked up."""

    def __init__(self, store_dir: StoreDirectory, record: LayerRecord) -> None:
        self._store_dir = store_dir
        self.record = record

    @property
    def id(self) -> str:
        """The 32 hex digits it has had since birth."""
        return self.record.id

    @property
    def path(self) -> bytes:
        """Its directory, absolute."""
        return os.path.join(self._store_dir.path, layer_path(self.id))

    @property
    def tree_path(self) -> bytes:
        """The tree that a mount shows, absolute."""
        return os.path.join(self.path, layout.TREE)

    def tree_fd(self) -> int:
        """Open the root of the tree; the caller closes it. FileNotFoundError when the layer is gone."""
        return self._store_dir.open(layer_path(self.id) + b"/" + layout.TREE)

    def manifest_fd(self) -> int:
        """Open the manifest for reading; the caller closes it. FileNotFoundError while there is none."""
        return self._store_dir.open(layer_path(self.id) + b"/" + layout.MANIFEST, os.O_RDONLY)

    def hold(self) -> HeldLock:
        """Keep the layer as it is until the hold is released: neither gc nor a repair touches it. UserError if gone."""
        return self._hold(shared=True)

    def hold_exclusively(self) -> HeldLock:
        """Be the only one who uses the layer, to repair it; UserError when somebody else does."""
        return self._hold(shared=False)

    def _hold(self, shared: bool) -> HeldLock:
        try:
            hold = locks.try_hold(
                self._store_dir.root, layer_path(self.id), shared=shared, wait=_PATIENCE if shared else 0.0
            )
        except FileNotFoundError:
            raise UserError(f"layer {self.id} is not in the store any more") from None
        if hold is None:
            holder = "it is being repaired" if shared else "unmount what uses it first"
            raise UserError(f"layer {self.id} is in use; {holder}")
        return hold


def layer_path(layer_id: str) -> bytes:
    """Return where a layer lies, counted from the store."""
    return layout.LAYERS + b"/" + layer_id.encode()


def _index_places(record: LayerRecord) -> Iterator[tuple[bytes, bytes]]:
    """Yield room and name of the index files of a layer."""
    for room, digest in ((layout.DIGESTS, record.digest), (layout.DIFFS, record.diff_id)):
        name = layout.digest_file(digest) if digest is not None else None
        if name is not None:
            yield room, name


class Layers:
    """All layers of a store. What is born or found by content here is kept from gc until `forget` or `close`."""

    def __init__(self, store_dir: StoreDirectory) -> None:
        self.store_dir = store_dir
        self._protected: dict[str, HeldLock] = {}

    def close(self) -> None:
        """Let go of all that is kept."""
        for layer_id in tuple(self._protected):
            self.unprotect(layer_id)

    def unprotect(self, layer_id: str) -> None:
        """Let go of one layer: something refers to it now, or nothing ever will."""
        hold = self._protected.pop(layer_id, None)
        if hold is not None:
            hold.release()

    def protect(self, layer_id: str, hold: HeldLock) -> None:
        """Keep a layer whose lock is held already."""
        self.unprotect(layer_id)
        self._protected[layer_id] = hold

    # --- finding ---------------------------------------------------------------------------------------

    def ids(self) -> Iterator[str]:
        """Yield the ids of all directories in the layers' room, whole or not."""
        return (name.decode() for name in self.store_dir.names(layout.LAYERS) if layout.is_id(os.fsdecode(name)))

    def all(self) -> Iterator[Layer]:
        """Yield every layer that is there, by id."""
        return (layer for layer in map(self.get, self.ids()) if layer is not None)

    def get(self, layer_id: str) -> Layer | None:
        """Return the layer with a whole id, None if there is none."""
        if not layout.is_id(layer_id):
            return None  # a record may say anything
        path = layer_path(layer_id)
        try:
            document = self.store_dir.read(path, layout.RECORD)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not self.store_dir.exists(path + b"/" + layout.TREE):
            return None
        return Layer(
            self.store_dir, records.decode(document, LayerRecord, self.store_dir.display_path(path, layout.RECORD))
        )

    def find(self, given: str) -> Layer:
        """Return the layer with an id or digest that begins so; UserError for none and for several."""
        layer = self.get(given) if layout.is_id(given) else None
        found = {layer.id: layer} if layer is not None else self._beginning(given.removeprefix("sha256:"))
        if len(found) != 1:
            what = "is the start of several layer ids; write more of it" if found else "is no layer of this store"
            raise UserError(f"{given} {what}; `overlayfs layers` lists them")
        return next(iter(found.values()))

    def _beginning(self, start: str) -> dict[str, Layer]:
        if not start or not all(digit in "0123456789abcdef" for digit in start):
            return {}
        by_id = (self.get(each) for each in self.ids() if each.startswith(start))
        digests = (name.decode() for name in self.store_dir.names(layout.DIGESTS) if name.startswith(start.encode()))
        by_digest = (layer for each in digests for layer in self._indexed(layout.DIGESTS, f"sha256:{each}"))
        return {layer.id: layer for layer in (*by_id, *by_digest) if layer is not None}

    def by_digest(self, digest: str, below: tuple[str, ...] | None = None) -> Layer | None:
        """Return a layer with this content, kept from now on, or None; with `below`, one that counts on those."""
        return self._first_kept(self._indexed(layout.DIGESTS, digest), below)

    def by_diff_id(self, diff_id: str) -> Layer | None:
        """Return a layer that this canonical tar makes, kept from now on, or None."""
        return self._first_kept(self._indexed(layout.DIFFS, diff_id), None)

    def _indexed(self, room: bytes, digest: str) -> Iterator[Layer]:
        """Ask an index, and each record whether it is right: an index may be old."""
        for layer_id in self._index_lines(room, layout.digest_file(digest)):
            layer = self.get(layer_id) if layout.is_id(layer_id) else None
            if layer is not None and digest == (
                layer.record.digest if room == layout.DIGESTS else layer.record.diff_id
            ):
                yield layer

    def _index_lines(self, room: bytes, name: bytes | None) -> list[str]:
        try:
            return [] if name is None else os.fsdecode(self.store_dir.read(room, name)).split()
        except FileNotFoundError:
            return []

    def _first_kept(self, found: Iterator[Layer], below: tuple[str, ...] | None) -> Layer | None:
        fitting = (layer for layer in found if below is None or layer.record.below == below)
        return next((layer for layer in fitting if self._keep(layer)), None)

    def _keep(self, layer: Layer) -> bool:
        """Hold a layer from now on; False when it is gone, or under repair and so does not count yet."""
        if layer.id in self._protected:
            return True
        try:
            hold = locks.try_hold(self.store_dir.root, layer_path(layer.id), shared=True)
        except FileNotFoundError:
            return False
        if hold is None:
            return False
        self.protect(layer.id, hold)
        return True

    def unfinished(self) -> Iterator[Layer]:
        """Yield the layers whose manifest is still to come."""
        return (layer for layer in self.all() if layer.record.state == "hashing")

    # --- making ----------------------------------------------------------------------------------------

    def stage(self) -> "StagedLayer":
        """Begin a layer in the staging place."""
        return StagedLayer(self, layout.new_id())

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Be the only one who decides whether a layer is there already; nothing is taken away meanwhile."""
        with self.store_dir.lock_shared(), locks.hold(self.store_dir.root, layout.DIGESTS, shared=False):
            yield

    def equal(self, digest: str | None, below: tuple[str, ...]) -> Layer | None:
        """Return the layer that stands for this content, kept; marks that count on layers below must mean the same."""
        return None if digest is None else self.by_digest(digest, below)

    def write_record(self, record: LayerRecord) -> Layer:
        """Enter a layer into the indexes and replace its record. The store's lock must be held.

        The indexes come first: an entry that no record bears out is not believed, a layer without one is not found.
        """
        self.index(record)
        directory = self.store_dir.open(layer_path(record.id))
        try:
            self.store_dir.write(directory, layout.RECORD, records.encode(record))
        finally:
            sysio.close(directory)
        return Layer(self.store_dir, record)

    def write_manifest(self, layer_id: str, manifest: Summary) -> None:
        """Put the manifest of a layer in place, durably."""
        directory = self.store_dir.open(layer_path(layer_id))
        try:
            write_manifest(directory, manifest)
        finally:
            sysio.close(directory)

    def index(self, record: LayerRecord) -> None:
        """Enter a layer into the indexes, unless another one stands for it."""
        if record.same_as is not None:
            return
        for room, name in _index_places(record):
            others = [line for line in self._index_lines(room, name) if line != record.id and self.get(line)]
            self._write_index(room, name, [*others, record.id])

    def tidy_indexes(self) -> None:
        """Remove what the indexes say of layers that are gone."""
        with self.publishing():
            there = set(self.ids())
            for room in (layout.DIGESTS, layout.DIFFS):
                for name in self.store_dir.names(room):
                    lines = self._index_lines(room, name)
                    left = [line for line in lines if line in there]
                    if not left:
                        sysio.unlink_at(self.store_dir.subdirectories[room], name)
                    elif left != lines:
                        self._write_index(room, name, left)

    def _write_index(self, room: bytes, name: bytes, ids: list[str]) -> None:
        self.store_dir.write(self.store_dir.subdirectories[room], name, "\n".join(ids).encode() + b"\n")

    def note_diff_id(self, layer: Layer, diff_id: str) -> Layer:
        """Remember the sha256 of a layer's canonical tar, which somebody has worked out."""
        with self.publishing():
            now = self.get(layer.id) or layer
            return self.write_record(msgspec.structs.replace(now.record, diff_id=diff_id))


class StagedLayer:
    """A layer in the making: fill the tree, then `publish`. A context; leaving it without publishing discards."""

    def __init__(self, layers: Layers, layer_id: str) -> None:
        self._layers = layers
        self._store_dir = layers.store_dir
        self.id = layer_id
        self._name = layer_id.encode()
        self._published = False
        with contextlib.ExitStack() as failing:
            with self._store_dir.lock_shared():
                sysio.mkdir_at(self._store_dir.subdirectories[layout.STAGING], self._name, 0o700)
                self._directory = self._store_dir.open(layout.STAGING + b"/" + self._name)
                failing.callback(sysio.close, self._directory)
                self._hold = failing.enter_context(locks.create(self._directory, shared=True))
            sysio.mkdir_at(self._directory, layout.TREE, 0o755)
            self.tree_fd = sysio.open_child(self._directory, layout.TREE, _DIRECTORY)
            failing.pop_all()

    @property
    def tree_path(self) -> bytes:
        """The tree to fill, absolute."""
        return os.path.join(self._store_dir.path, layout.STAGING, self._name, layout.TREE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if not self._published:
            with self._hold, contextlib.suppress(OSError):  # what cannot go now goes with the next gc
                self._store_dir.move_to_trash(layout.STAGING, self._name)
            with contextlib.suppress(OSError):
                self._store_dir.empty_trash()

    def _close(self) -> None:
        for fd in (self.tree_fd, self._directory):
            sysio.close(fd)

    def publish(
        self,
        *,
        manifest: Summary | None,
        author: str = "",
        message: str = "",
        diff_id: str | None = None,
        flags: tuple[str, ...] | None = None,
        below: tuple[str, ...] = (),
        created: str | None = None,
    ) -> Layer:
        """Make the layer a part of the store, durably, and return it: an equal one instead where there is one.

        Without a manifest its state is "hashing" until `LayerStore.finish`. `flags` None means those of the manifest;
        `below` are the layers that they count on, and is dropped where there are none. The layer is kept from gc until
        the store is closed or an image names it.
        """
        if flags is None:
            flags = () if manifest is None else manifest.flags
        record = LayerRecord(
            id=self.id,
            state="hashing" if manifest is None else "complete",
            created=created or records.now(),
            author=records.printable(author),
            message=records.printable(message),
            digest=None if manifest is None else manifest.digest,
            diff_id=diff_id,
            size=0 if manifest is None else manifest.size,
            entries=0 if manifest is None else len(manifest.entries),
            flags=flags,
            below=below if flags or manifest is None else (),
        )
        sysio.syncfs(self.tree_fd)
        with self._layers.publishing():
            return self._same(record) or self._appear(record, manifest)

    def _same(self, record: LayerRecord) -> Layer | None:
        same = self._layers.equal(record.digest, record.below)
        if same is not None and record.diff_id is not None and same.record.diff_id is None:
            return self._layers.write_record(msgspec.structs.replace(same.record, diff_id=record.diff_id))
        return same

    def _appear(self, record: LayerRecord, manifest: Summary | None) -> Layer:
        if manifest is not None:
            write_manifest(self._directory, manifest)
        self._store_dir.write(self._directory, layout.RECORD, records.encode(record))
        self._layers.index(record)
        rooms = self._store_dir.subdirectories
        sysio.rename_at(rooms[layout.STAGING], self._name, rooms[layout.LAYERS], self._name)
        self._published = True
        self._layers.protect(self.id, self._hold)
        sysio.fsync(rooms[layout.LAYERS])
        return Layer(self._store_dir, record)


def write_manifest(directory: int, manifest: Summary) -> None:
    """Put a manifest into a layer's directory, durable; the record that speaks of it comes after."""
    fresh = layout.MANIFEST + b".new"
    fd = sysio.open_child(directory, fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        manifest.write(fd)
        sysio.fsync(fd)
    finally:
        sysio.close(fd)
    sysio.rename_at(directory, fresh, directory, layout.MANIFEST)
    sysio.fsync(directory)
