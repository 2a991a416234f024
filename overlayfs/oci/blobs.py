"""Layers as blobs: a stored layer as a compressed tar with its digests, and a stored layer from such a blob."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from overlayfs.oci import compression, image_spec
from overlayfs.oci.compression import Compression, Compressor, DecompressingReader
from overlayfs.oci.layer_entries import EntryWithData, Losses, layer_entries, merged_entries
from overlayfs.oci.layer_tar import Progress, source_date_epoch, tar_pieces, unpack_entries, unpack_tar
from overlayfs.oci.streams import PIECE, HashingReader, PeekableReader, Prefetch, Read
from overlayfs.oci.tar_entry import ArchiveError
from overlayfs.store.layers import Layer, StagedLayer
from overlayfs.store.manifest import Manifest
from overlayfs.store.store import LayerStore

Entries = Generator[EntryWithData, None, None]
Sink = Callable[[bytes], object]
Notice = Callable[[str], None]
"""`notice(sentence)` is called for each kind of thing that an archive or a layer cannot keep."""
ImageProgress = Callable[[int, int, int], None]
"""`progress(layer, layers, bytes)` is called periodically; `layer` counts from 1, both are 0 while it is not known."""


class DigestError(ArchiveError):
    """A blob is not what its digest, its size or the configuration of its image say."""


class LayerBlob(NamedTuple):
    """A compressed layer: sha256 and size of the blob, sha256 of the plain tar in it."""

    digest: str
    size: int
    diff_id: str
    media_type: str

    def descriptor(self) -> image_spec.Descriptor:
        """Return the descriptor by which a manifest points to it."""
        return image_spec.Descriptor(self.media_type, self.digest, self.size)


def ignore(_: str) -> None:
    """Take a notice and say nothing."""


# --- from the store ------------------------------------------------------------------------------------------


def write_blob(
    store: LayerStore,
    layer: Layer,
    sink: Sink,
    kind: Compression = Compression.GZIP,
    progress: Progress | None = None,
    notice: Notice = ignore,
) -> LayerBlob:
    """Give the canonical tar of a layer, compressed, to `sink`, in pieces of about 1 MiB and from this thread.

    The same layer gives the same tar, whatever the store, the machine and the time. Marks that count on layers below
    are resolved over the stack that the layer's record names.
    """
    losses = Losses()
    with ExitStack() as undo:
        below = [store.layer(each) for each in layer.record.below]
        for each in (layer, *below):
            undo.enter_context(each.hold())
        items = _layer_items(layer.tree_path, [each.tree_path for each in below], losses)
        blob = stream_blob(items, sink, kind, progress)
    if layer.record.diff_id is None and source_date_epoch() is None:
        store.note_diff_id(layer, blob.diff_id)  # whoever brings the same tar brings the same layer
    for sentence in losses.sentences():
        notice(f"layer {layer.id[:12]}: {sentence}")
    return blob


def _layer_items(tree: bytes, below: Sequence[bytes], losses: Losses) -> Entries:
    with layer_entries(tree, below, losses) as items:
        yield from items


def stream_blob(items: Entries, sink: Sink, kind: Compression, progress: Progress | None = None) -> LayerBlob:
    """Give the tar of items, compressed, to `sink`. The items are asked for in another thread."""
    squeeze = compression.compressor(kind)
    plain = _HashingWriter()
    packed = plain if kind is Compression.NONE else _HashingWriter()  # the same bytes need one hash
    with ExitStack() as undo:
        undo.callback(items.close)
        undo.callback(squeeze.close)
        tar = undo.enter_context(Prefetch(tar_pieces(items, source_date_epoch()), "tar", patience=None))
        blob = undo.enter_context(Prefetch(_squeezed(tar, plain, squeeze), "compress", patience=None))
        for piece in blob:
            if packed is not plain:
                packed.add(piece)
            sink(piece)
            if progress is not None:
                progress(plain.size)
    return LayerBlob(packed.digest, packed.size, plain.digest, kind.media_type)


class _HashingWriter(HashingReader):
    """Digest and length of what is pushed, not pulled."""

    def __init__(self) -> None:
        super().__init__(lambda _: b"")

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)


def _squeezed(tar: Prefetch, plain: _HashingWriter, squeeze: Compressor) -> Iterator[bytes]:
    for piece in tar:
        plain.add(piece)
        yield from filter(None, squeeze.feed(piece))
    yield from filter(None, squeeze.finish())


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
    notice: Notice = ignore,
) -> Layer:
    """Make a layer of the store from a blob, plain or compressed; return it, or the equal one that is there already.

    `source(n)` is called from a thread; it returns some bytes, ``b""`` at the end. Digest and size are checked against
    `descriptor`, the plain tar against `diff_id`. ArchiveError, with `what` it is, when it is refused: nothing stays.
    """
    details = LayerDetails(author, message, created)
    with prepared_blob(store, source, descriptor, diff_id, details, what, progress, notice) as prepared:
        return prepared.publish()


class LayerDetails(NamedTuple):
    """What a layer's record says of its making; `created` None: now."""

    author: str = ""
    message: str = ""
    created: str | None = None


class PreparedLayer:
    """A layer that is complete but for becoming a part of the store. Leaving its context without that discards it."""

    def __init__(self, staged: StagedLayer, manifest: Manifest, diff_id: str | None, details: LayerDetails) -> None:
        self._staged = staged
        self._manifest = manifest
        self._details = details
        self.diff_id = diff_id

    def publish(self) -> Layer:
        """Make it a part of the store and return it, or the equal layer that is there already."""
        return self._staged.publish(manifest=self._manifest, diff_id=self.diff_id, **self._details._asdict())


@contextmanager
def prepared_blob(
    store: LayerStore,
    source: Read,
    descriptor: image_spec.Descriptor | None,
    diff_id: str | None,
    details: LayerDetails,
    what: str,
    progress: Progress | None = None,
    notice: Notice = ignore,
) -> Iterator[PreparedLayer]:
    """Give a layer made of a blob, as `read_blob` describes it."""
    with store.new_layer() as staged:
        try:
            found = _unpack_blob(source, staged, descriptor, diff_id, progress, notice)
        except ArchiveError as error:
            raise type(error)(f"{what} is refused: {error}") from error
        with Manifest.build(staged.tree_fd) as manifest:
            yield PreparedLayer(staged, manifest, found, details)


@contextmanager
def prepared_tree(
    store: LayerStore, tree: bytes, details: LayerDetails, progress: Progress | None = None, notice: Notice = ignore
) -> Iterator[PreparedLayer]:
    """Give a layer that holds a copy of what a directory shows, the store itself left out if it lies inside."""
    losses = Losses()
    found = os.stat(store.path)
    with store.new_layer() as staged:
        with merged_entries((tree,), losses, frozenset(((found.st_dev, found.st_ino),))) as items:
            unpacker = unpack_entries(items, staged.tree_fd, progress)
        for sentence in (*losses.sentences(), *unpacker.sentences()):
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
    """Fill a staged layer, check all digests, and return the diff id."""
    blob = HashingReader(source if descriptor is None else _limited(source, descriptor.size))
    with ExitStack() as undo:
        plain, read = _expanded(blob, undo)
        tar = undo.enter_context(Prefetch(iter(lambda: read(PIECE), b""), "expand"))
        unpacker = unpack_tar(tar.read, staged.tree_fd, progress)
    if descriptor is not None and (blob.digest, blob.size) != (descriptor.digest, descriptor.size):
        raise DigestError(f"it is {blob.digest} with {blob.size} bytes, and was told to be {descriptor.digest}")
    if diff_id is not None and plain.digest != diff_id:
        raise DigestError(f"its content is {plain.digest}, and the image's configuration says {diff_id}")
    for sentence in unpacker.sentences():
        notice(sentence)
    return plain.digest


def _limited(source: Read, size: int) -> Read:
    """Return a stream that refuses to be longer than it was told to be."""
    left = size

    def read(most: int) -> bytes:
        nonlocal left
        data = source(most)
        left -= len(data)
        if left < 0:
            raise DigestError(f"it is longer than the {size} bytes that were told")
        return data

    return read


def _expanded(blob: HashingReader, undo: ExitStack) -> tuple[HashingReader, Read]:
    """Return the plain tar of a blob: what knows its digest, and the stream."""
    peeked = PeekableReader(blob.read)
    kind = compression.detect(peeked.peek(compression.LONGEST_MAGIC))
    if kind is Compression.NONE:
        return blob, peeked.read
    ahead = undo.enter_context(Prefetch(iter(lambda: peeked.read(PIECE), b""), "read"))
    plain = HashingReader(DecompressingReader(ahead.read, kind).read)
    return plain, plain.read
