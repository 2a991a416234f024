"""Small stores and layers for the tests."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overlayfs.store.layers import Layer
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore


def open_store(place: Path, create: bool = True) -> LayerStore:
    """Open the store in the test's directory."""
    return LayerStore(os.fsencode(place / "store"), create)


def fill(tree: bytes, files: Mapping[str, str]) -> None:
    """Write files by their paths."""
    for path, text in files.items():
        target = Path(os.fsdecode(tree)) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        os.utime(target, ns=(0, 0))
    for directory, _, _ in os.walk(tree):
        os.utime(directory, ns=(0, 0))


def add_layer(store: LayerStore, files: Mapping[str, str], hashed: bool = True, **words: Any) -> Layer:
    """Publish a layer of some files."""
    with store.layers.stage() as staged:
        fill(staged.tree_path, files)
        if not hashed:
            return staged.publish(manifest=None, **words)
        with Manifest.build(staged.tree_fd) as manifest:
            return staged.publish(manifest=manifest, **words)


def add_image(store: LayerStore, name: str, *contents: Mapping[str, str]) -> ImageRecord:
    """Make an image of layers, the last one on top."""
    layers = [add_layer(store, files) for files in contents]
    return store.images.put(ImageRecord(name=name, layers=tuple(layer.id for layer in reversed(layers)), created=now()))


def finish(store: LayerStore, layer: Layer) -> Layer:
    """Hash a layer."""
    fd = layer.tree_fd()
    try:
        with Manifest.build(fd) as manifest:
            return store.complete_layer(layer, manifest)
    finally:
        os.close(fd)


def there(place: Path) -> dict[str, list[str]]:
    """Return the names in each subdirectory of the store."""
    return {room.name: sorted(os.listdir(room)) for room in sorted((place / "store").iterdir()) if room.is_dir()}
