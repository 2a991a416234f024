"""Images in a directory or in one file: OCI layouts and what ``docker save`` writes, read through one interface.

Sources: image-spec ``image-layout.md``; moby ``image/tarexport`` for ``manifest.json``.
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
_DEEPEST = 4  # indexes inside each other
_NAMELESS = "one without a name"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class LayerSource(NamedTuple):
    """One layer that can be read: its stream, opened when it is called, and what its bytes must be."""

    open: Callable[[], Read]
    descriptor: Descriptor | None
    diff_id: str


class FoundImage(NamedTuple):
    """An image that was found: its configuration and its layers, the LOWEST first."""

    config: ImageConfig
    layers: tuple[LayerSource, ...]
    annotations: dict[str, str]


class LayoutFiles(Protocol):
    """Where the files of a layout lie, by their path in it."""

    def __contains__(self, name: bytes) -> bool: ...

    def size(self, name: bytes) -> int:
        """Return the size of a file."""

    def stream(self, name: bytes) -> Read:
        """Return the content of a file."""


class DirectoryFiles:
    """The files of a layout in a directory, whose descriptor `fd` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._open: list[int] = []

    def close(self) -> None:
        """Close what was opened for streams."""
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
        """Return the size of a file; ArchiveError when it is missing."""
        return sysio.stat_at(self._opened(name), b"").st_size

    def stream(self, name: bytes) -> Read:
        """Return the content of a file; ArchiveError when it is missing."""
        fd = self._opened(name)
        return extent_stream(fd, 0, sysio.stat_at(fd, b"").st_size)

    def _opened(self, name: bytes) -> int:
        try:
            fd = sysio.open_beneath(self._fd, name, _READ)
        except OSError as error:
            raise ArchiveError(f"its {os.fsdecode(name)} cannot be read: {error.strerror}") from error
        self._open.append(fd)
        if not stat.S_ISREG(sysio.stat_at(fd, b"").st_mode):
            raise ArchiveError(f"its {os.fsdecode(name)} is no regular file")
        return fd


def is_layout(files: LayoutFiles) -> bool:
    """Return whether files are an OCI layout."""
    return LAYOUT in files and INDEX in files


def is_docker(files: LayoutFiles) -> bool:
    """Return whether files are what ``docker save`` writes."""
    return DOCKER_INDEX in files


def find(files: LayoutFiles, reference: str | None, wanted: Platform | None, what: str) -> FoundImage:
    """Return the image that is meant: the one called `reference`, for the wanted platform; UserError otherwise."""
    found = _OciLayout(files, what).find(reference, wanted) if is_layout(files) else _docker(files, reference, what)
    image.require_platform(found.config, wanted, what)
    return found


class _OciLayout:
    """An OCI layout."""

    def __init__(self, files: LayoutFiles, what: str) -> None:
        self._files = files
        self._what = what
        version = image_spec.decode(_small(files, LAYOUT, what), dict[str, msgspec.Raw], f"{what}: its oci-layout")
        if b"1.0.0" not in bytes(version.get("imageLayoutVersion", msgspec.Raw(b""))):
            raise DocumentError(f"{what} is a layout of a version that is not known; only 1.0.0 is")

    def find(self, reference: str | None, wanted: Platform | None) -> FoundImage:
        data = _small(self._files, INDEX, self._what)
        index = image_spec.decode_manifest(data, image_spec.OCI_INDEX, f"{self._what}: its index.json")
        assert isinstance(index, Index)
        manifest = self._manifest(_named(index.manifests, reference, self._what), wanted)
        config = image.parse_config(self._blob(manifest.config), f"{self._what}: the image's configuration")
        layers = _paired(manifest.layers, config.rootfs.diff_ids, self._what)
        sources = (LayerSource(self._opener(each), each, diff_id) for each, diff_id in layers)
        return FoundImage(config, tuple(sources), manifest.annotations or {})

    def _manifest(self, offered: Sequence[Descriptor], wanted: Platform | None) -> Manifest:
        for _ in range(_DEEPEST):
            chosen = image.choose(offered, wanted, self._what)
            document = image_spec.decode_manifest(
                self._blob(chosen), chosen.media_type, f"{self._what}: {chosen.digest}"
            )
            if isinstance(document, Manifest):
                return document
            offered = document.manifests
        raise DocumentError(f"{self._what}: its indexes are nested too deeply")

    def _blob(self, descriptor: Descriptor) -> bytes:
        """Return a small blob, checked."""
        data = _small(self._files, _blob_name(descriptor), self._what)
        if (image_spec.digest_of(data), len(data)) != (descriptor.digest, descriptor.size):
            raise DigestError(f"{self._what}: the blob {descriptor.digest} is damaged")
        return data

    def _opener(self, descriptor: Descriptor) -> Callable[[], Read]:
        return lambda: self._files.stream(_blob_name(descriptor))


def _blob_name(descriptor: Descriptor) -> bytes:
    return b"blobs/sha256/" + descriptor.digest.removeprefix("sha256:").encode()


def _small(files: LayoutFiles, name: bytes, what: str) -> bytes:
    """Return a document, whole."""
    try:
        if files.size(name) > image_spec.LARGEST_DOCUMENT:
            raise DocumentError(f"{what}: {os.fsdecode(name)} is larger than {image_spec.LARGEST_DOCUMENT >> 20} MiB")
        read = files.stream(name)
        return b"".join(iter(lambda: read(1 << 20), b""))
    except ArchiveError as error:
        raise type(error)(f"{what}: {error}") from error


def _paired(layers: Sequence[Descriptor], diff_ids: Sequence[str], what: str) -> Sequence[tuple[Descriptor, str]]:
    if len(layers) != len(diff_ids):
        raise DocumentError(f"{what}: the image has {len(layers)} layers, its configuration speaks of {len(diff_ids)}")
    for each in layers:
        if each.media_type not in image_spec.LAYERS:
            raise DocumentError(f"{what}: a layer is of the unknown type {each.media_type[:120]!r}; this is no image")
    return tuple(zip(layers, diff_ids, strict=True))


def _named(descriptors: Sequence[Descriptor], reference: str | None, what: str) -> Sequence[Descriptor]:
    """Return what has the wanted name; without one, what has the only name."""
    by_name: dict[str, list[Descriptor]] = {}
    for each in descriptors:
        by_name.setdefault(_name_of(each), []).append(each)
    if reference is None:
        if len(by_name) > 1:
            raise UserError(f"{what} holds several images ({listed(by_name, _NAMELESS)}); name one as SRC:NAME")
        return descriptors
    found = [each for each in descriptors if reference in _names_of(each)]
    if not found:
        raise UserError(f"{what} has no image {reference}; it has {listed(by_name, _NAMELESS)}")
    return found


def _names_of(descriptor: Descriptor) -> list[str]:
    annotations = descriptor.annotations or {}
    return [annotations[key] for key in (image_spec.REF_NAME, image_spec.FULL_NAME) if annotations.get(key)]


def _name_of(descriptor: Descriptor) -> str:
    return next(iter(_names_of(descriptor)), "")


# --- docker save ---------------------------------------------------------------------------------------------


def _docker(files: LayoutFiles, reference: str | None, what: str) -> FoundImage:
    saved = image_spec.decode(_small(files, DOCKER_INDEX, what), tuple[DockerSaved, ...], f"{what}: its manifest.json")
    chosen = _tagged(saved, reference, what)
    config = image.parse_config(_small(files, chosen.config.encode(), what), f"{what}: the image's configuration")
    names = chosen.layers or ()
    if len(names) != len(config.rootfs.diff_ids):
        raise DocumentError(
            f"{what}: the image has {len(names)} layers, its configuration speaks of {len(config.rootfs.diff_ids)}"
        )
    layers = tuple(
        LayerSource(_member_opener(files, name), None, diff_id)
        for name, diff_id in zip(names, config.rootfs.diff_ids, strict=True)
    )
    return FoundImage(config, layers, {})


def _member_opener(files: LayoutFiles, name: str) -> Callable[[], Read]:
    return lambda: files.stream(name.encode())


def _tagged(saved: Sequence[DockerSaved], reference: str | None, what: str) -> DockerSaved:
    offered = [tag for each in saved for tag in each.repo_tags or ()]
    if reference is not None:
        for each in saved:
            if reference in (each.repo_tags or ()):
                return each
        raise UserError(f"{what} has no image {reference}; it has {listed(offered, _NAMELESS)}")
    if len(saved) != 1:
        raise UserError(f"{what} holds {len(saved)} images ({listed(offered, _NAMELESS)}); name one as SRC:NAME")
    return saved[0]
