"""Verification: compares everything in a store with what was recorded when it was made.

A record has its own checksum and the sha256 of the manifest; the manifest has type, attributes and the xxh3-128 of the
content of every entry. So a flipped bit is found wherever it is, and each difference has a path. A damaged manifest is
made again from the tree: if the result has the digest in the record, the tree is intact.

xxh3 detects accidental damage. Against an adversary who can write to the store, only the sha256 of a manifest that was
kept elsewhere proves anything.
"""

import contextlib
import errno
import os
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, records, scan
from overlayfs.store.entries import Entry, Type, order
from overlayfs.store.layers import Layer, Layers, layer_path
from overlayfs.store.manifest import DamagedError, Manifest
from overlayfs.store.records import ImageRecord, LayerRecord, WorkspaceRecord
from overlayfs.store.scan import Progress, Scanned
from overlayfs.store.store_directory import StoreDirectory

DAMAGED, MISSING, EXTRA, UNREADABLE = "damaged", "missing", "extra", "unreadable"
RECORD, MANIFEST, INDEX, REMOTE = "record", "manifest", "index", "remote"

ATTRIBUTE_WORDS = ("mode ", "owner ", "modification time", "attribute ")
"""Beginnings of the differences that can be repaired without making the object again."""


class Problem(NamedTuple):
    """One thing that is not as recorded.

    kind: "damaged", "missing", "extra" or "unreadable" for the entry `path` of a layer's tree (``b""``: its root);
    "manifest", "record" or "remote" for these files of a layer, "index" if its digest does not lead to it. For an image
    or workspace, whose record's path is `path` while `layer` is empty: "record", or "missing" for a layer it names.
    differs: what is different, in words; empty if the kind says everything.
    """

    layer: str
    path: bytes
    kind: str
    differs: tuple[str, ...] = ()


class Checked(NamedTuple):
    """The result of a verification. size: bytes read. unfinished: the layers that have no manifest yet."""

    layers: int
    entries: int
    size: int
    unfinished: tuple[str, ...]
    problems: tuple[Problem, ...]


def image_records(store_dir: StoreDirectory) -> Iterator[ImageRecord]:
    """Yield every image whose record can be read."""
    for file in store_dir.names(layout.IMAGES):
        with contextlib.suppress(UserError, FileNotFoundError):
            path = layout.IMAGES + b"/" + file
            yield records.decode(store_dir.read(path), ImageRecord, store_dir.display_path(path))


# --- one tree ----------------------------------------------------------------------------------------------


def compare(manifest: Manifest, found: Iterator[Scanned]) -> Iterator[tuple[str, Entry, tuple[str, ...]]]:
    """Yield (kind, entry, differences) for every entry of a tree that differs from the manifest.

    The entry is the manifest's, or the tree's if it is extra. Raises `DamagedError` if the manifest cannot be read.
    """
    broken: set[bytes] = set()  # first names of files whose content differs: it differs under their other names too
    unlisted = None  # a directory that cannot be listed: its entries are not missing
    for expected, scanned in _pair(iter(manifest.entries), found):
        if scanned is None:
            assert expected is not None
            if unlisted is None or not _is_in(expected.path, unlisted):
                yield MISSING, expected, ()
        elif expected is None:
            yield EXTRA, scanned.entry, ()
        elif scanned.error is not None:
            unlisted = expected.path if expected.type is Type.DIR else unlisted
            broken.add(expected.path)
            yield UNREADABLE, expected, (_reason(scanned.error),)
        else:
            differs = _differences(expected, scanned.entry, broken)
            if differs:
                yield DAMAGED, expected, differs


def _pair(expected: Iterator[Entry], found: Iterator[Scanned]) -> Iterator[tuple[Entry | None, Scanned | None]]:
    """Merge two streams that are in the order of a manifest, by path."""
    left, right = next(expected, None), next(found, None)
    while left is not None or right is not None:
        if left is not None and right is not None and left.path == right.entry.path:
            yield left, right
            left, right = next(expected, None), next(found, None)
        elif right is None or (left is not None and order(left.path) < order(right.entry.path)):
            yield left, None
            left = next(expected, None)
        else:
            yield None, right
            right = next(found, None)


def _is_in(path: bytes, directory: bytes) -> bool:
    return path != directory and (not directory or path.startswith(directory + b"/"))


def _reason(error: OSError) -> str:
    return error.strerror or errno.errorcode.get(error.errno or 0, "error")


def _differences(expected: Entry, found: Entry, broken: set[bytes]) -> tuple[str, ...]:
    if expected == found:
        return ("content",) if expected.link in broken and expected.link is not None else ()
    if expected.type is not found.type:
        return (f"is a {_word(found.type)} instead of a {_word(expected.type)}",)
    differs = tuple(_attributes(expected, found))
    if _content_differs(expected, found, broken):
        broken.add(expected.path)
        differs = ("content", *differs)
    return differs


def _content_differs(expected: Entry, found: Entry, broken: set[bytes]) -> bool:
    if expected.link is not None:
        return expected.link in broken
    return expected.type is Type.FILE and (expected.xxh3 != found.xxh3 or expected.size != found.size)


def _attributes(expected: Entry, found: Entry) -> Iterator[str]:
    if expected.mode != found.mode:
        yield f"mode {found.mode:04o} instead of {expected.mode:04o}"
    if (expected.uid, expected.gid) != (found.uid, found.gid):
        yield f"owner {found.uid}:{found.gid} instead of {expected.uid}:{expected.gid}"
    if expected.size != found.size:
        yield f"size {found.size} instead of {expected.size}"
    if expected.mtime_ns != found.mtime_ns:
        yield "modification time"
    if expected.rdev != found.rdev:
        yield f"device {_device(found.rdev)} instead of {_device(expected.rdev)}"
    if expected.target != found.target:
        yield "target"
    if expected.link != found.link:
        yield "hard link"
    for name in sorted({name for name, _ in set(expected.xattrs) ^ set(found.xattrs)}):
        yield f"attribute {os.fsdecode(name)}"


_WORDS = {
    Type.FILE: "file", Type.DIR: "directory", Type.SYMLINK: "symbolic link", Type.FIFO: "FIFO", Type.SOCKET: "socket",
    Type.CHAR: "character device", Type.BLOCK: "block device", Type.WHITEOUT: "whiteout",
}  # fmt: skip


def _word(kind: Type) -> str:
    return _WORDS[kind]


def _device(rdev: int) -> str:
    return f"{os.major(rdev)}:{os.minor(rdev)}"


# --- one layer ---------------------------------------------------------------------------------------------


class LayerCheck:
    """Verifies one layer, which the caller holds. `entries` and `size` (bytes) count what was read."""

    def __init__(self, layer: Layer, threads: int | None = None, progress: Progress | None = None) -> None:
        self._layer = layer
        self._threads = threads
        self._progress = progress
        self.entries = 0
        self.size = 0

    def run(self) -> Iterator[Problem]:
        """Yield the problems of manifest and tree."""
        tree = self._layer.tree_fd()
        try:
            with self._open_manifest() as manifest:
                yield from self._check(tree, manifest)
        except (FileNotFoundError, NotADirectoryError):
            yield Problem(self._layer.id, b"", MANIFEST, ("missing",))
            yield from self._prove(tree)
        finally:
            sysio.close(tree)

    def _open_manifest(self) -> Manifest:
        return Manifest.open(self._layer.manifest_fd(), f"the manifest of layer {self._layer.id}")

    def _check(self, tree: int, manifest: Manifest) -> Iterator[Problem]:
        if manifest.digest != self._layer.record.digest:
            yield Problem(self._layer.id, b"", MANIFEST, ("content",))
            yield from self._prove(tree)
            return
        with self._scan(tree) as scanning:
            for kind, entry, differs in compare(manifest, map(self._count, scanning)):
                yield Problem(self._layer.id, entry.path, kind, differs)

    def _scan(self, tree: int) -> contextlib.closing[Generator[Scanned, None, None]]:
        return contextlib.closing(scan.scan(tree, self._threads, self._report))

    def _count(self, scanned: Scanned) -> Scanned:
        self.entries += 1
        if scanned.entry.xxh3 is not None:
            self.size += scanned.entry.size
        return scanned

    def _report(self, entries: int, size: int) -> None:
        if self._progress is not None:
            self._progress(entries, size)

    def _prove(self, tree: int) -> Iterator[Problem]:
        """Compare the record's digest with that of a manifest made from the tree, when the layer's own is damaged."""
        try:
            with (
                self._scan(tree) as scanning,
                Manifest.of(scan.required(self._count(each)) for each in scanning) as made,
            ):
                if made.digest != self._layer.record.digest:
                    yield Problem(self._layer.id, b"", DAMAGED, ("something in it; the manifest cannot say what",))
        except OSError as error:
            yield Problem(self._layer.id, error.filename or b"", UNREADABLE, (_reason(error),))


NamedRecord = TypeVar("NamedRecord", ImageRecord, WorkspaceRecord)


# --- a store -----------------------------------------------------------------------------------------------


def verify(
    store_dir: StoreDirectory, ids: tuple[str, ...] | None, threads: int | None = None, progress: Progress | None = None
) -> Checked:
    """Verify the layers `ids`, or with None the whole store: all layers, images and workspaces.

    `progress(entries, bytes)` is called periodically with the sums over all layers. Waits for a layer that is being
    repaired.
    """
    layers = Layers(store_dir)
    check = _StoreCheck(layers, threads, progress)
    for layer_id in tuple(layers.ids()) if ids is None else ids:
        check.layer(layer_id, wanted=ids is not None)
    if ids is None:
        check.images_and_workspaces()
    return check.result()


def recorded_size(store_dir: StoreDirectory, ids: tuple[str, ...] | None) -> int:
    """Return the bytes of the files of the layers `ids`, None: of all layers, as far as their records can be read."""
    layers, size = Layers(store_dir), 0
    for layer_id in layers.ids() if ids is None else ids:
        with contextlib.suppress(UserError):
            layer = layers.get(layer_id)
            size += 0 if layer is None else layer.record.size
    return size


class _StoreCheck:
    """Verifies layers one after the other and adds up the results."""

    def __init__(self, layers: Layers, threads: int | None, progress: Progress | None) -> None:
        self._layers = layers
        self._threads = threads
        self._progress = progress
        self._problems: list[Problem] = []
        self._unfinished: list[str] = []
        self._count = 0
        self._entries = 0
        self._size = 0

    def result(self) -> Checked:
        """Return the results so far."""
        return Checked(self._count, self._entries, self._size, tuple(self._unfinished), tuple(self._problems))

    def layer(self, layer_id: str, wanted: bool) -> None:
        """Verify one layer; a layer that is gone is a problem only if it is `wanted`."""
        try:
            layer = self._layers.get(layer_id)
        except UserError:
            self._problems.append(Problem(layer_id, b"", RECORD, ("content",)))
            return
        if layer is None:
            if wanted:
                self._problems.append(Problem(layer_id, b"", MISSING))
            return
        if layer.id != layer_id:
            self._problems.append(Problem(layer_id, b"", RECORD, ("it is another layer's",)))
            return
        with layer.hold():
            self._verify(layer)

    def _verify(self, layer: Layer) -> None:
        if layer.record.state == "hashing":
            self._unfinished.append(layer.id)
            return
        check = LayerCheck(layer, self._threads, self._report)
        try:
            self._problems.extend(check.run())
        except DamagedError:  # its sha256 is right: it was written like this
            self._problems.append(Problem(layer.id, b"", MANIFEST, ("content",)))
        if not self._is_indexed(layer.record):
            self._problems.append(Problem(layer.id, b"", INDEX))
        if not self._has_valid_cache(layer):
            self._problems.append(Problem(layer.id, b"", REMOTE, ("content",)))
        self._count += 1
        self._entries += check.entries
        self._size += check.size

    def _report(self, entries: int, size: int) -> None:
        if self._progress is not None:
            self._progress(self._entries + entries, self._size + size)

    def _has_valid_cache(self, layer: Layer) -> bool:
        store_dir = self._layers.store_dir
        try:
            return records.has_valid_checksum(store_dir.read(layer_path(layer.id), layout.REMOTE))
        except FileNotFoundError:
            return True

    def _is_indexed(self, record: LayerRecord) -> bool:
        """Return whether the indexes lead to a layer; they need not if images use an equal one instead."""
        if record.same_as is not None:
            return True
        wanted = ((layout.DIGESTS, record.digest), (layout.DIFFS, record.diff_id))
        return all(
            record.id in self._index(subdirectory, digest) for subdirectory, digest in wanted if digest is not None
        )

    def _index(self, subdirectory: bytes, digest: str) -> list[str]:
        store_dir, name = self._layers.store_dir, layout.digest_file(digest)
        try:
            *lines, end = [] if name is None else os.fsdecode(store_dir.read(subdirectory, name)).split("\n")
        except (FileNotFoundError, ValueError):
            return []
        return [] if end else lines

    # --- images and workspaces -------------------------------------------------------------------------

    def images_and_workspaces(self) -> None:
        """Verify that every image and workspace can be read and that its layers are there."""
        store_dir = self._layers.store_dir
        if store_dir.read(layout.FORMAT_FILE) != layout.format_document():
            self._problems.append(Problem("", layout.FORMAT_FILE, RECORD, ("content",)))
        for file in store_dir.names(layout.IMAGES):
            self._verify_record(layout.IMAGES + b"/" + file, ImageRecord)
        for file in store_dir.names(layout.WORKSPACES):
            self._verify_record(layout.WORKSPACES + b"/" + file + b"/" + layout.RECORD, WorkspaceRecord)

    def _verify_record(self, path: bytes, kind: type[NamedRecord]) -> None:
        store_dir = self._layers.store_dir
        try:
            record = records.decode(store_dir.read(path), kind, store_dir.display_path(path))
        except FileNotFoundError:  # removed meanwhile, or still being made
            return
        except UserError:
            self._problems.append(Problem("", path, RECORD, ("content",)))
            return
        if layout.file_name(record.name) not in path.split(b"/"):
            self._problems.append(Problem("", path, RECORD, ("it is another one's",)))
        for layer_id in record.layers:
            if not store_dir.exists(layer_path(layer_id) + b"/" + layout.RECORD):
                self._problems.append(Problem("", path, MISSING, (f"layer {layer_id}",)))
