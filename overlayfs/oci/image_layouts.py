"""Finding an image in an OCI image layout or a docker-archive, in a directory or in a tar archive.

Sources: image-spec ``image-layout.md``; moby ``image/tarexport`` for ``manifest.json``, which ``docker save`` writes.
"""

import os
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError, listed
from overlayfs.oci import image, image_spec
from overlayfs.oci.blobs import DigestError
from overlayfs.oci.image_spec import Descriptor, DockerSaved, DocumentError, ImageConfig, Index, Manifest, Platform
from overlayfs.oci.streams import Read
from overlayfs.oci.tar_entry import ArchiveError
from overlayfs.oci.tar_index import extent_stream

LAYOUT = b"oci-layout"
INDEX = b"index.json"
DOCKER_INDEX = b"manifest.json"
_MAX_INDEXES = 4  # nested
_WITHOUT_NAME = "one without a name"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class LayerSource(NamedTuple):
    """One layer of an image: a function that opens its stream, and what its bytes must be.

    descriptor: None if only the diff ID is known.
    """

    open: Callable[[], Read]
    descriptor: Descriptor | None
    diff_id: str


class FoundImage(NamedTuple):
    """An image in a layout or an archive: its configuration and its layers, the LOWEST first."""

    config: ImageConfig
    layers: tuple[LayerSource, ...]
    annotations: dict[str, str]


class LayoutFiles(Protocol):
    """The files of a layout, by their path in it. The methods raise `ArchiveError` for a missing file."""

    def __contains__(self, name: bytes) -> bool: ...

    def size(self, name: bytes) -> int:
        """Return the size of a file in bytes."""

    def stream(self, name: bytes) -> Read:
        """Return a stream of a file."""


class DirectoryFiles:
    """The files of a layout in a directory: implements `LayoutFiles`. `fd` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._open: list[int] = []

    def close(self) -> None:
        """Close the files that were opened for streams."""
        while self._open:
            sysio.close(self._open.pop())

    def __contains__(self, name: bytes) -> bool:
        try:
            fd = sysio.open_beneath(self._fd, name, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            return False
        sysio.close(fd)
        return True

    def size(self, name: bytes) -> int:
        """Return the size of a file in bytes. Raises `ArchiveError` if it is missing."""
        return sysio.stat_at(self._open_file(name), b"").st_size

    def stream(self, name: bytes) -> Read:
        """Return a stream of a file. Raises `ArchiveError` if it is missing."""
        fd = self._open_file(name)
        return extent_stream(fd, 0, sysio.stat_at(fd, b"").st_size)

    def _open_file(self, name: bytes) -> int:
        try:
            fd = sysio.open_beneath(self._fd, name, _READ)
        except OSError as error:
            raise ArchiveError(f"its {os.fsdecode(name)} cannot be read: {error.strerror}") from error
        self._open.append(fd)
        if not stat.S_ISREG(sysio.stat_at(fd, b"").st_mode):
            raise ArchiveError(f"its {os.fsdecode(name)} is not a regular file")
        return fd


def is_layout(files: LayoutFiles) -> bool:
    """Return whether the files are an OCI image layout."""
    return LAYOUT in files and INDEX in files


def is_docker_archive(files: LayoutFiles) -> bool:
    """Return whether the files are a docker-archive."""
    return DOCKER_INDEX in files


def find_image(files: LayoutFiles, reference: str | None, wanted: Platform | None, what: str) -> FoundImage:
    """Return the image called `reference`, or the only one if it is None, for the wanted platform or the host's.

    `what` names the layout in messages. Raises `UserError` if there is no such image, and `DocumentError`,
    `ArchiveError` or `DigestError` if the layout is damaged.
    """
    if is_layout(files):
        found = _OciLayout(files, what).find_image(reference, wanted)
    else:
        found = _find_in_docker_archive(files, reference, what)
    image.require_platform(found.config, wanted, what)
    return found


class _OciLayout:
    """An OCI image layout."""

    def __init__(self, files: LayoutFiles, what: str) -> None:
        self._files = files
        self._what = what
        version = image_spec.decode(
            _read_document(files, LAYOUT, what), dict[str, msgspec.Raw], f"{what}: its oci-layout"
        )
        if b"1.0.0" not in bytes(version.get("imageLayoutVersion", msgspec.Raw(b""))):
            raise DocumentError(f"{what} is a layout of an unknown version; only 1.0.0 is supported")

    def find_image(self, reference: str | None, wanted: Platform | None) -> FoundImage:
        data = _read_document(self._files, INDEX, self._what)
        index = image_spec.decode_manifest(data, image_spec.OCI_INDEX, f"{self._what}: its index.json")
        assert isinstance(index, Index)
        manifest = self._manifest(_select_named(index.manifests, reference, self._what), wanted)
        config = image.parse_config(self._blob(manifest.config), f"{self._what}: the image's configuration")
        layers = _pair_layers(manifest.layers, config.rootfs.diff_ids, self._what)
        sources = (LayerSource(self._blob_opener(each), each, diff_id) for each, diff_id in layers)
        return FoundImage(config, tuple(sources), manifest.annotations or {})

    def _manifest(self, offered: Sequence[Descriptor], wanted: Platform | None) -> Manifest:
        for _ in range(_MAX_INDEXES):
            chosen = image.choose(offered, wanted, self._what)
            document = image_spec.decode_manifest(
                self._blob(chosen), chosen.media_type, f"{self._what}: {chosen.digest}"
            )
            if isinstance(document, Manifest):
                return document
            offered = document.manifests
        raise DocumentError(f"{self._what}: its indexes are nested too deeply")

    def _blob(self, descriptor: Descriptor) -> bytes:
        """Return a small blob after checking its digest and size."""
        data = _read_document(self._files, _blob_name(descriptor), self._what)
        if (image_spec.digest_of(data), len(data)) != (descriptor.digest, descriptor.size):
            raise DigestError(f"{self._what}: the blob {descriptor.digest} is damaged")
        return data

    def _blob_opener(self, descriptor: Descriptor) -> Callable[[], Read]:
        return lambda: self._files.stream(_blob_name(descriptor))


def _blob_name(descriptor: Descriptor) -> bytes:
    return b"blobs/sha256/" + descriptor.digest.removeprefix("sha256:").encode()


def _read_document(files: LayoutFiles, name: bytes, what: str) -> bytes:
    """Return the content of a file that holds a document."""
    try:
        if files.size(name) > image_spec.LARGEST_DOCUMENT:
            raise DocumentError(f"{what}: {os.fsdecode(name)} is larger than {image_spec.LARGEST_DOCUMENT >> 20} MiB")
        read = files.stream(name)
        return b"".join(iter(lambda: read(1 << 20), b""))
    except ArchiveError as error:
        raise type(error)(f"{what}: {error}") from error


def _pair_layers(layers: Sequence[Descriptor], diff_ids: Sequence[str], what: str) -> Sequence[tuple[Descriptor, str]]:
    if len(layers) != len(diff_ids):
        raise DocumentError(f"{what}: the image has {len(layers)} layers, but its configuration has {len(diff_ids)}")
    for each in layers:
        if each.media_type not in image_spec.LAYERS:
            raise DocumentError(
                f"{what}: a layer is of the unknown type {each.media_type[:120]!r}; this is not an image"
            )
    return tuple(zip(layers, diff_ids, strict=True))


def _select_named(descriptors: Sequence[Descriptor], reference: str | None, what: str) -> Sequence[Descriptor]:
    """Return the descriptors with the wanted name; without one, all of them if they have the same name."""
    by_name: dict[str, list[Descriptor]] = {}
    for each in descriptors:
        by_name.setdefault(_name_of(each), []).append(each)
    if reference is None:
        if len(by_name) > 1:
            raise UserError(f"{what} contains several images ({listed(by_name, _WITHOUT_NAME)}); name one as SRC:NAME")
        return descriptors
    found = [each for each in descriptors if reference in _names_of(each)]
    if not found:
        raise UserError(f"{what} has no image {reference}; it has {listed(by_name, _WITHOUT_NAME)}")
    return found


def _names_of(descriptor: Descriptor) -> list[str]:
    annotations = descriptor.annotations or {}
    return [annotations[key] for key in (image_spec.REF_NAME, image_spec.FULL_NAME) if annotations.get(key)]


def _name_of(descriptor: Descriptor) -> str:
    return next(iter(_names_of(descriptor)), "")


# --- docker-archive ------------------------------------------------------------------------------------------


def _find_in_docker_archive(files: LayoutFiles, reference: str | None, what: str) -> FoundImage:
    saved = image_spec.decode(
        _read_document(files, DOCKER_INDEX, what), tuple[DockerSaved, ...], f"{what}: its manifest.json"
    )
    chosen = _select_tagged(saved, reference, what)
    config = image.parse_config(
        _read_document(files, chosen.config.encode(), what), f"{what}: the image's configuration"
    )
    names = chosen.layers or ()
    if len(names) != len(config.rootfs.diff_ids):
        raise DocumentError(
            f"{what}: the image has {len(names)} layers, but its configuration has {len(config.rootfs.diff_ids)}"
        )
    layers = tuple(
        LayerSource(_file_opener(files, name), None, diff_id)
        for name, diff_id in zip(names, config.rootfs.diff_ids, strict=True)
    )
    return FoundImage(config, layers, {})


def _file_opener(files: LayoutFiles, name: str) -> Callable[[], Read]:
    return lambda: files.stream(name.encode())


def _select_tagged(saved: Sequence[DockerSaved], reference: str | None, what: str) -> DockerSaved:
    offered = [tag for each in saved for tag in each.repo_tags or ()]
    if reference is not None:
        for each in saved:
            if reference in (each.repo_tags or ()):
                return each
        raise UserError(f"{what} has no image {reference}; it has {listed(offered, _WITHOUT_NAME)}")
    if len(saved) != 1:
        raise UserError(f"{what} contains {len(saved)} images ({listed(offered, _WITHOUT_NAME)}); name one as SRC:NAME")
    return saved[0]
