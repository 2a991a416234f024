"""Layers at rest: how a layer is staged, published, found and held.

A layer exists when both its record and its tree do. A staged layer gets its record last and appears by one rename; a
committed directory has its record first, and the layer exists once the tree has been renamed into it. The process that
makes a layer holds its lock shared from the beginning, so that gc does not remove it before something refers to it.
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
_REPAIR_TIMEOUT = 10.0  # seconds that a reader waits for a repair to end


class Summary(Protocol):
    """What the store needs of a manifest (`overlayfs.store.manifest.Manifest` is one)."""

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
        """The attributes in it that depend on layers below: "redirect", "metacopy"."""

    def write(self, fd: int) -> None:
        """Write the manifest to an open, empty file."""


class Layer:
    """One layer of the store, with its record as of the look-up."""

    def __init__(self, store_dir: StoreDirectory, record: LayerRecord) -> None:
        self._store_dir = store_dir
        self.record = record

    @property
    def id(self) -> str:
        """Its id, 32 hex digits, which never changes."""
        return self.record.id

    @property
    def path(self) -> bytes:
        """The absolute path of its directory."""
        return os.path.join(self._store_dir.path, layer_path(self.id))

    @property
    def tree_path(self) -> bytes:
        """The absolute path of the tree that mounts use."""
        return os.path.join(self.path, layout.TREE)

    def tree_fd(self) -> int:
        """Open the root of the tree; the caller closes it. Raises FileNotFoundError if the layer is gone."""
        return self._store_dir.open(layer_path(self.id) + b"/" + layout.TREE)

    def manifest_fd(self) -> int:
        """Open the manifest for reading; the caller closes it. Raises FileNotFoundError if there is none."""
        return self._store_dir.open(layer_path(self.id) + b"/" + layout.MANIFEST, os.O_RDONLY)

    def hold(self) -> HeldLock:
        """Keep gc and repair from the layer until the lock is released; raises UserError if the layer is gone."""
        return self._hold(shared=True)

    def hold_exclusively(self) -> HeldLock:
        """Hold the layer exclusively, to repair it; raises UserError if it is in use."""
        return self._hold(shared=False)

    def _hold(self, shared: bool) -> HeldLock:
        wait = _REPAIR_TIMEOUT if shared else 0.0
        try:
            lock = locks.try_hold(self._store_dir.root, layer_path(self.id), shared=shared, wait=wait)
        except FileNotFoundError:
            raise UserError(f"layer {self.id} is not in the store any more") from None
        if lock is None:
            advice = "it is being repaired" if shared else "unmount what uses it first"
            raise UserError(f"layer {self.id} is in use; {advice}")
        return lock


def layer_path(layer_id: str) -> bytes:
    """Return the path of a layer's directory, relative to the store."""
    return layout.LAYERS + b"/" + layer_id.encode()


def _index_files(record: LayerRecord) -> Iterator[tuple[bytes, bytes]]:
    """Yield subdirectory and name of the index files that must name a layer."""
    for subdirectory, digest in ((layout.DIGESTS, record.digest), (layout.DIFFS, record.diff_id)):
        name = layout.digest_file(digest) if digest is not None else None
        if name is not None:
            yield subdirectory, name


class Layers:
    """All layers of a store; calling it yields them.

    Layers that are made here, or found by their content, are protected from gc until `unprotect` or `close`.
    """

    def __init__(self, store_dir: StoreDirectory) -> None:
        self.store_dir = store_dir
        self._protected: dict[str, HeldLock] = {}

    # --- protecting from gc ----------------------------------------------------------------------------

    def close(self) -> None:
        """Release all protected layers."""
        for layer_id in tuple(self._protected):
            self.unprotect(layer_id)

    def protect(self, layer_id: str, lock: HeldLock) -> None:
        """Protect a layer, whose lock is held already, from gc."""
        self.unprotect(layer_id)
        self._protected[layer_id] = lock

    def unprotect(self, layer_id: str) -> None:
        """Release a layer: something refers to it now, or nothing ever will."""
        lock = self._protected.pop(layer_id, None)
        if lock is not None:
            lock.release()

    def _try_protect(self, layer: Layer) -> bool:
        """Protect a layer; False if it is gone, or being repaired and therefore not valid yet."""
        if layer.id in self._protected:
            return True
        try:
            lock = locks.try_hold(self.store_dir.root, layer_path(layer.id), shared=True)
        except FileNotFoundError:
            return False
        if lock is None:
            return False
        self.protect(layer.id, lock)
        return True

    # --- finding ---------------------------------------------------------------------------------------

    def ids(self) -> Iterator[str]:
        """Yield the ids of all layer directories, complete or not."""
        return (name.decode() for name in self.store_dir.names(layout.LAYERS) if layout.is_id(os.fsdecode(name)))

    def __call__(self) -> Iterator[Layer]:
        """Yield every layer, by id."""
        return (layer for layer in map(self.get, self.ids()) if layer is not None)

    def unfinished(self) -> Iterator[Layer]:
        """Yield the layers that have no manifest yet."""
        return (layer for layer in self() if layer.record.state == "hashing")

    def get(self, layer_id: str) -> Layer | None:
        """Return the layer with a complete id, or None; raises UserError if its record is damaged."""
        if not layout.is_id(layer_id):
            return None  # ids come from records, which may be damaged
        path = layer_path(layer_id)
        try:
            document = self.store_dir.read(path, layout.RECORD)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not self.store_dir.exists(path + b"/" + layout.TREE):
            return None
        where = self.store_dir.display_path(path, layout.RECORD)
        return Layer(self.store_dir, records.decode(document, LayerRecord, where))

    def find(self, given: str) -> Layer:
        """Return the layer whose id or digest begins with `given`; raises UserError if there is not exactly one."""
        layer = self.get(given) if layout.is_id(given) else None
        found = {layer.id: layer} if layer is not None else self._by_prefix(given.removeprefix("sha256:"))
        if len(found) != 1:
            what = "is the start of several layer ids; write more of it" if found else "is no layer of this store"
            raise UserError(f"{given} {what}; `overlayfs layers` lists them")
        return next(iter(found.values()))

    def _by_prefix(self, prefix: str) -> dict[str, Layer]:
        if not prefix or not all(digit in "0123456789abcdef" for digit in prefix):
            return {}
        by_id = (self.get(each) for each in self.ids() if each.startswith(prefix))
        digests = (name.decode() for name in self.store_dir.names(layout.DIGESTS) if name.startswith(prefix.encode()))
        by_digest = (layer for each in digests for layer in self._indexed(layout.DIGESTS, f"sha256:{each}"))
        return {layer.id: layer for layer in (*by_id, *by_digest) if layer is not None}

    def of_tree(self, path: bytes) -> Layer:
        """Return the layer whose tree is the directory `path`; raises UserError if it is no layer of this store."""
        layer = self.get(os.fsdecode(os.path.basename(os.path.dirname(os.path.realpath(path)))))
        if layer is None or not os.path.samefile(layer.tree_path, path):
            raise UserError(f"{os.fsdecode(path)} is not a layer of the store; import it first, and mount the image")
        return layer

    def by_digest(self, digest: str) -> Layer | None:
        """Return a layer with this content (``sha256:HEX`` of its manifest), protected from gc, or None."""
        return self._first_protected(self._indexed(layout.DIGESTS, digest))

    def by_diff_id(self, diff_id: str) -> Layer | None:
        """Return a layer whose canonical tar has this digest (``sha256:HEX``), protected from gc, or None."""
        return self._first_protected(self._indexed(layout.DIFFS, diff_id))

    def find_equal(self, digest: str | None, below: tuple[str, ...]) -> Layer | None:
        """Return a layer with the same content over the same layers `below`, protected from gc, or None.

        `below` counts because redirects and metadata-only copies are resolved in those layers.
        """
        if digest is None:
            return None
        return self._first_protected(
            layer for layer in self._indexed(layout.DIGESTS, digest) if layer.record.below == below
        )

    def _first_protected(self, found: Iterator[Layer]) -> Layer | None:
        return next((layer for layer in found if self._try_protect(layer)), None)

    def size_of(self, layer_id: str) -> int:
        """Return the bytes of a layer's files according to its record; 0 if it is gone or not hashed yet."""
        layer = self.get(layer_id)
        return 0 if layer is None else layer.record.size

    # --- the indexes -----------------------------------------------------------------------------------

    def _indexed(self, subdirectory: bytes, digest: str) -> Iterator[Layer]:
        """Yield the layers that an index names and whose records agree: an index may be out of date."""
        for layer_id in self.index_lines(subdirectory, digest):
            layer = self.get(layer_id)
            if layer is not None and digest == (
                layer.record.digest if subdirectory == layout.DIGESTS else layer.record.diff_id
            ):
                yield layer

    def index_lines(self, subdirectory: bytes, digest: str) -> list[str]:
        """Return the layer ids in the index file of a digest; none if there is no such file."""
        name = layout.digest_file(digest)
        return [] if name is None else self._read_index(subdirectory, name)

    def _read_index(self, subdirectory: bytes, name: bytes) -> list[str]:
        try:
            return os.fsdecode(self.store_dir.read(subdirectory, name)).split()
        except FileNotFoundError:
            return []

    def _write_index(self, subdirectory: bytes, name: bytes, ids: list[str]) -> None:
        self.store_dir.write(self.store_dir.subdirectories[subdirectory], name, "\n".join(ids).encode() + b"\n")

    def index(self, record: LayerRecord) -> None:
        """Add a layer to the indexes, unless images use an equal one instead. `publishing` must be entered."""
        if record.same_as is not None:
            return
        for subdirectory, name in _index_files(record):
            others = [line for line in self._read_index(subdirectory, name) if line != record.id and self.get(line)]
            self._write_index(subdirectory, name, [*others, record.id])

    def tidy_indexes(self) -> None:
        """Remove the layers that are gone from the indexes."""
        with self.publishing():
            existing = set(self.ids())
            for subdirectory in (layout.DIGESTS, layout.DIFFS):
                for name in self.store_dir.names(subdirectory):
                    lines = self._read_index(subdirectory, name)
                    remaining = [line for line in lines if line in existing]
                    if not remaining:
                        sysio.unlink_at(self.store_dir.subdirectories[subdirectory], name)
                    elif remaining != lines:
                        self._write_index(subdirectory, name, remaining)

    # --- making and changing ---------------------------------------------------------------------------

    def stage(self) -> "StagedLayer":
        """Begin a layer: fill its tree, then publish it."""
        return StagedLayer(self, layout.new_id())

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold the store's lock shared and the indexes' exclusively: one process at a time looks for equal layers."""
        with self.store_dir.lock_shared(), locks.hold(self.store_dir.root, layout.DIGESTS, shared=False):
            yield

    def write_record(self, record: LayerRecord) -> Layer:
        """Add a layer to the indexes and replace its record. `publishing` must be entered.

        The indexes come first: an index line without a matching record is ignored, a layer in no index is not found.
        """
        self.index(record)
        with self._opened(record.id) as directory:
            self.store_dir.write(directory, layout.RECORD, records.encode(record))
        return Layer(self.store_dir, record)

    def write_manifest(self, layer_id: str, manifest: Summary) -> None:
        """Write the manifest of a layer, durably."""
        with self._opened(layer_id) as directory:
            write_manifest(directory, manifest)

    @contextlib.contextmanager
    def _opened(self, layer_id: str) -> Iterator[int]:
        directory = self.store_dir.open(layer_path(layer_id))
        try:
            yield directory
        finally:
            sysio.close(directory)

    def note_diff_id(self, layer: Layer, diff_id: str) -> Layer:
        """Record the digest (``sha256:HEX``) of a layer's canonical tar, and return the layer."""
        with self.publishing():
            now = self.get(layer.id) or layer
            return self.write_record(msgspec.structs.replace(now.record, diff_id=diff_id))


class StagedLayer:
    """A layer that is being made: fill the tree, then `publish`.

    A context manager: leaving it without publishing discards the layer. `tree_fd` is the open, empty tree.
    """

    def __init__(self, layers: Layers, layer_id: str) -> None:
        self._layers = layers
        self._store_dir = layers.store_dir
        self.id = layer_id
        self._name = layer_id.encode()
        self._published = False
        with contextlib.ExitStack() as undo:
            with self._store_dir.lock_shared():
                sysio.mkdir_at(self._store_dir.subdirectories[layout.STAGING], self._name, 0o700)
                self._directory = self._store_dir.open(layout.STAGING + b"/" + self._name)
                undo.callback(sysio.close, self._directory)
                self._lock = undo.enter_context(locks.create(self._directory, shared=True))
            sysio.mkdir_at(self._directory, layout.TREE, 0o755)
            self.tree_fd = sysio.open_child(self._directory, layout.TREE, _DIRECTORY)
            undo.pop_all()

    @property
    def tree_path(self) -> bytes:
        """The absolute path of the tree to fill."""
        return os.path.join(self._store_dir.path, layout.STAGING, self._name, layout.TREE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self.tree_fd, self._directory):
            sysio.close(fd)
        if not self._published:
            with self._lock, contextlib.suppress(OSError):  # what cannot be removed now is removed by the next gc
                self._store_dir.move_to_trash(layout.STAGING, self._name)
            with contextlib.suppress(OSError):
                self._store_dir.empty_trash()

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
        """Add the layer to the store, durably, and return it, or an equal layer that was there before.

        Without a manifest its state is "hashing" until `LayerStore.complete_layer`. `flags` None means those of the
        manifest. `below` are the ids of the layers that the flags depend on; it is dropped if there are none. `created`
        is a time as `records.now` writes it; None means now. The layer is protected from gc until the store is closed
        or an image names it.
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
            return self._find_equal(record) or self._publish_new(record, manifest)

    def _find_equal(self, record: LayerRecord) -> Layer | None:
        same = self._layers.find_equal(record.digest, record.below)
        if same is not None and record.diff_id is not None and same.record.diff_id is None:
            return self._layers.write_record(msgspec.structs.replace(same.record, diff_id=record.diff_id))
        return same

    def _publish_new(self, record: LayerRecord, manifest: Summary | None) -> Layer:
        if manifest is not None:
            write_manifest(self._directory, manifest)
        self._store_dir.write(self._directory, layout.RECORD, records.encode(record))
        self._layers.index(record)
        subdirectories = self._store_dir.subdirectories
        sysio.rename_at(subdirectories[layout.STAGING], self._name, subdirectories[layout.LAYERS], self._name)
        self._published = True
        self._layers.protect(self.id, self._lock)
        sysio.fsync(subdirectories[layout.LAYERS])
        return Layer(self._store_dir, record)


def write_manifest(directory: int, manifest: Summary) -> None:
    """Write a manifest to a layer's open directory, durably; the record that refers to it is written afterwards."""
    temporary = layout.MANIFEST + b".new"
    fd = sysio.open_child(directory, temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        manifest.write(fd)
        sysio.fsync(fd)
    finally:
        sysio.close(fd)
    sysio.rename_at(directory, temporary, directory, layout.MANIFEST)
    sysio.fsync(directory)
