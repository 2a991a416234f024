"""Layers as blobs: writing a stored layer as a compressed tar, and storing a layer from such a blob."""

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from overlayfs.oci import compression, image_spec
from overlayfs.oci.compression import Compression, Compressor, DecompressingReader
from overlayfs.oci.layer_entries import EntryWithData, Omissions, layer_entries, merged_entries
from overlayfs.oci.layer_tar import Progress, source_date_epoch, tar_pieces, unpack_entries, unpack_tar
from overlayfs.oci.streams import PIECE, HashingReader, PeekableReader, Prefetch, Read, prefetch
from overlayfs.oci.tar_entry import ArchiveError
from overlayfs.store.layers import Layer, StagedLayer
from overlayfs.store.manifest import Manifest
from overlayfs.store.store import LayerStore

EntryGenerator = Generator[EntryWithData, None, None]
Sink = Callable[[bytes], object]
Notice = Callable[[str], None]
"""`notice(sentence)` is called for each kind of thing that an archive or a layer cannot keep."""
ImageProgress = Callable[[int, int, int], None]
"""`progress(layer, layers, bytes)` is called periodically; `layer` counts from 1, both are 0 while it is not known."""


class DigestError(ArchiveError):
    """A blob does not match its digest, its size, or the diff ID in the image's configuration."""


class LayerBlob(NamedTuple):
    """A compressed layer: digest and size in bytes of the blob, digest of the plain tar in it (its diff ID)."""

    digest: str
    size: int
    diff_id: str
    media_type: str

    def descriptor(self) -> image_spec.Descriptor:
        """Return the descriptor for a manifest."""
        return image_spec.Descriptor(self.media_type, self.digest, self.size)


def ignore_notice(_: str) -> None:
    """Ignore a notice."""


# --- from the store ------------------------------------------------------------------------------------------


def write_blob(
    store: LayerStore,
    layer: Layer,
    sink: Sink,
    kind: Compression = Compression.GZIP,
    progress: Progress | None = None,
    notice: Notice = ignore_notice,
) -> LayerBlob:
    """Write the canonical tar of a layer, compressed, by calling `sink(bytes)` with pieces of about 1 MiB.

    `sink` and `progress(bytes of the plain tar)` are called in the caller's thread. The same layer gives the same tar
    in every store, on every machine, at any time. Redirects and metacopies are resolved over the lower layers that
    the layer's record names. Raises `UserError` for what cannot be read.
    """
    omissions = Omissions()
    with ExitStack() as undo:
        below = [store.layers.find(each) for each in layer.record.below]
        for each in (layer, *below):
            undo.enter_context(each.hold())
        entries = _generate_entries(layer.tree_path, [each.tree_path for each in below], omissions)
        blob = write_entries(entries, sink, kind, progress)
    if layer.record.diff_id is None and source_date_epoch() is None:
        store.layers.note_diff_id(layer, blob.diff_id)  # importing this tar again finds this layer
    for sentence in omissions.sentences():
        notice(f"layer {layer.id[:12]}: {sentence}")
    return blob


def _generate_entries(tree: bytes, below: Sequence[bytes], omissions: Omissions) -> EntryGenerator:
    with layer_entries(tree, below, omissions) as entries:
        yield from entries


def write_entries(
    entries: EntryGenerator, sink: Sink, kind: Compression, progress: Progress | None = None
) -> LayerBlob:
    """Write the tar of some entries, compressed, to `sink`. The generator of the entries runs in another thread."""
    compressor = compression.compressor(kind)
    plain = _Tally()
    packed = plain if kind is Compression.NONE else _Tally()  # the same bytes need one hash
    with ExitStack() as undo:
        undo.callback(entries.close)
        undo.callback(compressor.close)
        tar = prefetch(undo, tar_pieces(entries, source_date_epoch()), "tar", join_timeout=None)
        blob = prefetch(undo, _compress(tar, plain, compressor), "compress", join_timeout=None)
        for piece in blob:
            if packed is not plain:
                packed.add(piece)
            sink(piece)
            if progress is not None:
                progress(plain.size)
    return LayerBlob(packed.digest, packed.size, plain.digest, kind.media_type)


class _Tally:
    """The digest and length of the bytes that were added."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def _compress(tar: Prefetch, plain: _Tally, compressor: Compressor) -> Iterator[bytes]:
    for piece in tar:
        plain.add(piece)
        yield from filter(None, compressor.feed(piece))
    yield from filter(None, compressor.finish())


# --- into the store ------------------------------------------------------------------------------------------


def read_blob(
    store: LayerStore,
    source: Read,
    *,
    descriptor: image_spec.Descriptor | None = None,
    diff_id: str | None = None,
    author: str = "",
    message: str = "",
    created: str | None = None,
    what: str = "the layer",
    progress: Progress | None = None,
    notice: Notice = ignore_notice,
) -> Layer:
    """Store a layer from a blob, plain or compressed; return it, or the equal layer that the store has already.

    `source(size)` returns some bytes, and ``b""`` at the end; it is called from another thread. Digest and size are
    checked against `descriptor`, the plain tar against `diff_id`. `progress(bytes of the plain tar)` is called
    periodically. Raises `ArchiveError` (`DigestError`), in which `what` names the layer; nothing is stored then.
    """
    details = LayerDetails(author, message, created)
    with prepare_blob(store, source, descriptor, diff_id, details, what, progress, notice) as prepared:
        return prepared.publish()


class LayerDetails(NamedTuple):
    """What a layer's record says about its origin; `created` is in RFC 3339 form, None for now."""

    author: str = ""
    message: str = ""
    created: str | None = None


class PreparedLayer:
    """A complete layer that is not yet part of the store; unless it is published, leaving its context discards it."""

    def __init__(self, staged: StagedLayer, manifest: Manifest, diff_id: str | None, details: LayerDetails) -> None:
        self._staged = staged
        self._manifest = manifest
        self._details = details
        self.diff_id = diff_id

    def publish(self) -> Layer:
        """Make it part of the store and return it, or return the equal layer that the store has already."""
        return self._staged.publish(manifest=self._manifest, diff_id=self.diff_id, **self._details._asdict())


@contextmanager
def prepare_blob(
    store: LayerStore,
    source: Read,
    descriptor: image_spec.Descriptor | None,
    diff_id: str | None,
    details: LayerDetails,
    what: str,
    progress: Progress | None = None,
    notice: Notice = ignore_notice,
) -> Iterator[PreparedLayer]:
    """Prepare a layer from a blob; arguments and errors are those of `read_blob`."""
    with store.layers.stage() as staged:
        try:
            found = _unpack_blob(source, staged, descriptor, diff_id, progress, notice)
        except ArchiveError as error:
            raise type(error)(f"{what} is refused: {error}") from error
        with Manifest.build(staged.tree_fd) as manifest:
            yield PreparedLayer(staged, manifest, found, details)


@contextmanager
def prepare_tree(
    store: LayerStore,
    tree: bytes,
    details: LayerDetails,
    progress: Progress | None = None,
    notice: Notice = ignore_notice,
) -> Iterator[PreparedLayer]:
    """Prepare a layer from a copy of the directory `tree`, leaving out the store itself if it is inside.

    `progress(bytes)` is called after each file.
    """
    omissions = Omissions()
    found = os.stat(store.path)
    with store.layers.stage() as staged:
        with merged_entries((tree,), omissions, frozenset(((found.st_dev, found.st_ino),))) as entries:
            unpacker = unpack_entries(entries, staged.tree_fd, progress)
        for sentence in (*omissions.sentences(), *unpacker.sentences()):
            notice(sentence)
        with Manifest.build(staged.tree_fd) as manifest:
            yield PreparedLayer(staged, manifest, None, details)


def _unpack_blob(
    source: Read,
    staged: StagedLayer,
    descriptor: image_spec.Descriptor | None,
    diff_id: str | None,
    progress: Progress | None,
    notice: Notice,
) -> str:
    """Unpack a blob into a staged layer, check all digests, and return the diff ID."""
    blob = HashingReader(source if descriptor is None else _limit(source, descriptor.size))
    with ExitStack() as undo:
        plain, read = _decompress(blob, undo)
        tar = prefetch(undo, iter(lambda: read(PIECE), b""), "decompress")
        unpacker = unpack_tar(tar.read, staged.tree_fd, progress)
    if descriptor is not None and (blob.digest, blob.size) != (descriptor.digest, descriptor.size):
        raise DigestError(f"it is {blob.digest} with {blob.size} bytes, not {descriptor.digest} as announced")
    if diff_id is not None and plain.digest != diff_id:
        raise DigestError(f"its content is {plain.digest}, not {diff_id} as in the image's configuration")
    for sentence in unpacker.sentences():
        notice(sentence)
    return plain.digest


def _limit(source: Read, size: int) -> Read:
    """Return a stream that raises `DigestError` when it turns out to be longer than `size` bytes."""
    left = size

    def read(limit: int) -> bytes:
        nonlocal left
        data = source(limit)
        left -= len(data)
        if left < 0:
            raise DigestError(f"it is longer than the {size} bytes that were announced")
        return data

    return read


def _decompress(blob: HashingReader, undo: ExitStack) -> tuple[HashingReader, Read]:
    """Return the plain tar of a blob: the reader that knows its digest, and the stream."""
    peeked = PeekableReader(blob.read)
    kind = compression.detect(peeked.peek(compression.LONGEST_MAGIC))
    if kind is Compression.NONE:
        return blob, peeked.read
    ahead = prefetch(undo, iter(lambda: peeked.read(PIECE), b""), "read")
    plain = HashingReader(DecompressingReader(ahead.read, kind).read)
    return plain, plain.read
