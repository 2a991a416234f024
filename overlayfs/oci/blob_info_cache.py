"""The blobs that a layer is known as in registries, so that a push neither compresses nor sends them again.

    STORE/layers/ID/remote      JSON: `LayerBlobs`

It is removed with its layer. It is a cache: it may be outdated, missing or damaged, and a registry is asked before
anything relies on it. containers/image calls the same thing its blob info cache.
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

MAX_ENTRIES = 16  # repositories of a blob, blobs of a layer, images with it on top: the newest are kept


class KnownBlob(msgspec.Struct, frozen=True):
    """A blob with the content of the layer, and the repositories (REGISTRY/REPO) it was seen in, the latest first.

    Its `diff_id` may differ from that of the tar that we write for the layer: different tars make equal trees.
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
        """Return the descriptor for a manifest."""
        return Descriptor(self.media_type, self.digest, self.size)


class OriginalManifest(msgspec.Struct, frozen=True):
    """The manifest and configuration with which an image was pulled; `key` identifies the image (`image_key`)."""

    key: str
    media_type: str
    manifest: bytes
    config: bytes


class LayerBlobs(msgspec.Struct, frozen=True):
    """What the cache has for one layer; `originals` are those of images whose top layer it is."""

    blobs: tuple[KnownBlob, ...] = ()
    originals: tuple[OriginalManifest, ...] = ()


def read(store: LayerStore, layer_id: str) -> LayerBlobs:
    """Return what the cache has for a layer; an empty value if it cannot be read."""
    with contextlib.suppress(OSError, UserError, msgspec.MsgspecError, UnicodeDecodeError):
        data = store.directory.read(layer_path(layer_id), layout.REMOTE)
        if records.has_valid_checksum(data):
            return msgspec.json.decode(data, type=LayerBlobs)
    return LayerBlobs()


def note_blob(store: LayerStore, layer_id: str, blob: Descriptor, diff_id: str, place: str) -> None:
    """Record that a repository (REGISTRY/REPO) has a layer as this blob."""
    known = read(store, layer_id)
    same = next((each for each in known.blobs if each.digest == blob.digest), None)
    places = dict.fromkeys((place, *(same.places if same else ())))
    newest = KnownBlob(blob.digest, blob.size, blob.media_type, diff_id, tuple(places)[:MAX_ENTRIES])
    others = (each for each in known.blobs if each.digest != blob.digest)
    _write(store, layer_id, LayerBlobs((newest, *others)[:MAX_ENTRIES], known.originals))


def note_original(store: LayerStore, record: ImageRecord, media_type: str, manifest: bytes, config: bytes) -> None:
    """Record the manifest with which an image was pulled; nothing for an image without layers."""
    if not record.layers:
        return
    known = read(store, record.layers[0])
    newest = OriginalManifest(image_key(record), media_type, manifest, config)
    others = (each for each in known.originals if each.key != newest.key)
    _write(store, record.layers[0], LayerBlobs(known.blobs, (newest, *others)[:MAX_ENTRIES]))


def original_of(store: LayerStore, record: ImageRecord) -> OriginalManifest | None:
    """Return the manifest with which an image was pulled, if it has not changed since, whatever its name is."""
    if not record.layers:
        return None
    key = image_key(record)
    return next((each for each in read(store, record.layers[0]).originals if each.key == key), None)


def image_key(record: ImageRecord) -> str:
    """Return a digest of an image's record without its name."""
    nameless = msgspec.structs.replace(record, name="")
    return hashlib.sha256(msgspec.json.encode(nameless, order="deterministic")).hexdigest()


def _write(store: LayerStore, layer_id: str, known: LayerBlobs) -> None:
    with contextlib.suppress(FileNotFoundError), store.directory.lock_shared():  # the layer was deleted
        directory = store.directory.open(layer_path(layer_id))
        try:
            store.directory.write(directory, layout.REMOTE, records.with_checksum(msgspec.json.encode(known)))
        finally:
            sysio.close(directory)
