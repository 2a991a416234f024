"""Images: names for stacks of layers, one small file each, replaced in one step."""

from collections.abc import Iterator

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, records
from overlayfs.store.layers import Layers
from overlayfs.store.records import ImageRecord
from overlayfs.store.store_directory import StoreDirectory


class Images:
    """All images of a store."""

    def __init__(self, store_dir: StoreDirectory, layers: Layers) -> None:
        self._store_dir = store_dir
        self._layers = layers

    def all(self) -> Iterator[ImageRecord]:
        """Yield every image, by name."""
        found = map(self._read, self._store_dir.names(layout.IMAGES))
        return (record for record in found if record is not None)

    def get(self, name: str) -> ImageRecord | None:
        """Return the image NAME[:TAG], None if there is none; UserError for what cannot be a name."""
        return self._read(layout.file_name(layout.image_name(name)))

    def find(self, name: str) -> ImageRecord:
        """Return the image NAME[:TAG]; UserError if there is none."""
        record = self.get(name)
        if record is None:
            raise UserError(f"there is no image {layout.image_name(name)}; `overlayfs images` lists them")
        return record

    def _read(self, file: bytes) -> ImageRecord | None:
        try:
            document = self._store_dir.read(layout.IMAGES, file)
        except FileNotFoundError:
            return None
        return records.decode(document, ImageRecord, self._store_dir.display_path(layout.IMAGES, file))

    def put(self, record: ImageRecord) -> ImageRecord:
        """Make a name stand for a stack, in one step; UserError when a layer is not in the store."""
        with self._store_dir.lock_shared():
            placed = self.put_locked(record)
        for layer_id in record.layers:
            self._layers.unprotect(layer_id)
        return placed

    def put_locked(self, record: ImageRecord) -> ImageRecord:
        """Do the same when the store's lock is held."""
        name = layout.image_name(record.name)
        for layer_id in record.layers:
            if self._layers.get(layer_id) is None:
                raise UserError(f"layer {layer_id} is not in the store, so {name} cannot be made of it")
        layers = tuple(map(self.canonical_id, record.layers))
        placed = msgspec.structs.replace(record, name=name, layers=layers)
        images = self._store_dir.subdirectories[layout.IMAGES]
        self._store_dir.write(images, layout.file_name(name), records.encode(placed))
        return placed

    def canonical_id(self, layer_id: str) -> str:
        """Return the id of the layer that images name for the content of this one."""
        layer = self._layers.get(layer_id)
        same = None if layer is None else layer.record.same_as
        return same if same is not None and self._layers.get(same) is not None else layer_id

    def replace_layer(self, old: str, new: str) -> None:
        """Make every image that names one layer name another, equal one. The store's lock must be held."""
        for record in self.all():
            if old in record.layers:
                layers = tuple(new if layer_id == old else layer_id for layer_id in record.layers)
                self.put_locked(msgspec.structs.replace(record, layers=layers))

    def tag(self, old: str, new: str) -> ImageRecord:
        """Give an image a second name; what that name stood for loses it."""
        with self._store_dir.lock_shared():
            return self.put_locked(msgspec.structs.replace(self.find(old), name=new))

    def remove(self, name: str) -> None:
        """Take a name away; the layers stay until gc. UserError if there is none."""
        with self._store_dir.lock_exclusively():
            record = self.find(name)
            sysio.unlink_at(self._store_dir.subdirectories[layout.IMAGES], layout.file_name(record.name))
            sysio.fsync(self._store_dir.subdirectories[layout.IMAGES])
