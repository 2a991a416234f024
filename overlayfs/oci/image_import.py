"""Import: an image in the store from a directory, a layer, or an image in any of its forms, complete or not at all."""

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
from overlayfs.oci.image_layouts import DirectoryFiles, FoundImage, LayerSource
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
_LOOKED_AT = 64 * 1024
_TOGETHER = 64  # layers that wait for each other; each has descriptors open
# How the first member of an image in one file is called; anything else begins a layer.
_IMAGE_MEMBER = re.compile(
    rb"blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|(sha256:)?[0-9a-f]{64}(/.*|\.json|\.tar)?"
)


@dataclass(frozen=True)
class ImportOptions:
    """What the user says beside source and name. `platform` None: the host's."""

    platform: Platform | None = None
    author: str = ""
    message: str = ""
    progress: ImageProgress | None = None
    notice: Notice = field(default=ignore_notice)

    def layer_progress(self, layer: int, layers: int) -> Callable[[int], None] | None:
        """Return what is told the bytes of one layer."""
        progress = self.progress
        return None if progress is None else lambda done: progress(layer, layers, done)


def import_image(store: LayerStore, source: bytes, name: str, options: ImportOptions | None = None) -> ImageRecord:
    """Make an image of `source`: a path, ``PATH:NAME`` for one of several images in it, or ``-``; return its record.

    Layers that the store has are not read again. UserError (ArchiveError, DigestError, DocumentError) with a sentence
    when it is refused, and then nothing of it is in the store.
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
            return self._stream(0, "standard input", None)
        path, reference = _split(source)
        shown = os.fsdecode(path)
        with _opened(path) as fd:
            if os.path.isdir(path):
                return self._directory(fd, path, reference, shown)
            return self._stream(fd, shown, reference)

    # --- directories -----------------------------------------------------------------------------------

    def _directory(self, fd: int, path: bytes, reference: str | None, shown: str) -> ImageRecord:
        files = DirectoryFiles(fd)
        try:
            if image_layouts.is_layout(files):
                return self._found(image_layouts.find(files, reference, self._options.platform, shown), shown)
        finally:
            files.close()
        if reference is not None:
            raise UserError(f"{shown} is not an image layout, so it has no image {reference}")
        # By descriptor: what is imported is what was opened.
        inside = b"/proc/self/fd/%d" % fd
        progress = self._options.layer_progress(1, 1)
        with prepare_tree(self._store, inside, self._details(), progress, self._options.notice) as prepared:
            return self._single(prepared, shown)

    # --- streams ---------------------------------------------------------------------------------------

    def _stream(self, fd: int, shown: str, reference: str | None) -> ImageRecord:
        raw = PeekableReader(lambda size: os.read(fd, min(size, PIECE)))
        try:
            kind = compression.detect(raw.peek(compression.LONGEST_MAGIC))
            is_image = _may_be_image(raw.peek(_LOOKED_AT), kind)
        except ArchiveError as error:
            raise type(error)(f"{shown} is refused: {error}") from error
        if is_image or reference is not None:
            return self._members(fd, kind, raw.read, shown, reference)
        return self._layer(raw.read, shown)

    def _members(self, fd: int, kind: Compression, raw: Read, shown: str, reference: str | None) -> ImageRecord:
        with ExitStack() as undo:
            if kind is not Compression.NONE or not _is_seekable(fd):
                fd = self._spooled(DecompressingReader(raw, kind).read, undo)
            try:
                files = TarIndex(fd)
            except ArchiveError as error:
                raise type(error)(f"{shown} is refused: {error}") from error
            if image_layouts.is_layout(files) or image_layouts.is_docker(files):
                return self._found(image_layouts.find(files, reference, self._options.platform, shown), shown)
            if reference is not None:
                raise UserError(f"{shown} is not an archive of images, so it has no image {reference}")
            return self._layer(extent_stream(fd, 0, sysio.stat_at(fd, b"").st_size), shown)

    def _spooled(self, read: Read, undo: ExitStack) -> int:
        """Return an unnamed file of the store with all of a stream that cannot be read twice."""
        fd = unnamed_file(self._store.directory.subdirectories[layout.STAGING])
        undo.callback(sysio.close, fd)
        at = 0
        while data := read(PIECE):
            at += sysio.write_at(fd, at, data)
            if self._options.progress is not None:
                self._options.progress(0, 0, at)
        return fd

    def _layer(self, read: Read, shown: str) -> ImageRecord:
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
            return self._single(prepared, shown)

    # --- images ----------------------------------------------------------------------------------------

    def _details(self, step: HistoryEntry | None = None) -> LayerDetails:
        if step is None:
            return LayerDetails(self._options.author, self._options.message, None)
        return LayerDetails(step.author, step.comment or step.created_by, step.created or None)

    def _single(self, prepared: PreparedLayer, shown: str) -> ImageRecord:
        """Put the image of one layer that came without a configuration."""
        time = now()
        step = HistoryEntry(time, self._options.author, f"import {shown}", self._options.message)
        platform = self._options.platform or platforms.host()
        config = ImageConfig(
            platform.architecture, platform.os, platform.variant, time, self._options.author, history=(step,)
        )
        return self._store.put_image(image.image_record(self._name, config, (prepared.publish(),)))

    def _found(self, found: FoundImage, shown: str) -> ImageRecord:
        """Bring in the layers that are missing, publish them when all are there, then put the image."""
        ready: dict[str, Layer] = {}
        with ExitStack() as undo:
            waiting: dict[str, PreparedLayer] = {}
            for number, (layer, step) in enumerate(_with_steps(found), 1):
                if layer.diff_id in ready or layer.diff_id in waiting:
                    continue
                there = self._store.by_diff_id(layer.diff_id)
                if there is not None:
                    ready[layer.diff_id] = there
                    continue
                what = f"layer {number} of {shown}"
                waiting[layer.diff_id] = undo.enter_context(self._prepared(layer, step, what, number, found))
                if len(waiting) == _TOGETHER:
                    _publish(waiting, ready, undo)
            _publish(waiting, ready, undo)
        stack = tuple(ready[layer.diff_id] for layer in found.layers)
        return self._store.put_image(image.image_record(self._name, found.config, stack, found.annotations))

    @contextmanager
    def _prepared(
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


def _publish(waiting: dict[str, PreparedLayer], ready: dict[str, Layer], undo: ExitStack) -> None:
    """Make layers parts of the store, and give back what they held while they were prepared."""
    while waiting:
        diff_id, prepared = waiting.popitem()
        ready[diff_id] = prepared.publish()
    undo.close()


def _with_steps(found: FoundImage) -> Iterator[tuple[LayerSource, HistoryEntry | None]]:
    """Yield each layer with the step of the history that made it."""
    steps = iter([step for step in found.config.history or () if not step.empty_layer])
    for layer in found.layers:
        yield layer, next(steps, None)


def _split(source: bytes) -> tuple[bytes, str | None]:
    """Return path and name of ``PATH[:NAME]``: the longest path that exists counts."""
    if os.path.lexists(source):
        return source, None
    cut = len(source)
    while (cut := source.rfind(b":", 0, cut)) > 0:
        if os.path.lexists(source[:cut]):
            return source[:cut], os.fsdecode(source[cut + 1 :])
    return source, None


@contextmanager
def _opened(path: bytes) -> Iterator[int]:
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
    """Return whether a stream that starts so is an image in one file; ArchiveError when it is no archive at all."""
    plain = DecompressingReader(_reader(start), kind)
    try:
        first = next((entry for entry in TarReader(plain.read) if entry.path), None)
    except ArchiveError:
        if len(start) < _LOOKED_AT:
            raise
        return False  # a first entry that is longer than what was looked at
    return first is not None and _IMAGE_MEMBER.fullmatch(first.path) is not None


def _reader(data: bytes) -> Read:
    return io.BytesIO(data).read
