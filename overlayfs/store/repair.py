"""Repair: restores the damaged entries of a layer to what its manifest says, from any copy of their content.

Owner, mode, times, attributes, targets and whiteouts are in the manifest itself. Content comes from any file with the
right hash: under another name in the same layer, in another layer, in another store, or in an image that is pulled from
a registry for this. The copy is hashed before it is put in place.

Each object is built in staging, synced and renamed. A killed repair has done part of its work, and verification finds
the rest. The layer is locked exclusively meanwhile.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, records, scan, verify
from overlayfs.store.entries import Entry, Type, is_portable
from overlayfs.store.layers import Layer, Layers, layer_path, write_manifest
from overlayfs.store.manifest import DamagedError, Manifest
from overlayfs.store.records import ImageRecord, LayerRecord
from overlayfs.store.store import LayerStore
from overlayfs.store.verify import EXTRA, Problem
from overlayfs.tree.staging import copy_data
from overlayfs.tree.workdir import remove_tree

_NEW = b"new"  # the name of an object while it is built
_KINDS = {
    Type.FIFO: stat.S_IFIFO, Type.SOCKET: stat.S_IFSOCK, Type.CHAR: stat.S_IFCHR, Type.BLOCK: stat.S_IFBLK,
    Type.WHITEOUT: stat.S_IFCHR,
}  # fmt: skip
_MAX_CANDIDATES = 4  # files to try for one content
_PATH = os.O_PATH | os.O_DIRECTORY
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW

Load = Callable[[bytes, str], LayerStore]
"""load(path, reference): creates a store in a new directory and pulls the image of a registry into it."""

Report = Callable[[str], None]
"""report(text): called with what is being done, in a few words."""


class _Item(NamedTuple):
    """One difference to repair: the entry as it must be, or as it is if it is EXTRA."""

    kind: str
    entry: Entry
    differs: tuple[str, ...]


class _Candidate(NamedTuple):
    """A file that has a wanted content according to its manifest."""

    layer: Layer
    path: bytes


_Content = tuple[str, int]  # xxh3-128 in hex, size in bytes


def repair(store: LayerStore, problems: tuple[Problem, ...], sources: tuple[LayerStore, ...], report: Report) -> None:
    """Repair what can be repaired in the layers with problems.

    `sources` are stores to take content from, best first. Verification finds what is still wrong. Raises UserError if
    a damaged layer is in use.
    """
    layers = Layers(store.directory)
    for problem in problems:
        if not problem.layer and problem.kind == verify.RECORD:
            _restore_image(store, problem.path, sources)
    for layer_id in dict.fromkeys(problem.layer for problem in problems if problem.layer):
        kinds = {problem.kind for problem in problems if problem.layer == layer_id}
        if verify.RECORD in kinds and not _restore_record(layers, layer_id):
            continue
        if verify.REMOTE in kinds:
            _remove_blob_info_cache(layers, layer_id)
        layer = layers.get(layer_id)
        if layer is not None:
            report(f"repairing layer {layer_id[:12]}")
            _LayerRepair(store, layer, sources).run()
            with layers.publishing():
                layers.index(layer.record)


# --- records and manifests ---------------------------------------------------------------------------------


def _restore_record(layers: Layers, layer_id: str) -> bool:
    """Write a new record for a layer from its manifest; False if no index confirms the manifest's digest.

    Author and message are lost; the time of creation becomes the manifest's modification time.
    """
    try:
        fd = layers.store_dir.open(layer_path(layer_id) + b"/" + layout.MANIFEST, os.O_RDONLY)
    except FileNotFoundError:
        return False
    changed = sysio.stat_at(fd, b"").st_mtime
    with Manifest.open(fd) as manifest:
        if layer_id not in layers.index_lines(layout.DIGESTS, manifest.digest):
            return False
        record = LayerRecord(
            id=layer_id,
            state="complete",
            created=datetime.fromtimestamp(changed, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            message="(record restored)",
            digest=manifest.digest,
            size=manifest.size,
            entries=len(manifest.entries),
            flags=manifest.flags,
            below=_below(layers, layer_id) if manifest.flags else (),
        )
    with layers.publishing():
        layers.write_record(record)
    return True


def _restore_image(store: LayerStore, path: bytes, sources: tuple[LayerStore, ...]) -> None:
    """Copy the record of an image from a store with an image of this name, if its layers are here."""
    for source in sources:
        with contextlib.suppress(FileNotFoundError, UserError):
            if path.startswith(layout.IMAGES + b"/"):
                store.images.put(records.decode(source.directory.read(path), ImageRecord, ""))
                return


def _remove_blob_info_cache(layers: Layers, layer_id: str) -> None:
    """Remove the damaged cache of what registries have; it is filled again by use."""
    directory = layers.store_dir.open(layer_path(layer_id))
    try:
        sysio.unlink_at(directory, layout.REMOTE)
    finally:
        sysio.close(directory)


def _below(layers: Layers, layer_id: str) -> tuple[str, ...]:
    """Return the ids of the layers below this one in any image that has it."""
    for image in verify.image_records(layers.store_dir):
        if layer_id in image.layers:
            return image.layers[image.layers.index(layer_id) + 1 :]
    return ()


def _find_manifest(layer: Layer, tree: int, sources: tuple[LayerStore, ...]) -> Manifest | None:
    """Return a manifest with the digest of the record: the layer's own, one made from the tree, or a copy elsewhere."""
    digest = layer.record.digest
    for candidate in _manifests(layer, tree, sources):
        if candidate.digest == digest:
            return candidate
        candidate.close()
    return None


def _manifests(layer: Layer, tree: int, sources: tuple[LayerStore, ...]) -> Iterator[Manifest]:
    with contextlib.suppress(FileNotFoundError):
        yield Manifest.open(layer.manifest_fd())
    with contextlib.suppress(OSError):
        yield Manifest.build(tree)
    for source in sources:
        other = source.layers.by_digest(layer.record.digest or "")
        if other is not None and other.path != layer.path:
            with contextlib.suppress(FileNotFoundError):
                yield Manifest.open(other.manifest_fd())


# --- one layer ---------------------------------------------------------------------------------------------


class _LayerRepair:
    """Repairs one layer."""

    def __init__(self, store: LayerStore, layer: Layer, sources: tuple[LayerStore, ...]) -> None:
        self._store = store
        self._layer = layer
        self._sources = (*sources, store)
        self._touched: set[bytes] = set()  # directories whose times must be restored

    def run(self) -> None:
        """Repair what can be repaired."""
        with ExitStack() as closing:
            closing.enter_context(self._layer.hold_exclusively())
            self._tree = self._opened(self._layer.tree_path, closing)
            self._layer_dir = self._opened(self._layer.path, closing)
            # gc removes what a killed repair leaves in staging, like any unfinished layer.
            self._staging = closing.enter_context(self._store.layers.stage()).tree_fd
            manifest = _find_manifest(self._layer, self._tree, self._sources)
            if manifest is None:
                return
            closing.enter_context(manifest)
            if not self._has_manifest():
                write_manifest(self._layer_dir, manifest)
            self._restore_entries(manifest)

    def _has_manifest(self) -> bool:
        try:
            with Manifest.open(self._layer.manifest_fd()) as own:
                return own.digest == self._layer.record.digest
        except FileNotFoundError:
            return False

    @staticmethod
    def _opened(path: bytes, held: ExitStack) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(sysio.close, fd)
        return fd

    def _restore_entries(self, manifest: Manifest) -> None:
        with contextlib.closing(scan.scan(self._tree)) as scanning:
            items = [_Item(*each) for each in verify.compare(manifest, scanning)]
        if not items:
            return
        contents = self._contents(items)
        for item in items:
            if item.kind == EXTRA:
                self._remove(item.entry.path)
        for item in items:
            if item.kind != EXTRA:
                self._restore(item, contents)
        self._restore_times(manifest)
        sysio.syncfs(self._tree)

    # --- finding content ------------------------------------------------------------------------------

    def _contents(self, items: list[_Item]) -> dict[_Content, list[_Candidate]]:
        """Return the candidates for the content of the files that must be made again."""
        found: dict[_Content, list[_Candidate]] = {}
        for item in items:
            wanted = _wanted(item.entry)
            if wanted is not None and item.kind != EXTRA and not _only_attributes(item):
                found[wanted] = self._own_names(item.entry, items)
        if found:
            for layer in self._layers():
                _add_candidates(layer, found)
        return found

    def _own_names(self, entry: Entry, items: list[_Item]) -> list[_Candidate]:
        """Return the other names of a file in the same layer: if the link is broken, one of them may be intact."""
        names = (item.entry.path for item in items if item.entry.link == entry.path and item.kind != EXTRA)
        return [_Candidate(self._layer, name) for name in names]

    def _layers(self) -> Iterator[Layer]:
        """Yield every layer that content may be taken from, once."""
        seen = set()
        for source in self._sources:
            for layer in source.layers():
                if layer.record.state == "complete" and layer.path not in seen:
                    seen.add(layer.path)
                    yield layer

    # --- putting in place ------------------------------------------------------------------------------

    def _remove(self, path: bytes) -> None:
        directory, name = os.path.split(path)
        with contextlib.suppress(FileNotFoundError), self._directory(directory) as dirfd:  # removed with its directory
            remove_tree(dirfd, name)
            self._touched.add(directory)

    def _restore(self, item: _Item, contents: dict[_Content, list[_Candidate]]) -> None:
        entry = item.entry
        directory, name = os.path.split(entry.path)
        if entry.type is Type.DIR and self._is_directory(entry.path):
            with self._directory(entry.path) as dirfd:
                _apply_attributes(dirfd, b"", entry)
            self._touched.add(entry.path)
            return
        with (
            contextlib.suppress(FileNotFoundError),
            self._directory(directory) as dirfd,
        ):  # its directory could not be restored
            if _only_attributes(item):
                _apply_attributes(dirfd, name, entry)
            elif self._link(entry) if entry.link is not None else self._build(entry, contents):
                self._move(dirfd, name, entry)

    def _is_directory(self, path: bytes) -> bool:
        try:
            with self._directory(path):
                return True
        except OSError:
            return False

    @contextlib.contextmanager
    def _directory(self, path: bytes) -> Iterator[int]:
        fd = sysio.open_beneath(self._tree, path, _PATH | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            sysio.close(fd)

    def _link(self, entry: Entry) -> bool:
        """Create a hard link to a file in staging; False if the file is not there."""
        directory, name = os.path.split(entry.link or b"")
        try:
            with self._directory(directory) as dirfd:
                sysio.link_at(dirfd, name, self._staging, _NEW)
        except FileNotFoundError:
            return False
        return True

    def _build(self, entry: Entry, contents: dict[_Content, list[_Candidate]]) -> bool:
        """Build an object in staging, complete; False if its content is not found."""
        if entry.type is Type.FILE:
            if not self._build_file(entry, contents):
                return False
        elif entry.type is Type.DIR:
            sysio.mkdir_at(self._staging, _NEW, 0o700)
        elif entry.type is Type.SYMLINK:
            sysio.symlink_at(entry.target or b"", self._staging, _NEW)
        else:
            sysio.mknod_at(self._staging, _NEW, _KINDS[entry.type] | entry.mode, entry.rdev)
        if entry.type is not Type.WHITEOUT:
            _apply_attributes(self._staging, _NEW, entry)
        return True

    def _build_file(self, entry: Entry, contents: dict[_Content, list[_Candidate]]) -> bool:
        wanted = _wanted(entry)
        if wanted is None:
            _create_file(self._staging, lambda fd: sysio.truncate_fd(fd, entry.size))
            return True
        return any(self._copy(candidate, wanted) for candidate in contents.get(wanted, ()))

    def _copy(self, candidate: _Candidate, wanted: _Content) -> bool:
        """Copy a file to staging; False, and no copy is left, if it does not have the wanted content."""
        try:
            with contextlib.ExitStack() as closing:
                tree = self._opened(candidate.layer.tree_path, closing)
                source = sysio.open_beneath(tree, candidate.path, _READ)
                closing.callback(sysio.close, source)
                if stat.S_ISREG(sysio.stat_at(source, b"").st_mode):
                    _create_file(self._staging, lambda fd: copy_data(source, fd))
            if _hash_of(self._staging, _NEW) == wanted:
                return True
        except OSError:  # try the next candidate
            pass
        remove_tree(self._staging, _NEW)
        return False

    def _move(self, dirfd: int, name: bytes, entry: Entry) -> None:
        """Move an object from staging to its place; a file is synced first."""
        if entry.type is Type.FILE:
            fd = sysio.open_child(self._staging, _NEW, _READ)
            try:
                sysio.fsync(fd)
            finally:
                sysio.close(fd)
        if entry.type is Type.DIR or self._is_directory(entry.path):
            remove_tree(dirfd, name)
        sysio.rename_at(self._staging, _NEW, dirfd, name)
        remove_tree(self._staging, _NEW)  # rename(2) leaves both names if they are the same file
        self._touched.add(os.path.dirname(entry.path))
        if entry.type is Type.DIR:
            self._touched.add(entry.path)

    def _restore_times(self, manifest: Manifest) -> None:
        """Restore the times of the directories that the repair has changed, the deepest first."""
        times = [(entry.path, entry.mtime_ns) for entry in manifest.entries if entry.path in self._touched]
        for path, mtime in reversed(times):
            with contextlib.suppress(OSError), self._directory(path) as dirfd:  # it may not have been restored
                sysio.utimens_at(dirfd, b"", None, mtime)


def _only_attributes(item: _Item) -> bool:
    return item.kind == verify.DAMAGED and all(each.startswith(verify.ATTRIBUTE_WORDS) for each in item.differs)


def _wanted(entry: Entry) -> _Content | None:
    """Return hash and size of a file's content; None if it has no data of its own."""
    return None if entry.xxh3 is None or entry.size == 0 else (entry.xxh3, entry.size)


def _add_candidates(layer: Layer, found: dict[_Content, list[_Candidate]]) -> None:
    """Add the files of a layer that have one of the contents in `found`."""
    with contextlib.suppress(FileNotFoundError, DamagedError), Manifest.open(layer.manifest_fd()) as manifest:
        for entry in manifest.entries:
            wanted = _wanted(entry)
            if wanted in found and wanted is not None and len(found[wanted]) < _MAX_CANDIDATES:
                found[wanted].append(_Candidate(layer, entry.path))


def _create_file(staging: int, fill: Callable[[int], None]) -> None:
    fd = sysio.open_child(staging, _NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fill(fd)
    finally:
        sysio.close(fd)


def _hash_of(dirfd: int, name: bytes) -> _Content:
    fd = sysio.open_child(dirfd, name, _READ)
    try:
        return scan.hash_file(fd)
    finally:
        sysio.close(fd)


def _apply_attributes(dirfd: int, name: bytes, entry: Entry) -> None:
    """Give an object the owner, attributes, mode and time of an entry; attributes not part of a layer stay."""
    found = sysio.stat_at(dirfd, name)
    if (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
        sysio.chown_at(dirfd, name, entry.uid, entry.gid)
    wanted = dict(entry.xattrs)
    for attribute in sysio.listxattr_at(dirfd, name):
        if is_portable(attribute) and attribute not in wanted:
            sysio.removexattr_at(dirfd, name, attribute)
    for attribute, value in wanted.items():  # after the owner: chown(2) removes capabilities
        sysio.setxattr_at(dirfd, name, attribute, value)
    if entry.type is not Type.SYMLINK:
        sysio.chmod_at(dirfd, name, entry.mode)
    sysio.utimens_at(dirfd, name, None, entry.mtime_ns)


# --- sources ------------------------------------------------------------------------------------------


def source_stores(
    store: LayerStore, given: str, load: Load, report: Report, opened: ExitStack
) -> tuple[LayerStore, ...]:
    """Return the stores, other than `store`, to take content from; they are closed with `opened`.

    `given` is an image of `store` (no other store is needed), the directory of another store, or an image of a
    registry, which `load` puts into a temporary store.
    """
    if store.images.get(given) is not None:
        return ()
    if os.path.isdir(os.path.join(os.fsencode(given), layout.LAYERS)):
        return (opened.enter_context(LayerStore(os.fsencode(given), create=False)),)
    staged = opened.enter_context(store.layers.stage())
    report(f"loading {given}")
    return (opened.enter_context(load(os.path.join(os.path.dirname(staged.tree_path), b"from"), given)),)
