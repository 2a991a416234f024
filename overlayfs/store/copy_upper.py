"""Commit by copy: copies an upper to a new layer directory, completely or not at all.

The layer is built in a staging directory next to its destination, synced, and published by one rename. It contains what
the upper contains, with two differences, so that it shows the same tree over the same lower layers without the work
directory: metadata-only copies get their data, and every name of a hard-linked file is there (the index, which joins
names that were never copied up, is not part of a layer). Attributes that only an upper has (`nlink`, `uuid`, `impure`)
are left out.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.format import xattrs
from overlayfs.fs.config import StackConfig
from overlayfs.fs.nodes import Dir, File
from overlayfs.fs.overlay import Overlay
from overlayfs.store.scan import Progress
from overlayfs.tree.dirfds import DirFds, default_capacity
from overlayfs.tree.layer import join
from overlayfs.tree.staging import copy_data
from overlayfs.tree.workdir import drop_inherited_acls, remove_tree

_STAGING = b".overlayfs-commit-"
_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_UPPER_ONLY = frozenset(
    xattrs.prefix(mode) + suffix
    for mode in xattrs.Mode
    for suffix in (xattrs.NLINK, xattrs.UUID, xattrs.IMPURE, xattrs.METACOPY)
)
_ORIGINS = frozenset(xattrs.prefix(mode) + xattrs.ORIGIN for mode in xattrs.Mode)
_REDIRECTS = frozenset(xattrs.prefix(mode) + xattrs.REDIRECT for mode in xattrs.Mode)


class CopiedUpper(NamedTuple):
    """A copy of an upper: the new directory, its number of entries, and its bytes of file content."""

    destination: bytes
    entries: int
    size: int


def commit_unmounted(config: StackConfig, destination: bytes, progress: Progress | None = None) -> CopiedUpper:
    """Copy an unmounted upper to the new directory `destination`. As `commit_mounted`; MountError if it is mounted."""
    overlay = Overlay(config)
    try:
        return commit_mounted(overlay, destination, progress)
    finally:
        overlay.close()


def refuse_inside(destination: bytes, mountpoint: bytes) -> None:
    """Raise UserError if `destination` is inside the mount that is committed: the commit would wait for itself.

    Resolves both paths, so the mount must be able to answer.
    """
    if _identity(mountpoint) in _ancestors(os.path.dirname(os.path.abspath(destination))):
        raise UserError(f"{os.fsdecode(destination)} lies inside the mount itself; name a place outside")


def commit_mounted(overlay: Overlay, destination: bytes, progress: Progress | None = None) -> CopiedUpper:
    """Copy the upper of an open overlay to the new directory `destination`. May run in a thread.

    Nothing may change the overlay meanwhile; for a mount, call `refuse_inside` first. `progress(entries, bytes)` is
    called periodically. Raises UserError if the layer cannot be made; nothing is left behind.
    """
    if overlay.read_only:
        raise UserError("there is no upper to commit: the mount is read-only")
    parent, name = os.path.split(os.path.abspath(destination))
    _check_destination(overlay, parent, name, destination)
    overlay.sync()
    with ExitStack() as undo:
        parent_fd = _open_parent(parent, undo)
        staging = _create_staging(parent_fd, name, destination, undo)
        made = _fill(overlay, destination, staging, progress)
        sysio.syncfs(staging)
        _publish(parent_fd, name, destination)
    return made


def _check_destination(overlay: Overlay, parent: bytes, name: bytes, destination: bytes) -> None:
    shown = os.fsdecode(destination)
    if not name:
        raise UserError(f"{shown} cannot become a layer: name a new directory")
    if os.path.lexists(destination):
        raise UserError(f"{shown} exists already; name a directory that does not")
    if not overlay.identities().isdisjoint(_ancestors(parent)):
        raise UserError(f"{shown} lies inside a directory that this stack is made of; name a place outside")


def _ancestors(path: bytes) -> Iterator[tuple[int, int]]:
    """Yield (st_dev, st_ino) of a directory and of its ancestors, up to the root."""
    path = os.path.realpath(path)
    while os.path.isdir(path):
        yield _identity(path)
        if path == b"/":
            return
        path = os.path.dirname(path)


def _identity(path: bytes) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _open_parent(parent: bytes, undo: ExitStack) -> int:
    try:
        fd = os.open(parent, _OPEN_DIR)
    except OSError as error:
        raise UserError(f"cannot make a layer in {os.fsdecode(parent)}: {error.strerror}") from error
    undo.callback(sysio.close, fd)
    return fd


def _create_staging(parent_fd: int, name: bytes, destination: bytes, undo: ExitStack) -> int:
    """Create and lock the staging directory; one that a killed commit has left is removed first."""
    staging = _STAGING + name
    if sysio.exists_at(parent_fd, staging):
        _refuse_running(parent_fd, staging, destination)
        remove_tree(parent_fd, staging)
    sysio.mkdir_at(parent_fd, staging, 0o700)
    undo.callback(lambda: remove_tree(parent_fd, staging) if sysio.exists_at(parent_fd, staging) else None)
    fd = sysio.open_child(parent_fd, staging, os.O_RDONLY | os.O_DIRECTORY)
    undo.callback(sysio.close, fd)
    sysio.try_lock(fd)
    return fd


def _refuse_running(parent_fd: int, staging: bytes, destination: bytes) -> None:
    fd = sysio.open_child(parent_fd, staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not sysio.try_lock(fd):
            raise UserError(f"another commit to {os.fsdecode(destination)} is running")
    finally:
        sysio.close(fd)


def _publish(parent_fd: int, name: bytes, destination: bytes) -> None:
    try:
        sysio.rename_at(parent_fd, _STAGING + name, parent_fd, name, sysio.RENAME_NOREPLACE)
    except FileExistsError as error:
        raise UserError(f"{os.fsdecode(destination)} exists already; name a directory that does not") from error
    sysio.fsync(parent_fd)


def copy_upper(overlay: Overlay, target: int, shown: bytes, progress: Progress | None = None) -> CopiedUpper:
    """Copy the upper of an open overlay into the empty directory behind the descriptor `target`.

    Nothing may change the overlay meanwhile. The copy needs no work directory and no data of layers below. `shown` is
    the path of the target in messages. `progress` and errors are those of `commit_mounted`.
    """
    if overlay.read_only:
        raise UserError("there is no upper to commit: the mount is read-only")
    overlay.sync()
    return _fill(overlay, shown, target, progress)


def _fill(overlay: Overlay, destination: bytes, staging: int, progress: Progress | None) -> CopiedUpper:
    view = Overlay(overlay.view_config())
    copier = _Copier(overlay, view, staging, progress)
    try:
        copier.copy_upper()
        for path, node in _missing_aliases(overlay, view, copier.linked):
            with _named(path):
                copier.add_alias(path, node)
        copier.restore_times()
        return CopiedUpper(destination, copier.entries, copier.size)
    except OSError as error:
        place = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, bytes) and error.filename else ""
        raise UserError(f"cannot commit to {os.fsdecode(destination)}: {error.strerror}{place}") from error
    finally:
        copier.close()
        view.close()


@contextmanager
def _named(path: bytes) -> Iterator[None]:
    """Add the path of an entry of the upper to an OSError raised within the context."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _missing_aliases(
    overlay: Overlay, view: Overlay, linked: Mapping[tuple[int, int], list[bytes]]
) -> Iterator[tuple[bytes, File]]:
    """Yield path and node of every hard-link alias that shows an upper file only because the index says so.

    When one of several names of a lower file is changed, the others follow through the index of the work directory,
    whether or not they were looked up. A layer has no index, so these names must be found and copied. `view` is a
    read-only overlay of the same stack whose top layer is the upper; `linked` has the names in the upper, by inode.
    """
    if not overlay.has_unlinked_twins({key: len(paths) for key, paths in linked.items()}):
        return
    pending = [(view.root, b"")]
    while pending:
        directory, path = pending.pop()
        for name in view.list_names(directory):
            node = view.lookup(directory, name)
            if isinstance(node, Dir):
                pending.append((node, join(path, name)))
            elif isinstance(node, File) and _is_alias(overlay, node):
                yield join(path, name), node


def _is_alias(overlay: Overlay, node: File) -> bool:
    in_upper = node.lower is None or node.lower.layer.index == 0
    return not in_upper and overlay.index_name_of(node) is not None


class _Copier:
    """Copies an upper into a staging directory. linked: the names copied so far of each upper inode with several."""

    def __init__(self, overlay: Overlay, view: Overlay, target: int, progress: Progress | None) -> None:
        self._upper = overlay.upper_root
        self._overlay = overlay
        self._view = view
        self._target = target
        self._progress = progress
        self._dirfds = DirFds(default_capacity(), errno.EXDEV)
        self._directories: list[tuple[bytes, os.stat_result]] = []
        self.linked: dict[tuple[int, int], list[bytes]] = {}
        self.entries = 0
        self.size = 0

    # --- the upper -------------------------------------------------------------------------------------

    def copy_upper(self) -> None:
        """Copy everything in the upper, including whiteouts and overlay attributes."""
        self._apply_directory_attributes(b"", self._upper, self._target)
        pending = [b""]
        while pending:
            pending.extend(self._copy_directory(pending.pop()))

    def _copy_directory(self, path: bytes) -> Iterator[bytes]:
        source, target = self._dirfds.get(self._upper, path), self._dirfds.get(self._target, path)
        for name, _ in sysio.list_dir(source):
            with _named(join(path, name)):
                is_directory = self._copy_entry(source, target, path, name)
            if is_directory:
                yield join(path, name)

    def _copy_entry(self, source: int, target: int, path: bytes, name: bytes) -> bool:
        """Copy one entry; return whether it is a directory, whose entries are copied later."""
        pin = sysio.open_child(source, name, os.O_PATH)
        try:
            found = sysio.stat_at(pin, b"")
            if stat.S_ISDIR(found.st_mode):
                sysio.mkdir_at(target, name, 0o700)
                inside = sysio.open_child(target, name, os.O_PATH | os.O_DIRECTORY)
                try:
                    self._apply_directory_attributes(join(path, name), pin, inside)
                finally:
                    sysio.close(inside)
                return True
            self._copy_object(pin, found, target, join(path, name), name)
            return False
        finally:
            sysio.close(pin)

    def _apply_directory_attributes(self, path: bytes, pin: int, target: int) -> None:
        found = sysio.stat_at(pin, b"")
        self._copy_attributes(pin, found, target, b"", keep_redirect=True)
        self._directories.append((path, found))
        self._count(0)

    def _copy_object(self, pin: int, found: os.stat_result, target: int, path: bytes, name: bytes) -> None:
        key = (found.st_dev, found.st_ino)
        is_whiteout = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
        if key in self.linked and not is_whiteout:
            self._link(self.linked[key][0], target, name)
        else:
            self._make(pin, found, target, path, name)
        if found.st_nlink > 1 and not is_whiteout:
            self.linked.setdefault(key, []).append(path)

    def _link(self, first: bytes, target: int, name: bytes) -> None:
        directory, base = os.path.split(first)
        source = sysio.open_beneath(self._target, directory, os.O_PATH | os.O_DIRECTORY)
        try:
            sysio.link_at(source, base, target, name)
        finally:
            sysio.close(source)
        self._count(0)

    def _make(self, pin: int, found: os.stat_result, target: int, path: bytes, name: bytes) -> None:
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFREG:
            data = self._open_data(pin, path)
            try:
                self._make_file(data, target, name)
            finally:
                sysio.close(data)
        elif kind == stat.S_IFLNK:
            sysio.symlink_at(sysio.readlink_at(pin, b""), target, name)
        else:
            sysio.mknod_at(target, name, kind | 0o600, found.st_rdev)
        self._copy_attributes(pin, found, target, name, keep_redirect=False)
        sysio.utimens_at(target, name, found.st_atime_ns, found.st_mtime_ns)
        self._count(found.st_size if kind == stat.S_IFREG else 0)

    def _open_data(self, pin: int, path: bytes) -> int:
        """Open the data of a file of the upper: the file itself, or the lower file of a metadata-only copy."""
        if self._is_metadata_only(pin):
            node = self._node(path)
            if node.data is not None:
                return node.data.layer.open_file(node.data.path, node.data.name)
        return sysio.open_child(pin, b"", os.O_RDONLY | os.O_NONBLOCK)

    def _is_metadata_only(self, pin: int) -> bool:
        prefixes = self._overlay.mark_prefixes()
        return any(sysio.find_xattr(pin, b"", prefix + xattrs.METACOPY) is not None for prefix in prefixes)

    def _node(self, path: bytes) -> File:
        node = self._view.resolve(path)
        assert isinstance(node, File)
        return node

    @staticmethod
    def _make_file(data: int, target: int, name: bytes) -> None:
        fd = sysio.open_child(target, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            copy_data(data, fd)
        finally:
            sysio.close(fd)

    def _copy_attributes(self, pin: int, found: os.stat_result, target: int, name: bytes, keep_redirect: bool) -> None:
        sysio.chown_at(target, name, found.st_uid, found.st_gid)
        attributes = sysio.listxattr_at(pin, b"")
        drop_inherited_acls(target, name, attributes)
        for attribute in attributes:
            if attribute in _UPPER_ONLY or (attribute in _REDIRECTS and not keep_redirect):
                continue
            sysio.setxattr_at(target, name, attribute, self._value(pin, attribute))
        if not stat.S_ISLNK(found.st_mode):
            sysio.chmod_at(target, name, stat.S_IMODE(found.st_mode))

    def _value(self, pin: int, attribute: bytes) -> bytes:
        # In a chain of origins, only the first one identifies the file whose inode number has been shown all along.
        origin = self._overlay.lasting_origin(pin) if attribute in _ORIGINS else None
        return sysio.getxattr_at(pin, b"", attribute) if origin is None else origin

    # --- names that only the index joins -----------------------------------------------------------------

    def add_alias(self, path: bytes, node: File) -> None:
        """Add a hard-link alias that shows an upper file only through the index."""
        directory, name = os.path.split(path)
        self._make_parents(directory)
        target = sysio.open_beneath(self._target, directory, os.O_PATH | os.O_DIRECTORY)
        try:
            found, pin = self._pin_indexed(node)
            try:
                key = (found.st_dev, found.st_ino)
                if key in self.linked:
                    self._link(self.linked[key][0], target, name)
                else:
                    self._make_indexed(pin, found, node, target, name)
                self.linked.setdefault(key, []).append(path)
            finally:
                sysio.close(pin)
        finally:
            sysio.close(target)

    def _pin_indexed(self, node: File) -> tuple[os.stat_result, int]:
        pin = self._overlay.pin_indexed(node)
        return sysio.stat_at(pin, b""), pin

    def _make_indexed(self, pin: int, found: os.stat_result, node: File, target: int, name: bytes) -> None:
        below = node.data or node.lower
        assert below is not None
        if not self._is_metadata_only(pin):
            self._make(pin, found, target, b"", name)
            return
        data = below.layer.open_file(below.path, below.name)
        try:
            self._make_file(data, target, name)
        finally:
            sysio.close(data)
        self._copy_attributes(pin, found, target, name, keep_redirect=False)
        sysio.utimens_at(target, name, found.st_atime_ns, found.st_mtime_ns)
        self._count(found.st_size)

    def _make_parents(self, path: bytes) -> None:
        made = b""
        for name in filter(None, path.split(b"/")):
            target = sysio.open_beneath(self._target, made, os.O_PATH | os.O_DIRECTORY)
            try:
                made = join(made, name)
                if not sysio.exists_at(target, name):
                    self._copy_parent(target, made, name)
            finally:
                sysio.close(target)

    def _copy_parent(self, target: int, path: bytes, name: bytes) -> None:
        """Create a directory that only layers below have, without overlay attributes: it merges with theirs."""
        node = self._view.resolve(path)
        assert isinstance(node, Dir)
        self._overlay.copy_directory(self._view, node, target, name)
        self._directories.append((path, sysio.stat_at(target, name)))
        self._count(0)

    # --- the end ---------------------------------------------------------------------------------------

    def restore_times(self) -> None:
        """Set the times of all directories, the deepest first, once nothing is added to them any more."""
        for path, found in reversed(self._directories):
            fd = self._dirfds.get(self._target, path)
            sysio.utimens_at(fd, b"", found.st_atime_ns, found.st_mtime_ns)

    def close(self) -> None:
        """Close all open directories."""
        self._dirfds.close()

    def _count(self, size: int) -> None:
        self.entries += 1
        self.size += size
        if self._progress is not None and self.entries % 64 == 0:
            self._progress(self.entries, self.size)
