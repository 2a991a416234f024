"""Images: names for stacks of layers, one small file each, replaced by one rename."""

import contextlib
from collections.abc import Iterator

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, records
from overlayfs.store.layers import Layers
from overlayfs.store.records import ImageRecord
from overlayfs.store.store_directory import StoreDirectory


class Images:
    """All images of a store; calling it yields them."""

    def __init__(self, store_dir: StoreDirectory, layers: Layers) -> None:
        self._store_dir = store_dir
        self._layers = layers

    def __call__(self) -> Iterator[ImageRecord]:
        """Yield every image, by name."""
        found = map(self._read, self._store_dir.names(layout.IMAGES))
        return (record for record in found if record is not None)

    def get(self, name: str) -> ImageRecord | None:
        """Return the image NAME[:TAG]; None if there is none, its record is damaged, or no image can have the name."""
        with contextlib.suppress(UserError):
            return self._read(layout.file_name(layout.image_name(name)))
        return None

    def find(self, name: str) -> ImageRecord:
        """Return the image NAME[:TAG]; raises UserError if there is none."""
        full_name = layout.image_name(name)
        record = self._read(layout.file_name(full_name))
        if record is None:
            raise UserError(f"there is no image {full_name}; `overlayfs images` lists them")
        return record

    def _read(self, file: bytes) -> ImageRecord | None:
        try:
            document = self._store_dir.read(layout.IMAGES, file)
        except FileNotFoundError:
            return None
        return records.decode(document, ImageRecord, self._store_dir.display_path(layout.IMAGES, file))

    def put(self, record: ImageRecord) -> ImageRecord:
        """Make a name stand for a stack, atomically, and return the record as stored.

        Raises UserError if a layer is not in the store. The layers are no longer protected by this process: the image
        refers to them.
        """
        with self._store_dir.lock_shared():
            stored = self.put_locked(record)
        for layer_id in record.layers:
            self._layers.unprotect(layer_id)
        return stored

    def put_locked(self, record: ImageRecord) -> ImageRecord:
        """Make a name stand for a stack while the store's lock is held; the layers stay protected."""
        name = layout.image_name(record.name)
        for layer_id in record.layers:
            if self._layers.get(layer_id) is None:
                raise UserError(f"layer {layer_id} is not in the store, so {name} cannot be made of it")
        layers = tuple(map(self.canonical_id, record.layers))
        stored = msgspec.structs.replace(record, name=name, layers=layers)
        images = self._store_dir.subdirectories[layout.IMAGES]
        self._store_dir.write(images, layout.file_name(name), records.encode(stored))
        return stored

    def canonical_id(self, layer_id: str) -> str:
        """Return the id that images use for the content of this layer: that of an equal, older layer, or its own."""
        layer = self._layers.get(layer_id)
        same = None if layer is None else layer.record.same_as
        return same if same is not None and self._layers.get(same) is not None else layer_id

    def replace_layer(self, old: str, new: str) -> None:
        """Make every image that names the layer `old` name the equal layer `new`. The store's lock must be held."""
        for record in self():
            if old in record.layers:
                layers = tuple(new if layer_id == old else layer_id for layer_id in record.layers)
                self.put_locked(msgspec.structs.replace(record, layers=layers))

    def tag(self, old: str, new: str) -> ImageRecord:
        """Give the image `old` the second name `new`, which stops naming what it named before."""
        with self._store_dir.lock_shared():
            return self.put_locked(msgspec.structs.replace(self.find(old), name=new))

    def remove(self, name: str) -> None:
        """Remove a name; its layers stay until gc. Raises UserError if there is none."""
        with self._store_dir.lock_exclusively():
            record = self.find(name)
            images = self._store_dir.subdirectories[layout.IMAGES]
            sysio.unlink_at(images, layout.file_name(record.name))
            sysio.fsync(images)
