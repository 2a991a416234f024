"""What is known about a layer in registries, so that nothing is sent, or compressed, that is there already.

    STORE/layers/ID/remote      JSON: `Remote`

It goes with its layer, and it is a memory, not a truth: it may be old, lost or damaged, and a registry is asked before
anything is built on it.
"""

import contextlib
import hashlib

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci.image_spec import Descriptor, check_digest
from overlayfs.store import layout, records
from overlayfs.store.layers import layer_path
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore

MOST = 16  # places of a blob, blobs of a layer, images that end with it: the newest are kept


class KnownBlob(msgspec.Struct, frozen=True):
    """A blob with the content of the layer, and the repositories (REGISTRY/REPO) it was seen in, the last one first.

    Its `diff_id` need not be that of our own tar of the layer: equal trees come out of different tars.
    """

    digest: str
    size: int
    media_type: str
    diff_id: str
    places: tuple[str, ...]

    def __post_init__(self) -> None:
        check_digest(self.digest)
        check_digest(self.diff_id)

    def descriptor(self) -> Descriptor:
        """Return the descriptor by which a manifest points to it."""
        return Descriptor(self.media_type, self.digest, self.size)


class OriginalManifest(msgspec.Struct, frozen=True):
    """Manifest and configuration of an image as they came; `key` tells whether the image is still the same."""

    key: str
    media_type: str
    manifest: bytes
    config: bytes


class LayerBlobs(msgspec.Struct, frozen=True):
    """All that is remembered with one layer; `originals` are of images whose top layer it is."""

    blobs: tuple[KnownBlob, ...] = ()
    originals: tuple[OriginalManifest, ...] = ()


def read(store: LayerStore, layer_id: str) -> LayerBlobs:
    """Return what is remembered with a layer; nothing if that cannot be read."""
    with contextlib.suppress(OSError, UserError, msgspec.MsgspecError, UnicodeDecodeError):
        data = store.directory.read(layer_path(layer_id), layout.REMOTE)
        if records.has_valid_checksum(data):
            return msgspec.json.decode(data, type=LayerBlobs)
    return LayerBlobs()


def note_blob(store: LayerStore, layer_id: str, blob: Descriptor, diff_id: str, place: str) -> None:
    """Remember that a repository has a layer as this blob."""
    known = read(store, layer_id)
    same = next((each for each in known.blobs if each.digest == blob.digest), None)
    places = dict.fromkeys((place, *(same.places if same else ())))
    fresh = KnownBlob(blob.digest, blob.size, blob.media_type, diff_id, tuple(places)[:MOST])
    others = (each for each in known.blobs if each.digest != blob.digest)
    _write(store, layer_id, LayerBlobs((fresh, *others)[:MOST], known.originals))


def note_original(store: LayerStore, record: ImageRecord, media_type: str, manifest: bytes, config: bytes) -> None:
    """Remember how an image came; an image without layers is not remembered."""
    if not record.layers:
        return
    known = read(store, record.layers[0])
    fresh = OriginalManifest(image_key(record), media_type, manifest, config)
    others = (each for each in known.originals if each.key != fresh.key)
    _write(store, record.layers[0], LayerBlobs(known.blobs, (fresh, *others)[:MOST]))


def original_of(store: LayerStore, record: ImageRecord) -> OriginalManifest | None:
    """Return how an image came, if it did and is still what it was then, under whatever name."""
    if not record.layers:
        return None
    key = image_key(record)
    return next((each for each in read(store, record.layers[0]).originals if each.key == key), None)


def image_key(record: ImageRecord) -> str:
    """Return a digest of all that makes an image, its name left out."""
    nameless = msgspec.structs.replace(record, name="")
    return hashlib.sha256(msgspec.json.encode(nameless, order="deterministic")).hexdigest()


def _write(store: LayerStore, layer_id: str, known: LayerBlobs) -> None:
    with contextlib.suppress(FileNotFoundError), store.directory.lock_shared():  # gone already: nothing to remember
        directory = store.directory.open(layer_path(layer_id))
        try:
            store.directory.write(directory, layout.REMOTE, records.with_checksum(msgspec.json.encode(known)))
        finally:
            sysio.close(directory)
