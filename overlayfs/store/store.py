"""The store: layers, images and workspaces in one directory, for several processes at once and without a server.

    with LayerStore(b"/var/lib/overlayfs") as store:
        with store.new_layer() as staged:
            ...                                    # fill staged.tree_fd
            layer = staged.publish(manifest=Manifest.build(staged.tree_fd), author="me")
        store.put_image(ImageRecord(name="site:1", layers=(layer.id, *base.layers), created=now()))

Failures that a person can mend are `UserError` with one sentence.
"""

from collections.abc import Iterator
from typing import Self

from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers, StagedLayer
from overlayfs.store.place import Place
from overlayfs.store.records import ImageRecord


class LayerStore:
    """One open store; `create` makes an empty one where there is none. Opening does not look at the layers."""

    def __init__(self, path: bytes, create: bool = True) -> None:
        self.place = Place(path, create)
        self._layers = Layers(self.place)
        self._images = Images(self.place, self._layers)

    @property
    def path(self) -> bytes:
        """The directory of the store, absolute."""
        return self.place.path

    def close(self) -> None:
        """Let go of the layers that are kept, and of the descriptors."""
        self._layers.close()
        self.place.close()

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
