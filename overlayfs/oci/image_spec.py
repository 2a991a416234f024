"""The JSON documents of the OCI image specification: descriptors, manifests, indexes, configurations.

Sources: opencontainers/image-spec v1.1.1 (``descriptor.md``, ``manifest.md``, ``image-index.md``, ``config.md``,
``media-types.md``); distribution ``manifest-v2-2.md`` for the Docker types, which differ only in their media types.
A document is at most `LARGEST_DOCUMENT` bytes. One that is malformed, nested too deeply for msgspec, or a manifest and
an index at once (CVE-2021-41190) is refused with `DocumentError`.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from overlayfs.errors import UserError

LARGEST_DOCUMENT = 4 << 20
"""The limit that registries should have for a manifest: distribution-spec, "Pushing Manifests"."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_INDEX)
_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
LAYERS = frozenset(
    base + ending
    for base in (OCI_LAYER, _FOREIGN, _DOCKER_LAYER, "application/vnd.docker.image.rootfs.foreign.diff.tar")
    for ending in ("", "+gzip", "+zstd", ".gzip", ".zstd")
)
"""Media types of layers. The compression is detected from the first bytes, because engines write the wrong suffix."""

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
"""The annotation in which containerd, BuildKit and podman keep the full name; `REF_NAME` is only the tag."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class DocumentError(UserError):
    """A manifest, an index or a configuration cannot be used; `str()` says what is wrong with it."""


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an image runs on, as GOOS and GOARCH: ``linux``, ``amd64``."""

    architecture: str = ""
    os: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))[:80]  # for messages


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """A reference to a blob: its media type, its sha256 digest, its size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str = ""

    def __post_init__(self) -> None:
        check_digest(self.digest)
        if self.size < 0:
            raise DocumentError(f"{self.digest} has the impossible size {self.size}")


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """One image for one platform: its configuration and its layers, the LOWEST first."""

    schema_version: int
    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = ""
    annotations: dict[str, str] | None = None
    manifests: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # declared in order to refuse it


class Index(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Several manifests: one image for several platforms, or all images of a layout."""

    schema_version: int
    manifests: tuple[Descriptor, ...]
    media_type: str = ""
    annotations: dict[str, str] | None = None
    layers: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # declared in order to refuse it
    config: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class HistoryEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a layer was made, or, with `empty_layer`, a change of the configuration without a layer."""

    created: str = ""
    author: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class RootFs(msgspec.Struct, frozen=True):
    """The diff IDs, which are the sha256 digests of the uncompressed layers, the LOWEST first."""

    diff_ids: tuple[str, ...] = ()
    type: str = "layers"

    def __post_init__(self) -> None:
        for diff_id in self.diff_ids:
            check_digest(diff_id)


class ImageConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """An image's configuration. `config` (Env, Cmd, Labels, ...) is kept as it is in the JSON."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str = ""
    author: str = ""
    config: dict[str, Any] | None = None
    rootfs: RootFs = RootFs()
    history: tuple[HistoryEntry, ...] | None = None

    @property
    def platform(self) -> Platform:
        """The platform that the image is for."""
        return Platform(self.architecture, self.os, self.variant)


class DockerSaved(msgspec.Struct, frozen=True, rename="pascal"):
    """One image in the ``manifest.json`` of a docker-archive: names of its files, layers the LOWEST first."""

    config: str
    layers: tuple[str, ...] | None
    repo_tags: tuple[str, ...] | None = None


def is_digest(text: str) -> bool:
    """Return whether a text is ``sha256:`` and 64 lower-case hexadecimal digits; no other algorithm is supported."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str) -> str:
    """Return a digest that `is_digest` accepts, which is safe as a file name. Raises `DocumentError` for others."""
    if not is_digest(text):
        raise DocumentError(f"{text[:80]!r} is not a sha256 digest")
    return text


def digest_of(data: bytes) -> str:
    """Return the digest of some bytes as descriptors spell it: ``sha256:`` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


Document = TypeVar("Document")


def decode(data: bytes, kind: type[Document], what: str) -> Document:
    """Decode a JSON document as a value of type `kind`.

    Raises `DocumentError` for one that cannot be used; `what` names the document in the message.
    """
    if len(data) > LARGEST_DOCUMENT:
        raise DocumentError(f"{what} is larger than {LARGEST_DOCUMENT >> 20} MiB")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DocumentError(f"{what} cannot be used: {str(error)[:200]}") from error
    except RecursionError:
        raise DocumentError(f"{what} cannot be used: it is nested too deeply") from None


def decode_manifest(data: bytes, media_type: str, what: str) -> Manifest | Index:
    """Decode a manifest or an index, whichever `media_type` announces. Raises `DocumentError` for anything else."""
    if media_type in MANIFESTS:
        return _only_manifest(decode(data, Manifest, what), media_type, what)
    if media_type in INDEXES:
        return _only_index(decode(data, Index, what), media_type, what)
    raise DocumentError(f"{what} is of the unknown type {media_type[:120]!r}")


def _only_manifest(found: Manifest, media_type: str, what: str) -> Manifest:
    if found.manifests is not msgspec.UNSET:
        raise DocumentError(f"{what} is a manifest and an index at once")
    _check_form(found.schema_version, found.media_type, media_type, what)
    return found


def _only_index(found: Index, media_type: str, what: str) -> Index:
    if found.layers is not msgspec.UNSET or found.config is not msgspec.UNSET:
        raise DocumentError(f"{what} is an index and a manifest at once")
    _check_form(found.schema_version, found.media_type, media_type, what)
    return found


def _check_form(version: int, own_type: str, announced: str, what: str) -> None:
    if version != 2:
        raise DocumentError(f"{what} has the schema version {version}; only 2 is supported")
    if own_type and own_type != announced:
        raise DocumentError(f"{what} calls itself {own_type[:120]!r} but was announced as {announced!r}")


def encode(document: msgspec.Struct) -> bytes:
    """Return the JSON of a document; equal documents give equal bytes."""
    return msgspec.json.encode(document, order="deterministic")


def annotations_of(pairs: Mapping[str, str]) -> dict[str, str] | None:
    """Return annotations as documents carry them: None, which is left out, when there are none."""
    return dict(pairs) or None
