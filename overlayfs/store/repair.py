"""Repair: what is damaged in a layer is put back as its manifest has it, from wherever the content still is.

Owner, mode, times, attributes, targets and whiteouts stand in the manifest itself. Content comes from any file with
the hash that is wanted: under another name in the same layer, in another layer, in another store, or in an image that
is loaded from a registry for this. It is hashed again as it is put in place.

Each object is built aside, synced and renamed; a repair that is killed has done a part of its work, and verification
finds what is left. Nobody else may use the layer meanwhile: it is locked exclusively.
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

_NEW = b"new"
_KINDS = {
    Type.FIFO: stat.S_IFIFO, Type.SOCKET: stat.S_IFSOCK, Type.CHAR: stat.S_IFCHR, Type.BLOCK: stat.S_IFBLK,
    Type.WHITEOUT: stat.S_IFCHR,
}  # fmt: skip
_ENOUGH = 4  # places to try for one content
_PATH = os.O_PATH | os.O_DIRECTORY
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW

Load = Callable[[bytes, str], LayerStore]
"""Makes a store in a directory that does not exist yet, with the image of a registry in it."""

Told = Callable[[str], None]
"""Told in a few words what is being done."""


class _Item(NamedTuple):
    """One thing to be put right: the entry as it shall be, or for EXTRA as it is."""

    kind: str
    entry: Entry
    differs: tuple[str, ...]


class _Content(NamedTuple):
    """A file that should have some content."""

    layer: Layer
    path: bytes


_Wanted = tuple[str, int]  # hash and size


def repair(store: LayerStore, problems: tuple[Problem, ...], sources: tuple[LayerStore, ...], told: Told) -> None:
    """Put right what can be in the layers that have problems; `sources` are stores to take content from, best first.

    What stays wrong, verification tells again. UserError when a layer is in use.
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
            _forget_registries(layers, layer_id)
        layer = layers.get(layer_id)
        if layer is not None:
            told(f"repairing layer {layer_id[:12]}")
            _LayerRepair(store, layer, sources).run()
            with layers.publishing():
                layers.index(layer.record)


# --- records and manifests ---------------------------------------------------------------------------------


def _restore_record(layers: Layers, layer_id: str) -> bool:
    """Write the record of a layer anew from what else tells of it; False when nothing vouches for its manifest.

    Author, message and time of making are lost; the time of the manifest stands for the latter.
    """
    try:
        fd = layers.store_dir.open(layer_path(layer_id) + b"/" + layout.MANIFEST, os.O_RDONLY)
    except FileNotFoundError:
        return False
    changed = sysio.stat_at(fd, b"").st_mtime
    with Manifest.open(fd) as manifest:
        if layer_id not in _index_lines(layers, manifest.digest):
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
    """Take the record of an image from a store that has one of the same name, made of layers that are here."""
    for source in sources:
        with contextlib.suppress(FileNotFoundError, UserError):
            if path.startswith(layout.IMAGES + b"/"):
                store.put_image(records.decode(source.directory.read(path), ImageRecord, ""))
                return


def _forget_registries(layers: Layers, layer_id: str) -> None:
    """Remove what is remembered of registries: it is found out again."""
    directory = layers.store_dir.open(layer_path(layer_id))
    try:
        sysio.unlink_at(directory, layout.REMOTE)
    finally:
        sysio.close(directory)


def _index_lines(layers: Layers, digest: str) -> list[str]:
    name = layout.digest_file(digest)
    try:
        return [] if name is None else os.fsdecode(layers.store_dir.read(layout.DIGESTS, name)).split()
    except FileNotFoundError:
        return []


def _below(layers: Layers, layer_id: str) -> tuple[str, ...]:
    """Return the layers that an image has under this one."""
    for name in verify.image_records(layers.store_dir):
        if layer_id in name.layers:
            return name.layers[name.layers.index(layer_id) + 1 :]
    return ()


def _find_manifest(layer: Layer, tree: int, sources: tuple[LayerStore, ...]) -> Manifest | None:
    """Return the layer's manifest: its own, one made from the tree, or a copy elsewhere; by its digest it is right."""
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
        other = source.by_digest(layer.record.digest or "")
        if other is not None and other.path != layer.path:
            with contextlib.suppress(FileNotFoundError):
                yield Manifest.open(other.manifest_fd())


# --- one layer ---------------------------------------------------------------------------------------------


class _LayerRepair:
    """The repair of one layer."""

    def __init__(self, store: LayerStore, layer: Layer, sources: tuple[LayerStore, ...]) -> None:
        self._store = store
        self._layer = layer
        self._sources = (*sources, store)
        self._touched: set[bytes] = set()  # directories whose times must be put back

    def run(self) -> None:
        """Put right all that can be."""
        with ExitStack() as held:
            held.enter_context(self._layer.hold_exclusively())
            self._tree = self._opened(self._layer.tree_path, held)
            self._home = self._opened(self._layer.path, held)
            # What a killed repair leaves in the staging place is garbage like a layer that nobody finished.
            self._aside = held.enter_context(self._store.new_layer()).tree_fd
            manifest = _find_manifest(self._layer, self._tree, self._sources)
            if manifest is None:
                return
            held.enter_context(manifest)
            if not self._has_manifest():
                write_manifest(self._home, manifest)
            self._put_right(manifest)

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

    def _put_right(self, manifest: Manifest) -> None:
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

    # --- where content is ------------------------------------------------------------------------------

    def _contents(self, items: list[_Item]) -> dict[_Wanted, list[_Content]]:
        """Return where the content of what must be made again may be found."""
        found: dict[_Wanted, list[_Content]] = {}
        for item in items:
            wanted = _wanted(item.entry)
            if wanted is not None and item.kind != EXTRA and not _only_attributes(item):
                found[wanted] = self._own_names(item.entry, items)
        if found:
            for layer in self._layers():
                _look_into(layer, found)
        return found

    def _own_names(self, entry: Entry, items: list[_Item]) -> list[_Content]:
        """Return the other names of a file in the same layer: if they are parted from it, one may be whole."""
        names = (item.entry.path for item in items if item.entry.link == entry.path and item.kind != EXTRA)
        return [_Content(self._layer, name) for name in names]

    def _layers(self) -> Iterator[Layer]:
        """Yield every layer that content may be taken from, each content once."""
        seen = set()
        for source in self._sources:
            for layer in source.layers():
                if layer.record.state == "complete" and layer.path not in seen:
                    seen.add(layer.path)
                    yield layer

    # --- putting in place ------------------------------------------------------------------------------

    def _remove(self, path: bytes) -> None:
        directory, name = os.path.split(path)
        with contextlib.suppress(FileNotFoundError), self._directory(directory) as dirfd:  # gone with what held it
            remove_tree(dirfd, name)
            self._touched.add(directory)

    def _restore(self, item: _Item, contents: dict[_Wanted, list[_Content]]) -> None:
        entry = item.entry
        directory, name = os.path.split(entry.path)
        if entry.type is Type.DIR and self._is_directory(entry.path):
            with self._directory(entry.path) as dirfd:
                _dress(dirfd, b"", entry)
            self._touched.add(entry.path)
            return
        with contextlib.suppress(FileNotFoundError), self._directory(directory) as dirfd:  # it could not be made itself
            if _only_attributes(item):
                _dress(dirfd, name, entry)
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
        """Make one more name of a file aside; False when the file is not there."""
        directory, name = os.path.split(entry.link or b"")
        try:
            with self._directory(directory) as dirfd:
                sysio.link_at(dirfd, name, self._aside, _NEW)
        except FileNotFoundError:
            return False
        return True

    def _build(self, entry: Entry, contents: dict[_Wanted, list[_Content]]) -> bool:
        """Make an object aside, complete; False when its content is nowhere."""
        if entry.type is Type.FILE:
            if not self._build_file(entry, contents):
                return False
        elif entry.type is Type.DIR:
            sysio.mkdir_at(self._aside, _NEW, 0o700)
        elif entry.type is Type.SYMLINK:
            sysio.symlink_at(entry.target or b"", self._aside, _NEW)
        else:
            sysio.mknod_at(self._aside, _NEW, _KINDS[entry.type] | entry.mode, entry.rdev)
        if entry.type is not Type.WHITEOUT:
            _dress(self._aside, _NEW, entry)
        return True

    def _build_file(self, entry: Entry, contents: dict[_Wanted, list[_Content]]) -> bool:
        wanted = _wanted(entry)
        if wanted is None:
            _make(self._aside, lambda fd: sysio.truncate_fd(fd, entry.size))
            return True
        return any(self._take(place, wanted) for place in contents.get(wanted, ()))

    def _take(self, place: _Content, wanted: _Wanted) -> bool:
        """Copy a file to `new` aside; False, and nothing is there, when it does not have the content that is wanted."""
        try:
            with contextlib.ExitStack() as closing:
                tree = self._opened(place.layer.tree_path, closing)
                source = sysio.open_beneath(tree, place.path, _READ)
                closing.callback(sysio.close, source)
                if stat.S_ISREG(sysio.stat_at(source, b"").st_mode):
                    _make(self._aside, lambda fd: copy_data(source, fd))
            if _hash_of(self._aside, _NEW) == wanted:
                return True
        except OSError:  # the next place may be better
            pass
        remove_tree(self._aside, _NEW)
        return False

    def _move(self, dirfd: int, name: bytes, entry: Entry) -> None:
        """Put what was made aside in its place, durable before it is there."""
        if entry.type is Type.FILE:
            fd = sysio.open_child(self._aside, _NEW, _READ)
            try:
                sysio.fsync(fd)
            finally:
                sysio.close(fd)
        if entry.type is Type.DIR or self._is_directory(entry.path):
            remove_tree(dirfd, name)
        sysio.rename_at(self._aside, _NEW, dirfd, name)
        remove_tree(self._aside, _NEW)  # rename(2) leaves both names if they are one file already
        self._touched.add(os.path.dirname(entry.path))
        if entry.type is Type.DIR:
            self._touched.add(entry.path)

    def _restore_times(self, manifest: Manifest) -> None:
        """Put back the times of the directories in which something was put right, the deepest first."""
        times = [(entry.path, entry.mtime_ns) for entry in manifest.entries if entry.path in self._touched]
        for path, mtime in reversed(times):
            with contextlib.suppress(OSError), self._directory(path) as dirfd:  # what could not be made has no time
                sysio.utimens_at(dirfd, b"", None, mtime)


def _only_attributes(item: _Item) -> bool:
    return item.kind == verify.DAMAGED and all(each.startswith(verify.ATTRIBUTE_WORDS) for each in item.differs)


def _wanted(entry: Entry) -> _Wanted | None:
    """Return what identifies the content of a file; None for one without data of its own."""
    return None if entry.xxh3 is None or entry.size == 0 else (entry.xxh3, entry.size)


def _look_into(layer: Layer, found: dict[_Wanted, list[_Content]]) -> None:
    """Add the files of a layer that have some content which is looked for."""
    with contextlib.suppress(FileNotFoundError, DamagedError), Manifest.open(layer.manifest_fd()) as manifest:
        for entry in manifest.entries:
            wanted = _wanted(entry)
            if wanted in found and wanted is not None and len(found[wanted]) < _ENOUGH:
                found[wanted].append(_Content(layer, entry.path))


def _make(aside: int, fill: Callable[[int], None]) -> None:
    fd = sysio.open_child(aside, _NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fill(fd)
    finally:
        sysio.close(fd)


def _hash_of(dirfd: int, name: bytes) -> _Wanted:
    fd = sysio.open_child(dirfd, name, _READ)
    try:
        return scan.hash_file(fd)
    finally:
        sysio.close(fd)


def _dress(dirfd: int, name: bytes, entry: Entry) -> None:
    """Give an object the owner, attributes, mode and time of an entry; marks that belong to the place stay."""
    found = sysio.stat_at(dirfd, name)
    if (found.st_uid, found.st_gid) != (entry.uid, entry.gid):
        sysio.chown_at(dirfd, name, entry.uid, entry.gid)
    wanted = dict(entry.xattrs)
    for attribute in sysio.listxattr_at(dirfd, name):
        if is_portable(attribute) and attribute not in wanted:
            sysio.removexattr_at(dirfd, name, attribute)
    for attribute, value in wanted.items():  # after the owner: chown(2) takes capabilities away
        sysio.setxattr_at(dirfd, name, attribute, value)
    if entry.type is not Type.SYMLINK:
        sysio.chmod_at(dirfd, name, entry.mode)
    sysio.utimens_at(dirfd, name, None, entry.mtime_ns)


# --- from outside ------------------------------------------------------------------------------------------


def source_stores(store: LayerStore, given: str, load: Load, told: Told, held: ExitStack) -> tuple[LayerStore, ...]:
    """Return the stores, other than `store`, that `given` names: none for an image of its own, another store's
    directory, or a registry's image, which `load` puts into a store that goes with `held`.
    """
    if store.find_image(given) is not None:
        return ()
    if os.path.isdir(os.path.join(os.fsencode(given), layout.LAYERS)):
        return (held.enter_context(LayerStore(os.fsencode(given), create=False)),)
    staged = held.enter_context(store.new_layer())
    told(f"loading {given}")
    return (held.enter_context(load(os.path.join(os.path.dirname(staged.tree_path), b"from"), given)),)
