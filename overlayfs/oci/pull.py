"""Pulling an image from a registry into the store."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import blob_info_cache, credentials, download, image, image_spec, platforms, staging
from overlayfs.oci.blobs import Notice, ignore_notice, read_blob
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.image_spec import Descriptor, HistoryEntry, ImageConfig, Manifest, Platform
from overlayfs.oci.reference import Reference
from overlayfs.oci.registry import FetchedManifest, Repository
from overlayfs.oci.tar_entry import ArchiveError
from overlayfs.oci.transfer import LayerProgress, ProgressCallback, Transfer, disk_errors, ignore_progress, run_all
from overlayfs.store import layout
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore

CONFIGS = (image_spec.OCI_CONFIG, image_spec.DOCKER_CONFIG)
MAX_INDEXES = 2  # on the way to a manifest: image-index.md lets an index point to another one


class PulledLayer(NamedTuple):
    """One layer of a pulled image: its blob, its diff ID, its id in the store, and whether it was downloaded."""

    digest: str
    size: int
    diff_id: str
    layer: str
    downloaded: bool


class Pulled(NamedTuple):
    """A pulled image; `digest` is that of its manifest, `layers` are the LOWEST first."""

    image: ImageRecord
    digest: str
    layers: tuple[PulledLayer, ...]


def pull(
    store: LayerStore,
    reference: Reference,
    *,
    name: str,
    client: HttpClient,
    platform: Platform | None = None,
    find: Callable[[Reference], Credential | None] = credentials.find,
    progress: ProgressCallback = ignore_progress,
    notice: Notice = ignore_notice,
) -> Pulled:
    """Pull an image and store it as `name`; layers that the store has are not downloaded. Raises `UserError`.

    `platform` defaults to the host's. The image gets its name when everything is there and verified. What an
    interrupted pull has downloaded is used by the next one. `find` is called when the registry asks for a login,
    `progress(LayerProgress)` periodically from several threads, and `notice(sentence)` for each kind of thing that the
    store cannot keep.
    """
    layout.image_name(name)  # an invalid name is refused before anything is downloaded
    repository = Repository(client, reference, functools.partial(find, reference))
    transfer = Transfer(store, repository, reference, client, progress, notice)
    fetched, manifest = _fetch_manifest(transfer, platform)
    config_data, config = _fetch_config(transfer, manifest, platform)
    if platform is None and config.architecture and not platforms.matches(platforms.host(), config.platform):
        notice(f"{reference} is for {config.platform}; this machine is {platforms.host()}")
    with disk_errors(store):
        layers = _pull_layers(transfer, manifest, config)
    stored = [layer for layer, _ in layers]
    record = store.images.put(image.image_record(name, config, stored, manifest.annotations))
    pulled = tuple(
        PulledLayer(blob.digest, blob.size, diff_id, layer.id, downloaded)
        for blob, diff_id, (layer, downloaded) in zip(manifest.layers, config.rootfs.diff_ids, layers, strict=True)
    )
    for blob, each in zip(manifest.layers, pulled, strict=True):
        blob_info_cache.note_blob(store, each.layer, blob, each.diff_id, reference.name)
    if len(record.layers) == len(manifest.layers):
        blob_info_cache.note_original(store, record, fetched.media_type, fetched.data, config_data)
    return Pulled(record, fetched.digest, pulled)


# --- documents -----------------------------------------------------------------------------------------------


def _fetch_manifest(transfer: Transfer, platform: Platform | None) -> tuple[FetchedManifest, Manifest]:
    """Return the manifest of the reference; of an index, the one for the platform."""
    what = str(transfer.reference)
    fetched = transfer.repository.manifest(transfer.reference.target)
    for _ in range(MAX_INDEXES + 1):
        found = image_spec.decode_manifest(fetched.data, fetched.media_type, what)
        if isinstance(found, Manifest):
            return fetched, found
        fetched = transfer.repository.manifest(image.choose(found.manifests, platform, what).digest)
    raise UserError(f"{what} is an index of indexes of indexes; name the image in it by its digest")


def _fetch_config(transfer: Transfer, manifest: Manifest, platform: Platform | None) -> tuple[bytes, ImageConfig]:
    what = str(transfer.reference)
    if manifest.config.media_type not in CONFIGS:
        raise UserError(f"{what} is not a container image but {manifest.config.media_type[:120]!r}")
    unknown = next((each.media_type for each in manifest.layers if each.media_type not in image_spec.LAYERS), None)
    if unknown is not None:
        raise UserError(f"{what} has a layer of the unknown type {unknown[:120]!r}")
    data = transfer.repository.document(manifest.config, "the configuration")
    config = image.parse_config(data, f"the configuration of {what}")
    image.require_platform(config, platform, what)
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise UserError(
            f"{what} is damaged: its manifest has {len(manifest.layers)} layers, "
            f"its configuration {len(config.rootfs.diff_ids)}"
        )
    return data, config


# --- layers --------------------------------------------------------------------------------------------------


def _pull_layers(transfer: Transfer, manifest: Manifest, config: ImageConfig) -> list[tuple[Layer, bool]]:
    """Return the layers, LOWEST first, and whether each was downloaded; a layer that occurs twice is pulled once."""
    diff_ids = config.rootfs.diff_ids
    wanted = dict(zip(diff_ids, zip(manifest.layers, _layer_history(config), strict=True), strict=False))
    jobs = [functools.partial(_pull_layer, transfer, blob, diff_id, step) for diff_id, (blob, step) in wanted.items()]
    found = dict(zip(wanted, run_all(transfer.client, jobs), strict=True))
    return [found[diff_id] for diff_id in diff_ids]


def _pull_layer(transfer: Transfer, blob: Descriptor, diff_id: str, step: HistoryEntry) -> tuple[Layer, bool]:
    layer = _stored_layer(transfer.store, diff_id)
    downloaded = layer is None
    if layer is None:
        layer = _download_layer(transfer, blob, diff_id, step)
    transfer.progress(LayerProgress(blob.digest, "downloaded" if downloaded else "already here", blob.size, blob.size))
    return layer, downloaded


def _stored_layer(store: LayerStore, diff_id: str) -> Layer | None:
    """Return the layer that the store has for a diff ID.

    One with redirects or metacopies does not count: its content depends on the layers below, which may be others here.
    """
    layer = store.layers.by_diff_id(diff_id)
    return None if layer is None or layer.record.flags else layer


def _download_layer(transfer: Transfer, blob: Descriptor, diff_id: str, step: HistoryEntry) -> Layer:
    """Download a blob and make a layer of it; if another pull is doing so, wait and use its layer."""

    def progress(doing: str, done: int) -> None:
        transfer.progress(LayerProgress(blob.digest, doing, done, blob.size))

    retry = transfer.client.retry
    progress("waiting", 0)
    with staging.incoming(transfer.store.directory, blob.digest, retry.sleep) as file:
        layer = _stored_layer(transfer.store, diff_id)
        if layer is None:
            download.fetch(transfer.repository, blob, file.fd, retry, functools.partial(progress, "downloading"))
            source = _file_reader(file.fd, transfer.client, functools.partial(progress, "unpacking"))
            try:
                layer = read_blob(
                    transfer.store, source, descriptor=blob, diff_id=diff_id,
                    author=step.author, message=step.comment or step.created_by, created=step.created or None,
                    what=f"layer {blob.digest} of {transfer.reference}", notice=transfer.notice,
                )  # fmt: skip
            except ArchiveError:
                file.discard()  # downloading it again would give the same bytes
                raise
        file.discard()
    return layer


def _file_reader(fd: int, client: HttpClient, progress: Callable[[int], None]) -> Callable[[int], bytes]:
    """Return a function that reads a file from its beginning; `progress(bytes)` is called for each piece."""
    done = 0

    def read(size: int) -> bytes:
        nonlocal done
        client.retry.raise_if_cancelled()
        data = sysio.read_at(fd, done, size)
        done += len(data)
        progress(done)
        return data

    return read


def _layer_history(config: ImageConfig) -> Sequence[HistoryEntry]:
    """Return the history entry of each layer, LOWEST first; empty ones if the history counts other layers."""
    filled = [each for each in config.history or () if not each.empty_layer]
    count = len(config.rootfs.diff_ids)
    return filled if len(filled) == count else [HistoryEntry()] * count
