"""Pushing an image of the store to a registry.

A blob that is in the registry already is not sent, or even compressed: the registry is asked first for the blobs that a
layer is known as (`overlayfs.oci.blob_info_cache`), in the repository itself and then in others of the same registry.

The manifest depends only on the image: the same layers and configuration give the same manifest on every machine. An
image that was pulled and has not changed keeps the manifest it was pulled with, and so its digest, as long as its
layers are the blobs that this manifest names. Where the registry lacks those blobs, and our own compression gives
other bytes, a new manifest names the new blobs.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UsageError
from overlayfs.oci import blob_info_cache, credentials, image, image_spec, staging
from overlayfs.oci.blob_info_cache import KnownBlob, OriginalManifest
from overlayfs.oci.blobs import Notice, ignore_notice, write_blob
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.image_spec import Descriptor, Manifest, digest_of
from overlayfs.oci.reference import DEFAULT_TAG, Reference
from overlayfs.oci.registry import BlobSource, Repository
from overlayfs.oci.transfer import (
    LayerProgress,
    ProgressCallback,
    Transfer,
    disk_errors,
    file_pieces,
    ignore_progress,
    run_all,
)
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore

MAX_MOUNT_ATTEMPTS = 3  # other repositories that one blob is mounted from


class PushedLayer(NamedTuple):
    """One layer of a pushed image, and how its blob got there: "uploaded", "mounted" or "present"."""

    layer: str
    digest: str
    size: int
    how: str


class Pushed(NamedTuple):
    """A pushed image; `digest` is that of its manifest, `layers` are the LOWEST first.

    same: whether the image was pushed with the manifest it was pulled with; None for an image that was not pulled, or
    has changed since.
    """

    digest: str
    same: bool | None
    layers: tuple[PushedLayer, ...]


class _Documents(NamedTuple):
    """A manifest with its media type, and the configuration that it names, ready to be uploaded."""

    media_type: str
    manifest: bytes
    config: bytes


def push(
    store: LayerStore,
    name: str,
    reference: Reference,
    *,
    client: HttpClient,
    find: Callable[[Reference], Credential | None] = credentials.find,
    progress: ProgressCallback = ignore_progress,
    notice: Notice = ignore_notice,
) -> Pushed:
    """Push the image `name` of the store to a reference with a tag. Raises `UserError`.

    `find` is called when the registry asks for a login, `progress(LayerProgress)` periodically from several threads,
    and `notice(sentence)` for each kind of thing that a layer's tar cannot keep.
    """
    if reference.digest is not None:
        raise UsageError(f"{reference}: push to a tag; the digest follows from the content")
    record = store.images.find(name)
    repository = Repository(client, reference, functools.partial(find, reference), push=True)
    transfer = Transfer(store, repository, reference, client, progress, notice)
    with ExitStack() as held:
        layers = [store.layers.find(each) for each in reversed(record.layers)]  # lowest first
        for layer in layers:
            held.enter_context(layer.hold())
        original = _original_manifest(store, record)
        with disk_errors(store):
            sent = _send_layers(transfer, layers, original)
        documents = _documents(record, [blob for blob, _ in sent], original)
        _put_documents(transfer, documents)
    pushed = [
        PushedLayer(layer.id, blob.digest, blob.size, how) for layer, (blob, how) in zip(layers, sent, strict=True)
    ]
    same = None if original is None else documents.manifest == original.manifest
    return Pushed(digest_of(documents.manifest), same, tuple(pushed))


# --- documents -----------------------------------------------------------------------------------------------


def _original_manifest(store: LayerStore, record: ImageRecord) -> OriginalManifest | None:
    found = blob_info_cache.original_of(store, record)
    return None if found is None or len(_layers_of(found)) != len(record.layers) else found


def _layers_of(original: OriginalManifest) -> Sequence[Descriptor]:
    found = image_spec.decode_manifest(original.manifest, original.media_type, "the manifest of the image")
    return found.layers if isinstance(found, Manifest) else ()


def _documents(record: ImageRecord, blobs: Sequence[KnownBlob], original: OriginalManifest | None) -> _Documents:
    """Return the manifest that the image was pulled with if it names these blobs, else a new one."""
    if original is not None and [each.digest for each in _layers_of(original)] == [each.digest for each in blobs]:
        return _Documents(original.media_type, original.manifest, original.config)
    config = image_spec.encode(image.config_of(record, [each.diff_id for each in blobs]))
    manifest = Manifest(
        2,
        Descriptor(image_spec.OCI_CONFIG, digest_of(config), len(config)),
        tuple(Descriptor(_oci_type(each.media_type), each.digest, each.size) for each in blobs),
        image_spec.OCI_MANIFEST,
        image_spec.annotations_of(record.annotations),
    )
    return _Documents(image_spec.OCI_MANIFEST, image_spec.encode(manifest), config)


def _oci_type(media_type: str) -> str:
    """Return the OCI media type for a blob that may be known by Docker's, which an OCI manifest does not use."""
    if media_type.endswith("gzip"):
        return image_spec.OCI_LAYER_GZIP
    return image_spec.OCI_LAYER_ZSTD if media_type.endswith("zstd") else image_spec.OCI_LAYER


def _put_documents(transfer: Transfer, documents: _Documents) -> None:
    """Upload the configuration, and then the manifest under its tag, which makes the image visible."""
    repository, config = transfer.repository, documents.config
    digest = digest_of(config)
    if not repository.has_blob(digest):
        repository.upload(BlobSource(digest, len(config), lambda: iter((config,))))
    repository.put_manifest(transfer.reference.tag or DEFAULT_TAG, documents.media_type, documents.manifest)


# --- layers --------------------------------------------------------------------------------------------------


def _send_layers(
    transfer: Transfer, layers: Sequence[Layer], original: OriginalManifest | None
) -> list[tuple[KnownBlob, str]]:
    """Return the blob of each layer, and how it got there; a layer that occurs twice is sent once."""
    wanted = [each.digest for each in _layers_of(original)] if original else [""] * len(layers)
    unique = {layer.id: (layer, digest) for layer, digest in zip(layers, wanted, strict=True)}
    jobs = [functools.partial(_send_layer, transfer, layer, digest) for layer, digest in unique.values()]
    found = dict(zip(unique, run_all(transfer.client, jobs), strict=True))
    return [found[layer.id] for layer in layers]


def _send_layer(transfer: Transfer, layer: Layer, preferred: str) -> tuple[KnownBlob, str]:
    blob, how = _find_blob(transfer, layer, preferred) or _make_blob(transfer, layer)
    blob_info_cache.note_blob(transfer.store, layer.id, blob.descriptor(), blob.diff_id, transfer.reference.name)
    transfer.progress(LayerProgress(layer.id, how, blob.size, blob.size))
    return blob, how


def _find_blob(transfer: Transfer, layer: Layer, preferred: str) -> tuple[KnownBlob, str] | None:
    """Look in the registry for a blob that the layer is known as.

    The preferred blob comes first, then those that were seen in this repository.
    """
    transfer.progress(LayerProgress(layer.id, "looking"))
    known = blob_info_cache.read(transfer.store, layer.id).blobs
    here = transfer.reference.name
    for blob in sorted(known, key=lambda each: (each.digest != preferred, here not in each.places)):
        if transfer.repository.has_blob(blob.digest):
            return blob, "present"
        if any(transfer.repository.mount_blob(blob.digest, other) for other in _others(transfer.reference, blob)):
            return blob, "mounted"
    return None


def _others(reference: Reference, blob: KnownBlob) -> Sequence[str]:
    """Return other repositories of the same registry in which the blob was seen."""
    start = f"{reference.registry}/"
    places = (place.removeprefix(start) for place in blob.places if place.startswith(start))
    return [place for place in places if place != reference.repository][:MAX_MOUNT_ATTEMPTS]


def _make_blob(transfer: Transfer, layer: Layer) -> tuple[KnownBlob, str]:
    """Compress a layer to a file and upload it: the request names its digest, and it may have to be sent twice."""
    with staging.outgoing(transfer.store.directory, layer.id, transfer.client.retry.sleep) as file:
        sysio.truncate_fd(file.fd, 0)
        made = write_blob(
            transfer.store, layer, _file_writer(file.fd, transfer.client),
            progress=lambda done: transfer.progress(LayerProgress(layer.id, "compressing", done)),
            notice=transfer.notice,
        )  # fmt: skip
        how = _upload_file(transfer, layer, file.fd, made.digest, made.size)
        file.discard()
    return KnownBlob(made.digest, made.size, made.media_type, made.diff_id, ()), how


def _upload_file(transfer: Transfer, layer: Layer, fd: int, digest: str, size: int) -> str:
    if transfer.repository.has_blob(digest):
        return "present"

    def progress(done: int) -> None:
        transfer.progress(LayerProgress(layer.id, "uploading", done, size))

    retry = transfer.client.retry
    transfer.repository.upload(BlobSource(digest, size, lambda: file_pieces(fd, size, retry, progress)))
    return "uploaded"


def _file_writer(fd: int, client: HttpClient) -> Callable[[bytes], object]:
    """Return a function that appends to a file."""
    done = 0

    def write(data: bytes) -> None:
        nonlocal done
        client.retry.raise_if_cancelled()
        done += sysio.write_at(fd, done, data)

    return write
