"""An image out of a registry into the store."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import blob_info_cache, credentials, download, image, image_spec, platforms, staging
from overlayfs.oci.blobs import Notice, ignore, read_blob
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.image_spec import Descriptor, HistoryEntry, ImageConfig, Manifest, Platform
from overlayfs.oci.reference import Reference
from overlayfs.oci.registry import FetchedManifest, Repository
from overlayfs.oci.tar_entry import ArchiveError
from overlayfs.oci.transfer import LayerProgress, ProgressCallback, disk_failures, ignore_progress, run_all
from overlayfs.store import layout
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore

CONFIGS = (image_spec.OCI_CONFIG, image_spec.DOCKER_CONFIG)
DEEPEST = 2  # indexes on the way to a manifest; the specification allows one to point to another


class PulledLayer(NamedTuple):
    """One layer of a pulled image: its blob, its content, its id in the store, and whether it had to be downloaded."""

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
    notice: Notice = ignore,
) -> Pulled:
    """Make the image behind a reference the image `name` of the store; layers that are there are not loaded again.

    `platform` is the host's if left out. Nothing is named before everything is there and checked; what was loaded of
    an interrupted pull is used by the next one. Raises `UserError`.
    """
    layout.image_name(name)  # a name that cannot be is told before anything is loaded
    repository = Repository(client, reference, functools.partial(find, reference))
    fetched, manifest = _manifest(repository, reference, platform)
    config_data, config = _config(repository, reference, manifest, platform)
    if platform is None and config.architecture and not platforms.matches(platforms.host(), config.platform):
        notice(f"{reference} is for {config.platform}; this machine is {platforms.host()}")
    loader = _Puller(store, repository, reference, client, progress, notice)
    with disk_failures(store):
        layers = loader.load(manifest, config)
    stored = [layer for layer, _ in layers]
    record = store.put_image(image.image_record(name, config, stored, manifest.annotations))
    pulled = tuple(
        PulledLayer(blob.digest, blob.size, diff_id, layer.id, downloaded)
        for blob, diff_id, (layer, downloaded) in zip(manifest.layers, config.rootfs.diff_ids, layers, strict=True)
    )
    _remember(store, reference, manifest, pulled)
    if len(record.layers) == len(manifest.layers):
        blob_info_cache.note_original(store, record, fetched.media_type, fetched.data, config_data)
    return Pulled(record, fetched.digest, pulled)


def _remember(store: LayerStore, reference: Reference, manifest: Manifest, pulled: Sequence[PulledLayer]) -> None:
    for blob, each in zip(manifest.layers, pulled, strict=True):
        blob_info_cache.note_blob(store, each.layer, blob, each.diff_id, reference.name)


# --- documents -----------------------------------------------------------------------------------------------


def _manifest(
    repository: Repository, reference: Reference, platform: Platform | None
) -> tuple[FetchedManifest, Manifest]:
    """Ask for the reference, and where several images are behind it for the one that fits."""
    what = str(reference)
    fetched = repository.manifest(reference.target)
    for _ in range(DEEPEST + 1):
        found = image_spec.decode_manifest(fetched.data, fetched.media_type, what)
        if isinstance(found, Manifest):
            return fetched, found
        fetched = repository.manifest(image.choose(found.manifests, platform, what).digest)
    raise UserError(f"{what} is an index of indexes of indexes; name what you mean by its digest")


def _config(
    repository: Repository, reference: Reference, manifest: Manifest, platform: Platform | None
) -> tuple[bytes, ImageConfig]:
    what = str(reference)
    if manifest.config.media_type not in CONFIGS:
        raise UserError(f"{what} is no image for containers but {manifest.config.media_type[:120]!r}")
    strange = next((each.media_type for each in manifest.layers if each.media_type not in image_spec.LAYERS), None)
    if strange is not None:
        raise UserError(f"{what} has a layer of the unknown type {strange[:120]!r}")
    data = repository.document(manifest.config, "the configuration")
    config = image.parse_config(data, f"the configuration of {what}")
    image.require_platform(config, platform, what)
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise UserError(
            f"{what} is damaged: its manifest has {len(manifest.layers)} layers, "
            f"its configuration {len(config.rootfs.diff_ids)}"
        )
    return data, config


# --- layers --------------------------------------------------------------------------------------------------


class _Puller:
    """Brings the layers of one image into the store."""

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

    def load(self, manifest: Manifest, config: ImageConfig) -> list[tuple[Layer, bool]]:
        """Return the layers, LOWEST first, and whether each had to be loaded; one that comes twice is loaded once."""
        diff_ids = config.rootfs.diff_ids
        wanted = dict(zip(diff_ids, zip(manifest.layers, _steps(config), strict=True), strict=False))
        jobs = [functools.partial(self._layer, blob, diff_id, step) for diff_id, (blob, step) in wanted.items()]
        found = dict(zip(wanted, run_all(self._client, jobs), strict=True))
        return [found[diff_id] for diff_id in diff_ids]

    def _layer(self, blob: Descriptor, diff_id: str, step: HistoryEntry) -> tuple[Layer, bool]:
        layer = self._present(diff_id)
        downloaded = layer is None
        if layer is None:
            layer = self._loaded(blob, diff_id, step)
        self._progress(LayerProgress(blob.digest, "loaded" if downloaded else "already here", blob.size, blob.size))
        return layer, downloaded

    def _present(self, diff_id: str) -> Layer | None:
        """A layer whose marks count on layers below is another layer over others."""
        layer = self._store.by_diff_id(diff_id)
        return None if layer is None or layer.record.flags else layer

    def _loaded(self, blob: Descriptor, diff_id: str, step: HistoryEntry) -> Layer:
        """Load a blob and make it a layer. Waits while another pull does just that, and then takes its layer."""
        self._tell(blob, "waiting", 0)
        with staging.incoming(self._store.directory, blob.digest, self._client.retry.rest) as file:
            layer = self._present(diff_id)
            if layer is None:
                report = functools.partial(self._tell, blob, "loading")
                download.fetch(self._repository, blob, file.fd, self._client.retry, report)
                layer = self._unpacked(file, blob, diff_id, step)
            file.discard()
        return layer

    def _unpacked(self, file: staging.StagedBlob, blob: Descriptor, diff_id: str, step: HistoryEntry) -> Layer:
        try:
            return read_blob(
                self._store, self._reader(file.fd, blob), descriptor=blob, diff_id=diff_id,
                author=step.author, message=step.comment or step.created_by, created=step.created or None,
                what=f"layer {blob.digest} of {self._reference}", notice=self._notice,
            )  # fmt: skip
        except ArchiveError:
            file.discard()  # loading it again gives the same
            raise

    def _reader(self, fd: int, blob: Descriptor) -> Callable[[int], bytes]:
        done = 0

        def read(size: int) -> bytes:
            nonlocal done
            self._client.retry.check()
            data = sysio.read_at(fd, done, size)
            done += len(data)
            self._tell(blob, "unpacking", done)
            return data

        return read

    def _tell(self, blob: Descriptor, doing: str, done: int) -> None:
        self._progress(LayerProgress(blob.digest, doing, done, blob.size))


def _steps(config: ImageConfig) -> Sequence[HistoryEntry]:
    """Return what the history says of each layer, LOWEST first; of nothing, if it does not count the same layers."""
    filled = [each for each in config.history or () if not each.empty_layer]
    count = len(config.rootfs.diff_ids)
    return filled if len(filled) == count else [HistoryEntry()] * count
