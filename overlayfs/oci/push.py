"""An image out of the store into a registry.

Nothing is sent, or even compressed, that is there already: the blobs that a layer is known as (`remote`) are asked for
first, in the repository itself, then in others of the same registry.

What is sent depends on the image alone: the same layers and configuration give the same manifest, whoever pushes it
and when. An image that was pulled and has not changed keeps the manifest it came with, and so its digest, as long as
its blobs are those that the manifest names. Where the registry lacks them and our own compression gives other bytes,
the manifest is our own, with our blobs in it: it says nothing that is not so.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UsageError
from overlayfs.oci import blob_info_cache, credentials, image, image_spec, staging
from overlayfs.oci.blob_info_cache import KnownBlob, OriginalManifest
from overlayfs.oci.blobs import Notice, ignore, write_blob
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.image_spec import Descriptor, Manifest
from overlayfs.oci.reference import DEFAULT_TAG, Reference
from overlayfs.oci.registry import BlobSource, Repository, sha256
from overlayfs.oci.transfer import LayerProgress, ProgressCallback, disk_failures, ignore_progress, pieces_of, run_all
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore

MOUNTS = 3  # other repositories that are asked for one blob


class PushedLayer(NamedTuple):
    """One layer of a pushed image, and how its blob got there: "uploaded", "mounted" or "present"."""

    layer: str
    digest: str
    size: int
    how: str


class Pushed(NamedTuple):
    """A pushed image; `digest` is that of its manifest.

    `same`: whether it is the manifest that the image was pulled with; None for an image that is not as it was pulled.
    """

    digest: str
    same: bool | None
    layers: tuple[PushedLayer, ...]


class _Document(NamedTuple):
    """A manifest, ready to be put, and its configuration."""

    media_type: str
    data: bytes
    config: bytes


def push(
    store: LayerStore,
    name: str,
    reference: Reference,
    *,
    client: HttpClient,
    find: Callable[[Reference], Credential | None] = credentials.find,
    progress: ProgressCallback = ignore_progress,
    notice: Notice = ignore,
) -> Pushed:
    """Make the image `name` of the store the image behind a reference with a tag. Raises `UserError`."""
    if reference.digest is not None:
        raise UsageError(f"{reference}: an image is pushed to a tag; its digest follows from what is in it")
    record = store.image(name)
    repository = Repository(client, reference, functools.partial(find, reference), push=True)
    with ExitStack() as held:
        layers = [store.layer(each) for each in reversed(record.layers)]  # lowest first
        for layer in layers:
            held.enter_context(layer.hold())
        original = _original(store, record)
        sender = _Pusher(store, repository, reference, client, progress, notice)
        with disk_failures(store):
            sent = sender.send(layers, original)
        document = _document(record, [blob for blob, _ in sent], original)
        same = None if original is None else document.data == original.manifest
        sender.put(document)
    pushed = [
        PushedLayer(layer.id, blob.digest, blob.size, how) for layer, (blob, how) in zip(layers, sent, strict=True)
    ]
    return Pushed(sha256(document.data), same, tuple(pushed))


def _original(store: LayerStore, record: ImageRecord) -> OriginalManifest | None:
    found = blob_info_cache.original_of(store, record)
    return None if found is None or len(_blobs_of(found)) != len(record.layers) else found


def _blobs_of(original: OriginalManifest) -> Sequence[Descriptor]:
    found = image_spec.decode_manifest(original.manifest, original.media_type, "the manifest of the image")
    return found.layers if isinstance(found, Manifest) else ()


def _document(record: ImageRecord, blobs: Sequence[KnownBlob], original: OriginalManifest | None) -> _Document:
    """Return the manifest that the image came with if it tells the truth, else our own."""
    if original is not None and [each.digest for each in _blobs_of(original)] == [each.digest for each in blobs]:
        return _Document(original.media_type, original.manifest, original.config)
    config = image_spec.encode(image.config_of(record, [each.diff_id for each in blobs]))
    manifest = Manifest(
        2,
        Descriptor(image_spec.OCI_CONFIG, sha256(config), len(config)),
        tuple(Descriptor(_oci_type(each.media_type), each.digest, each.size) for each in blobs),
        image_spec.OCI_MANIFEST,
        image_spec.annotations_of(record.annotations),
    )
    return _Document(image_spec.OCI_MANIFEST, image_spec.encode(manifest), config)


def _oci_type(media_type: str) -> str:
    """Our manifests are OCI's, where Docker's types do not belong; the blobs are the same."""
    if media_type.endswith("gzip"):
        return image_spec.OCI_LAYER_GZIP
    return image_spec.OCI_LAYER_ZSTD if media_type.endswith("zstd") else image_spec.OCI_LAYER


class _Pusher:
    """Brings the blobs of one image into a repository."""

    def __init__(
        self,
        store: LayerStore,
        repository: Repository,
        reference: Reference,
        client: HttpClient,
        progress: ProgressCallback,
        notice: Notice,
    ) -> None:
        self._store = store
        self._repository = repository
        self._reference = reference
        self._client = client
        self._progress = progress
        self._notice = notice

    def send(self, layers: Sequence[Layer], original: OriginalManifest | None) -> list[tuple[KnownBlob, str]]:
        """Return the blob of each layer, and how it got there; a layer that comes twice is sent once."""
        wanted = [each.digest for each in _blobs_of(original)] if original else [""] * len(layers)
        unique = {layer.id: (layer, digest) for layer, digest in zip(layers, wanted, strict=True)}
        jobs = [functools.partial(self._layer, layer, digest) for layer, digest in unique.values()]
        found = dict(zip(unique, run_all(self._client, jobs), strict=True))
        return [found[layer.id] for layer in layers]

    def _layer(self, layer: Layer, preferred: str) -> tuple[KnownBlob, str]:
        found = self._there(layer, preferred) or self._fresh(layer)
        blob, how = found
        blob_info_cache.note_blob(self._store, layer.id, blob.descriptor(), blob.diff_id, self._reference.name)
        self._progress(LayerProgress(layer.id, how, blob.size, blob.size))
        return found

    def _there(self, layer: Layer, preferred: str) -> tuple[KnownBlob, str] | None:
        """Look for what the layer is known as: the wanted blob first, then those that the repository should have."""
        self._progress(LayerProgress(layer.id, "looking"))
        known = blob_info_cache.read(self._store, layer.id).blobs
        here = self._reference.name
        for blob in sorted(known, key=lambda each: (each.digest != preferred, here not in each.places)):
            if self._repository.has(blob.digest):
                return blob, "present"
            if any(self._repository.mount(blob.digest, other) for other in self._others(blob)):
                return blob, "mounted"
        return None

    def _others(self, blob: KnownBlob) -> Sequence[str]:
        """Return other repositories of this registry that had the blob."""
        start = f"{self._reference.registry}/"
        places = (place.removeprefix(start) for place in blob.places if place.startswith(start))
        return [place for place in places if place != self._reference.repository][:MOUNTS]

    def _fresh(self, layer: Layer) -> tuple[KnownBlob, str]:
        """Compress the layer into a file: its digest must be known to ask for it, and it may have to be sent twice."""
        with staging.outgoing(self._store.directory, layer.id, self._client.retry.rest) as file:
            sysio.truncate_fd(file.fd, 0)
            made = write_blob(
                self._store, layer, _writer(file.fd, self._client),
                progress=lambda done: self._progress(LayerProgress(layer.id, "compressing", done)), notice=self._notice,
            )  # fmt: skip
            how = self._uploaded(layer, file.fd, made.digest, made.size)
            file.discard()
        return KnownBlob(made.digest, made.size, made.media_type, made.diff_id, ()), how

    def _uploaded(self, layer: Layer, fd: int, digest: str, size: int) -> str:
        if self._repository.has(digest):
            return "present"
        report = functools.partial(self._tell, layer, size)
        self._repository.upload(BlobSource(digest, size, lambda: pieces_of(fd, size, self._client.retry, report)))
        return "uploaded"

    def _tell(self, layer: Layer, size: int, done: int) -> None:
        self._progress(LayerProgress(layer.id, "uploading", done, size))

    def put(self, document: _Document) -> None:
        """Put the configuration, and then the manifest under its tag: from then on the image is there."""
        digest = sha256(document.config)
        if not self._repository.has(digest):
            data = document.config
            self._repository.upload(BlobSource(digest, len(data), lambda: iter((data,))))
        self._repository.put_manifest(self._reference.tag or DEFAULT_TAG, document.media_type, document.data)


def _writer(fd: int, client: HttpClient) -> Callable[[bytes], object]:
    done = 0

    def write(data: bytes) -> None:
        nonlocal done
        client.retry.check()
        done += sysio.write_at(fd, done, data)

    return write
