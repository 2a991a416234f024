"""Importing an image from a directory, a layer tar, an image layout or an archive; completely, or not at all."""

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import compression, image, image_layouts, platforms
from overlayfs.oci.blobs import (
    ImageProgress,
    LayerDetails,
    Notice,
    PreparedLayer,
    ignore_notice,
    prepare_blob,
    prepare_tree,
)
from overlayfs.oci.compression import Compression, DecompressingReader
from overlayfs.oci.image_layouts import DirectoryFiles, FoundImage, LayerSource, LayoutFiles
from overlayfs.oci.image_spec import HistoryEntry, ImageConfig, Platform
from overlayfs.oci.streams import PIECE, PeekableReader, Read, unnamed_file
from overlayfs.oci.tar_entry import ArchiveError
from overlayfs.oci.tar_index import TarIndex, extent_stream
from overlayfs.oci.tar_reader import TarReader
from overlayfs.store import layout
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore

STANDARD_INPUT = b"-"
_PEEKED = 64 * 1024
_MAX_PREPARED = 64  # layers that wait to be published together; each has open descriptors
# Names of the first file in an archive of images; with any other name, the archive is a layer.
_IMAGE_FILE = re.compile(
    rb"blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|(sha256:)?[0-9a-f]{64}(/.*|\.json|\.tar)?"
)


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import. platform: None for the host's. author, message: for a layer without a history."""

    platform: Platform | None = None
    author: str = ""
    message: str = ""
    progress: ImageProgress | None = None
    notice: Notice = field(default=ignore_notice)

    def layer_progress(self, layer: int, layers: int) -> Callable[[int], None] | None:
        """Return the progress callback for one layer, which takes bytes."""
        progress = self.progress
        return None if progress is None else lambda done: progress(layer, layers, done)


def import_image(store: LayerStore, source: bytes, name: str, options: ImportOptions | None = None) -> ImageRecord:
    """Import an image, store it as `name`, and return its record.

    `source` is a path, ``PATH:NAME`` for one of several images in an archive or layout, or ``-`` for standard input.
    Layers that the store has are not read again. Raises `UserError` (`ArchiveError`, `DigestError`, `DocumentError`) if
    the image is refused; then nothing of it is stored.
    """
    layout.image_name(name)  # before any work
    return _Import(store, name, options or ImportOptions()).run(source)


class _Import:
    def __init__(self, store: LayerStore, name: str, options: ImportOptions) -> None:
        self._store = store
        self._name = name
        self._options = options

    def run(self, source: bytes) -> ImageRecord:
        if source == STANDARD_INPUT:
            return self._import_stream(0, "standard input", None)
        path, reference = _split_source(source)
        shown = os.fsdecode(path)
        with _open_source(path) as fd:
            if os.path.isdir(path):
                return self._import_directory(fd, path, reference, shown)
            return self._import_stream(fd, shown, reference)

    # --- directories -----------------------------------------------------------------------------------

    def _import_directory(self, fd: int, path: bytes, reference: str | None, shown: str) -> ImageRecord:
        files = DirectoryFiles(fd)
        try:
            if image_layouts.is_layout(files):
                return self._import_image(files, reference, shown)
        finally:
            files.close()
        if reference is not None:
            raise UserError(f"{shown} is not an image layout, so it has no image {reference}")
        # Through the descriptor, so that the directory that was opened is the one that is imported.
        inside = b"/proc/self/fd/%d" % fd
        progress = self._options.layer_progress(1, 1)
        with prepare_tree(self._store, inside, self._details(), progress, self._options.notice) as prepared:
            return self._put_single_layer(prepared, shown)

    # --- streams ---------------------------------------------------------------------------------------

    def _import_stream(self, fd: int, shown: str, reference: str | None) -> ImageRecord:
        raw = PeekableReader(lambda size: os.read(fd, min(size, PIECE)))
        try:
            kind = compression.detect(raw.peek(compression.LONGEST_MAGIC))
            is_image = _may_be_image(raw.peek(_PEEKED), kind)
        except ArchiveError as error:
            raise type(error)(f"{shown} is refused: {error}") from error
        if is_image or reference is not None:
            return self._import_archive(fd, kind, raw.read, shown, reference)
        return self._import_layer(raw.read, shown)

    def _import_archive(self, fd: int, kind: Compression, raw: Read, shown: str, reference: str | None) -> ImageRecord:
        with ExitStack() as undo:
            if kind is not Compression.NONE or not _is_seekable(fd):
                fd = self._spool(DecompressingReader(raw, kind).read, undo)
            try:
                files = TarIndex(fd)
            except ArchiveError as error:
                raise type(error)(f"{shown} is refused: {error}") from error
            if image_layouts.is_layout(files) or image_layouts.is_docker_archive(files):
                return self._import_image(files, reference, shown)
            if reference is not None:
                raise UserError(f"{shown} is not an archive of images, so it has no image {reference}")
            return self._import_layer(extent_stream(fd, 0, sysio.stat_at(fd, b"").st_size), shown)

    def _spool(self, read: Read, undo: ExitStack) -> int:
        """Copy a stream that cannot be read twice to an unnamed file of the store, and return its descriptor."""
        fd = unnamed_file(self._store.directory.subdirectories[layout.STAGING])
        undo.callback(sysio.close, fd)
        at = 0
        while data := read(PIECE):
            at += sysio.write_at(fd, at, data)
            if self._options.progress is not None:
                self._options.progress(0, 0, at)
        return fd

    def _import_layer(self, read: Read, shown: str) -> ImageRecord:
        with prepare_blob(
            self._store,
            read,
            None,
            None,
            self._details(),
            shown,
            self._options.layer_progress(1, 1),
            self._options.notice,
        ) as prepared:
            return self._put_single_layer(prepared, shown)

    # --- images ----------------------------------------------------------------------------------------

    def _details(self, step: HistoryEntry | None = None) -> LayerDetails:
        if step is None:
            return LayerDetails(self._options.author, self._options.message, None)
        return LayerDetails(step.author, step.comment or step.created_by, step.created or None)

    def _put_single_layer(self, prepared: PreparedLayer, shown: str) -> ImageRecord:
        """Publish a layer without a configuration, and put an image that consists of it."""
        time = now()
        step = HistoryEntry(time, self._options.author, f"import {shown}", self._options.message)
        platform = self._options.platform or platforms.host()
        config = ImageConfig(
            platform.architecture, platform.os, platform.variant, time, self._options.author, history=(step,)
        )
        return self._store.images.put(image.image_record(self._name, config, (prepared.publish(),)))

    def _import_image(self, files: LayoutFiles, reference: str | None, shown: str) -> ImageRecord:
        """Prepare the layers that the store lacks, publish them in groups, then put the image."""
        found = image_layouts.find_image(files, reference, self._options.platform, shown)
        ready: dict[str, Layer] = {}
        with ExitStack() as undo:
            waiting: dict[str, PreparedLayer] = {}
            for number, (layer, step) in enumerate(_with_history(found), 1):
                if layer.diff_id in ready or layer.diff_id in waiting:
                    continue
                stored = self._store.layers.by_diff_id(layer.diff_id)
                if stored is not None:
                    ready[layer.diff_id] = stored
                    continue
                what = f"layer {number} of {shown}"
                waiting[layer.diff_id] = undo.enter_context(self._prepare(layer, step, what, number, found))
                if len(waiting) == _MAX_PREPARED:
                    _publish_all(waiting, ready, undo)
            _publish_all(waiting, ready, undo)
        stack = tuple(ready[layer.diff_id] for layer in found.layers)
        return self._store.images.put(image.image_record(self._name, found.config, stack, found.annotations))

    @contextmanager
    def _prepare(
        self, layer: LayerSource, step: HistoryEntry | None, what: str, number: int, found: FoundImage
    ) -> Iterator[PreparedLayer]:
        try:
            read = layer.open()
        except ArchiveError as error:
            raise type(error)(f"{what} is refused: {error}") from error
        with prepare_blob(
            self._store,
            read,
            layer.descriptor,
            layer.diff_id,
            self._details(step),
            what,
            self._options.layer_progress(number, len(found.layers)),
            self._options.notice,
        ) as prepared:
            yield prepared


def _publish_all(waiting: dict[str, PreparedLayer], ready: dict[str, Layer], undo: ExitStack) -> None:
    """Publish the layers that wait, and release what they held while they were prepared."""
    while waiting:
        diff_id, prepared = waiting.popitem()
        ready[diff_id] = prepared.publish()
    undo.close()


def _with_history(found: FoundImage) -> Iterator[tuple[LayerSource, HistoryEntry | None]]:
    """Yield each layer with its entry in the history."""
    steps = iter([step for step in found.config.history or () if not step.empty_layer])
    for layer in found.layers:
        yield layer, next(steps, None)


def _split_source(source: bytes) -> tuple[bytes, str | None]:
    """Return the path and the name in ``PATH[:NAME]``: the longest path that exists wins."""
    if os.path.lexists(source):
        return source, None
    cut = len(source)
    while (cut := source.rfind(b":", 0, cut)) > 0:
        if os.path.lexists(source[:cut]):
            return source[:cut], os.fsdecode(source[cut + 1 :])
    return source, None


@contextmanager
def _open_source(path: bytes) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        reason = "does not exist" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise UserError(f"{os.fsdecode(path)} {reason}") from error
    try:
        yield fd
    finally:
        sysio.close(fd)


def _is_seekable(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return os.path.isfile(b"/proc/self/fd/%d" % fd)


def _may_be_image(start: bytes, kind: Compression) -> bool:
    """Return whether a stream may be an archive of images, from its first bytes. Raises `ArchiveError` if not a tar."""
    plain = DecompressingReader(_reader(start), kind)
    try:
        first = next((entry for entry in TarReader(plain.read) if entry.path), None)
    except ArchiveError:
        if len(start) < _PEEKED:
            raise
        return False  # the headers of the first entry are longer than `start`
    return first is not None and _IMAGE_FILE.fullmatch(first.path) is not None


def _reader(data: bytes) -> Read:
    return io.BytesIO(data).read
