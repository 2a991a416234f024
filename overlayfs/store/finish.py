"""The end of hashing: a layer that was adopted gets its manifest, and its equal, if there is one, takes its place."""

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store.images import Images
from overlayfs.store.layers import Layer, Layers, Summary, layer_path, write_manifest
from overlayfs.store.records import LayerRecord


def finish(layers: Layers, images: Images, layer_id: str, manifest: Summary, flags: tuple[str, ...] | None) -> Layer:
    """Make a layer complete; `flags` None means those of the manifest. Returns the layer that images use from now on.

    Images come first, the record last: a crash between leaves a layer that is hashed again.
    """
    with layers.publishing():
        layer = layers.get(layer_id)
        if layer is None:
            raise UserError(f"layer {layer_id} is not in the store any more")
        if layer.record.state == "complete":
            return layer
        record = _complete(layer.record, manifest, manifest.flags if flags is None else flags)
        same = layers.equal(manifest.digest, record.below)
        if same is not None:
            images.replace_layer(layer_id, same.id)
            record = msgspec.structs.replace(record, same_as=same.id)
        _write_manifest(layers, layer_id, manifest)
        finished = layers.write_record(record)
        return finished if same is None else same


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


def _write_manifest(layers: Layers, layer_id: str, manifest: Summary) -> None:
    directory = layers.place.open(layer_path(layer_id))
    try:
        write_manifest(directory, manifest)
    finally:
        sysio.close(directory)
