"""Exporting an image to a layout, an archive, a single tar or a directory, which appears when it is complete."""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import msgspec

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import image, image_spec, tar_writer
from overlayfs.oci.blobs import (
    EntryGenerator,
    ImageProgress,
    LayerBlob,
    Notice,
    Sink,
    ignore_notice,
    write_blob,
    write_entries,
)
from overlayfs.oci.compression import Compression
from overlayfs.oci.image_spec import Descriptor, DockerSaved, ImageConfig, Index, Manifest
from overlayfs.oci.layer_entries import Omissions, merged_entries
from overlayfs.oci.layer_tar import unpack_entries
from overlayfs.oci.streams import PIECE, unnamed_file
from overlayfs.oci.tar_entry import Kind, TarEntry
from overlayfs.oci.tar_reader import BLOCK
from overlayfs.store import layout
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore
from overlayfs.tree.layer import join
from overlayfs.tree.workdir import remove_tree

STANDARD_OUTPUT = b"-"
_STAGING = b".overlayfs-export-"
_BLOBS = b"blobs/sha256"
_PARTIAL = b"blob.part"

FileName = Callable[[LayerBlob], bytes]
WriteLayer = Callable[[Sink], LayerBlob]


class Format(Enum):
    """The format of an export. TAR and DIRECTORY are the merged tree, without layers and configuration."""

    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    TAR = "tar"
    DIRECTORY = "dir"


_COMPRESSED = frozenset((Format.OCI, Format.OCI_ARCHIVE))
_DIRECTORIES = frozenset((Format.OCI, Format.DIRECTORY))


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export. compression: None for gzip in layouts and oci-archives, and no compression elsewhere."""

    format: Format
    compression: Compression | None = None
    progress: ImageProgress | None = None
    notice: Notice = field(default=ignore_notice)

    @property
    def layer_compression(self) -> Compression:
        """The compression of the layers, or of the single tar."""
        usual = Compression.GZIP if self.format in _COMPRESSED else Compression.NONE
        return self.compression or usual

    def layer_progress(self, layer: int, layers: int) -> Callable[[int], None] | None:
        """Return the progress callback for one layer, which takes bytes."""
        progress = self.progress
        return None if progress is None else lambda done: progress(layer, layers, done)


def export_image(store: LayerStore, name: str, destination: bytes, options: ExportOptions) -> None:
    """Write the image NAME[:TAG] to a new file or directory, to a pipe or device, or to standard output (``-``).

    The same image gives the same bytes. Raises `UserError`; then nothing is left at the destination.
    """
    record = store.images.find(name)
    with ExitStack() as undo:
        layers = [store.layers.find(each) for each in reversed(record.layers)]
        for layer in layers:
            undo.enter_context(layer.hold())
        _Export(store, record, layers, options, undo).run(destination)


class _ImageWriter(Protocol):
    """Writes the files of an image layout or archive."""

    def write_layer(self, folder: bytes, name: FileName, write: WriteLayer) -> LayerBlob:
        """Write a layer with `write(sink)`, to a file in a folder whose name is `name(blob)` afterwards."""

    def write_document(self, name: bytes, data: bytes) -> None:
        """Write a file with this content."""


class _Export:
    """One export; `layers` lowest first."""

    def __init__(
        self, store: LayerStore, record: ImageRecord, layers: list[Layer], options: ExportOptions, undo: ExitStack
    ) -> None:
        self._store = store
        self._record = record
        self._layers = layers
        self._options = options
        self._undo = undo

    def run(self, destination: bytes) -> None:
        if self._options.format in _DIRECTORIES:
            with _new_directory(destination) as fd:
                self._fill_directory(fd)
            return
        with _new_file(destination, self._store, self._undo) as target:
            self._fill_file(target)

    def _fill_directory(self, fd: int) -> None:
        if self._options.format is Format.OCI:
            self._write_layout(_DirectoryWriter(fd))
            return
        omissions = Omissions()
        with merged_entries(self._stack(), omissions) as items:
            unpacker = unpack_entries(items, fd, self._options.layer_progress(1, 1), merged=True)
        self._notify(omissions.sentences() + unpacker.sentences())

    def _fill_file(self, target: "_OutputFile") -> None:
        if self._options.format is Format.TAR:
            self._write_tar(target.write)
            return
        archive = _ArchiveWriter(target)
        if self._options.format is Format.OCI_ARCHIVE:
            self._write_layout(archive)
        else:
            self._write_docker(archive)
        archive.finish()

    def _stack(self) -> list[bytes]:
        return [layer.tree_path for layer in reversed(self._layers)]

    def _notify(self, sentences: list[str]) -> None:
        for sentence in sentences:
            self._options.notice(sentence)

    # --- formats ---------------------------------------------------------------------------------------

    def _write_tar(self, sink: Sink) -> None:
        omissions = Omissions()

        def items() -> EntryGenerator:
            with merged_entries(self._stack(), omissions) as found:
                yield from found

        write_entries(items(), sink, self._options.layer_compression, self._options.layer_progress(1, 1))
        self._notify(omissions.sentences())

    def _write_layout(self, target: _ImageWriter) -> None:
        target.write_document(b"oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        blobs = self._write_layers(target, _BLOBS, _oci_name)
        config = self._config(blobs)
        manifest = Manifest(
            2,
            self._put_blob(target, config, image_spec.OCI_CONFIG),
            tuple(blob.descriptor() for blob in blobs),
            image_spec.OCI_MANIFEST,
            image_spec.annotations_of(self._record.annotations),
        )
        found = self._put_blob(target, manifest, image_spec.OCI_MANIFEST)
        tag = self._record.name.rpartition(":")[2]
        named = msgspec.structs.replace(
            found,
            annotations={image_spec.REF_NAME: tag, image_spec.FULL_NAME: self._record.name},
            platform=config.platform,
        )
        target.write_document(b"index.json", image_spec.encode(Index(2, (named,), image_spec.OCI_INDEX)))

    def _write_docker(self, target: _ImageWriter) -> None:
        blobs = self._write_layers(target, b"", _docker_name)
        data = image_spec.encode(self._config(blobs))
        config = _hex(image_spec.digest_of(data)).decode() + ".json"
        target.write_document(config.encode(), data)
        layers = tuple(_docker_name(blob).decode() for blob in blobs)
        target.write_document(
            b"manifest.json", msgspec.json.encode([DockerSaved(config, layers, (self._record.name,))])
        )

    def _config(self, blobs: list[LayerBlob]) -> ImageConfig:
        return image.config_of(self._record, [blob.diff_id for blob in blobs])

    def _put_blob(self, target: _ImageWriter, document: msgspec.Struct, media_type: str) -> Descriptor:
        data = image_spec.encode(document)
        digest = image_spec.digest_of(data)
        target.write_document(join(_BLOBS, _hex(digest)), data)
        return Descriptor(media_type, digest, len(data))

    def _write_layers(self, target: _ImageWriter, folder: bytes, name: FileName) -> list[LayerBlob]:
        """Write each layer once, even if it is in the stack several times."""
        written: dict[str, LayerBlob] = {}
        for number, layer in enumerate(self._layers, 1):
            if layer.id not in written:
                written[layer.id] = target.write_layer(folder, name, self._layer_writer(layer, number))
        return [written[layer.id] for layer in self._layers]

    def _layer_writer(self, layer: Layer, number: int) -> WriteLayer:
        options = self._options
        progress = options.layer_progress(number, len(self._layers))
        return lambda sink: write_blob(self._store, layer, sink, options.layer_compression, progress, options.notice)


def _hex(digest: str) -> bytes:
    return digest.removeprefix("sha256:").encode()


def _oci_name(blob: LayerBlob) -> bytes:
    return _hex(blob.digest)


def _docker_name(blob: LayerBlob) -> bytes:
    return _hex(blob.diff_id) + b".tar"


# --- writers -------------------------------------------------------------------------------------------------


class _DirectoryWriter:
    """Writes a layout to an empty directory: implements `_ImageWriter`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        sysio.mkdir_at(fd, b"blobs", 0o755)
        inside = sysio.open_child(fd, b"blobs", os.O_PATH | os.O_DIRECTORY)
        try:
            sysio.mkdir_at(inside, b"sha256", 0o755)
        finally:
            sysio.close(inside)

    def write_layer(self, folder: bytes, name: FileName, write: WriteLayer) -> LayerBlob:
        """Write a layer with `write(sink)`, to a file in a folder whose name is `name(blob)` afterwards."""
        with self._partial_file() as fd:
            blob = write(_OutputFile(fd, seekable=True).write)
        self._rename_partial(join(folder, name(blob)))
        return blob

    def write_document(self, name: bytes, data: bytes) -> None:
        """Write a file with this content."""
        with self._partial_file() as fd:
            sysio.write_at(fd, 0, data)
        self._rename_partial(name)

    @contextlib.contextmanager
    def _partial_file(self) -> Iterator[int]:
        fd = sysio.open_child(self._fd, _PARTIAL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            yield fd
        finally:
            sysio.close(fd)

    def _rename_partial(self, path: bytes) -> None:
        folder, _, name = path.rpartition(b"/")
        fd = sysio.open_beneath(self._fd, folder, os.O_PATH | os.O_DIRECTORY)
        try:
            sysio.rename_at(self._fd, _PARTIAL, fd, name)
        finally:
            sysio.close(fd)


class _OutputFile:
    """A file that is written from its beginning.

    seekable: whether what was written can be changed. spool: returns an unnamed file for a blob, if not seekable.
    """

    def __init__(self, fd: int, seekable: bool, spool: Callable[[], int] | None = None) -> None:
        self.fd = fd
        self.seekable = seekable
        self.spool = spool
        self.position = 0

    def write(self, data: bytes) -> None:
        """Write data at the current position."""
        if self.seekable:
            sysio.write_at(self.fd, self.position, data)
        else:
            _write_stream(self.fd, data)
        self.position += len(data)


def _write_stream(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


class _ArchiveWriter:
    """Writes a layout or docker-archive to one tar: implements `_ImageWriter`.

    The size of a blob is known only at its end, but belongs into the header before it. So the header is filled in
    afterwards, or, if the output is not seekable, the blob is written to an unnamed file first.
    """

    def __init__(self, target: _OutputFile) -> None:
        self._target = target
        self._directories: set[bytes] = set()

    def write_layer(self, folder: bytes, name: FileName, write: WriteLayer) -> LayerBlob:
        """Write a layer with `write(sink)`, to a file in a folder whose name is `name(blob)` afterwards."""
        if not self._target.seekable:
            return self._spooled(folder, name, write)
        self._make_parents(folder)
        at = self._target.position
        self._target.write(bytes(BLOCK))
        blob = write(self._target.write)
        self._target.write(tar_writer.padding(blob.size))
        sysio.write_at(self._target.fd, at, tar_writer.file_header(join(folder, name(blob)), blob.size))
        return blob

    def _spooled(self, folder: bytes, name: FileName, write: WriteLayer) -> LayerBlob:
        assert self._target.spool is not None
        fd = self._target.spool()
        try:
            blob = write(_OutputFile(fd, seekable=True).write)
            self._make_parents(folder)
            self._target.write(tar_writer.file_header(join(folder, name(blob)), blob.size))
            for at in range(0, blob.size, PIECE):
                self._target.write(sysio.read_at(fd, at, min(PIECE, blob.size - at)))
            self._target.write(tar_writer.padding(blob.size))
        finally:
            sysio.close(fd)
        return blob

    def write_document(self, name: bytes, data: bytes) -> None:
        """Write a file with this content."""
        self._make_parents(name.rpartition(b"/")[0])
        self._target.write(tar_writer.file_header(name, len(data)) + data + tar_writer.padding(len(data)))

    def _make_parents(self, folder: bytes) -> None:
        path = b""
        for name in filter(None, folder.split(b"/")):
            path = join(path, name)
            if path not in self._directories:
                self._directories.add(path)
                self._target.write(tar_writer.header(TarEntry(path, Kind.DIRECTORY)))

    def finish(self) -> None:
        """Write the end of the archive."""
        self._target.write(tar_writer.END)


# --- destinations --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_directory(destination: bytes) -> Iterator[int]:
    """Yield a new empty directory that appears at the destination when the context is left without an error."""
    if destination == STANDARD_OUTPUT:
        raise UserError("a directory cannot go to standard output; name one, or choose an archive with --format")
    with _staged(destination, _create_directory, sysio.syncfs) as fd:
        yield fd


@contextlib.contextmanager
def _new_file(destination: bytes, store: LayerStore, undo: ExitStack) -> Iterator[_OutputFile]:
    """Yield a new file, as `_new_directory` does, or the pipe or device that is at the destination."""

    def spool() -> int:
        return unnamed_file(store.directory.subdirectories[layout.STAGING])

    if destination == STANDARD_OUTPUT:
        yield _OutputFile(1, seekable=False, spool=spool)
        return
    if _is_stream(destination):
        fd = os.open(destination, os.O_WRONLY | os.O_CLOEXEC)
        undo.callback(sysio.close, fd)
        yield _OutputFile(fd, seekable=False, spool=spool)
        return
    with _staged(destination, _create_file, sysio.fsync) as fd:
        yield _OutputFile(fd, seekable=True)


@contextlib.contextmanager
def _staged(destination: bytes, create: Callable[[int, bytes], int], flush: Callable[[int], object]) -> Iterator[int]:
    """Yield a new object under a temporary name; rename it to the destination at the end, remove it after an error."""
    with _parent(destination) as (parent, name):
        staging = _STAGING + secrets.token_hex(8).encode()
        try:  # an interrupt may arrive as soon as the object exists
            fd = create(parent, staging)
            try:
                yield fd
                flush(fd)
            finally:
                sysio.close(fd)
            _publish(parent, staging, name, destination)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                remove_tree(parent, staging)
            raise


def _create_directory(parent: int, name: bytes) -> int:
    sysio.mkdir_at(parent, name, 0o755)
    return sysio.open_child(parent, name, os.O_RDONLY | os.O_DIRECTORY)


def _create_file(parent: int, name: bytes) -> int:
    return sysio.open_child(parent, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)


@contextlib.contextmanager
def _parent(destination: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the parent directory of the destination, and its name there. Raises `UserError` if it exists."""
    parent, name = os.path.split(os.path.abspath(destination))
    shown = os.fsdecode(destination)
    if os.path.lexists(destination):
        raise UserError(f"{shown} exists already; name a file or directory that does not")
    try:
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot write {shown}: {os.fsdecode(parent)}: {error.strerror}") from error
    try:
        yield fd, name
    finally:
        sysio.close(fd)


def _publish(parent: int, staging: bytes, name: bytes, destination: bytes) -> None:
    try:
        sysio.rename_at(parent, staging, parent, name, sysio.RENAME_NOREPLACE)
    except FileExistsError as error:
        raise UserError(f"{os.fsdecode(destination)} exists already; name a file or directory that does not") from error
    sysio.fsync(parent)


def _is_stream(destination: bytes) -> bool:
    try:
        mode = os.stat(destination).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)
