"""Unpacking the entries of an archive into a layer, one after the other, in bounded memory.

Every object is made by descriptor: its parent is opened from the root of the layer, never through a link or a mount
(`sysio.open_beneath`), and then a single name is used, which is not followed. So nothing outside the layer can be
reached; an archive that tries is refused as a whole, and the message names the entry.

Entries mean what OCI image-spec ``layer.md`` says (docs/images.md, "A layer that comes in"): whiteouts and opaque marks
apply only to lower layers, wherever they are in the archive; of several entries with one name the last one counts; a
directory over a directory changes its attributes. Each object gets its owner first, then xattrs, mode and times,
because chown clears capabilities and set-id bits. The times of a directory are restored whenever it leaves the cache of
open directories, so that no list of them is needed.

A process that may not change owners stores them in override xattrs (`format.override`), as rootless podman does.
"""

import errno
import os
import stat
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.format import opaque, override, whiteout, xattrs
from overlayfs.format.override import Override
from overlayfs.format.xattrs import Mode
from overlayfs.oci.tar_entry import MAX_NAME, ArchiveError, Kind, TarEntry, shown
from overlayfs.tree.layer import join
from overlayfs.tree.workdir import drop_inherited_acls, remove_tree

OVERRIDE = b"user.containers.override_stat"
_MAX_XATTR_VALUE = 64 * 1024  # XATTR_SIZE_MAX
_MAX_OPEN = 64  # directories
_MAX_DEFERRED = 100_000  # whiteouts in directories that have not occurred yet
_CHECK_ROOM = 64 << 20  # bytes of a file from which on the free space is checked first
_MAX_CONTENT_FACTOR = 4  # the files of a layer, with their holes, may be this many times as large as the file system
_HOLE_CHECK = 64 * 1024  # bytes of zeros that become a hole
_ZEROS = bytes(_HOLE_CHECK)
_SMALLEST_HOLE = 4096
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_DEFAULT_ACL = b"system.posix_acl_default"
_MACHINE_XATTRS = frozenset((b"security.selinux", b"system.nfs4_acl"))
"""Extended attributes that belong to a machine, not to a layer."""
_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES)
_SPECIAL = {Kind.FIFO: stat.S_IFIFO, Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK}

Fill = Callable[[int], None]
"""`fill(fd)` writes the content of a file."""


class _Directory:
    """An open directory of the layer. times: its mtime when it is closed. inherits: new objects in it get an ACL."""

    __slots__ = ("fd", "inherits", "opaque", "path", "times")

    def __init__(self, fd: int, path: bytes, mode: Mode | None) -> None:
        self.fd = fd
        self.path = path
        self.times = sysio.stat_at(fd, b"").st_mtime_ns
        attributes = sysio.listxattr_at(fd, b"")
        self.inherits = _DEFAULT_ACL in attributes
        self.opaque = mode is not None and xattrs.prefix(mode) + xattrs.OPAQUE in attributes

    def close(self) -> None:
        """Restore the times, and close the descriptor."""
        try:
            sysio.utimens_at(self.fd, b"", self.times, self.times)
        finally:
            sysio.close(self.fd)


class Unpacker:
    """Makes objects in the empty directory with descriptor `root`, which stays the caller's. Call `finish` at the end.

    merged: make a plain tree, without whiteouts and override xattrs; without privilege, it is owned by the user and has
    no devices. dropped, devices: how many xattrs and devices could not be kept.
    """

    def __init__(self, root: int, merged: bool = False) -> None:
        self._root = root
        self._merged = merged
        self._privileged = os.geteuid() == 0
        self._mode = _find_mode(root)
        self._open: OrderedDict[bytes, _Directory] = OrderedDict()
        self._whiteout: int | None = None  # O_PATH descriptor of a whiteout device, for hard links to it
        self._deferred: list[tuple[bytes, TarEntry]] = []
        self._top = self._opened(sysio.open_child(root, b"", os.O_PATH | os.O_DIRECTORY), b"")
        self._closed = False
        self._content = 0  # bytes of all files so far, with their holes
        self._max_content = _max_content(root)
        self.dropped = 0
        self.devices = 0
        self._newest_mtime: int | None = 0  # becomes the root's mtime; None once the root has an entry
        try:
            self._apply_directory_attributes(self._top, TarEntry(b"", Kind.DIRECTORY))
        except BaseException:
            self.close()
            raise

    def add(self, entry: TarEntry, fill: Fill | None = None) -> None:
        """Make the object of an entry. Raises `ArchiveError` for a forbidden one, `UserError` if it cannot be made."""
        try:
            self._add(entry, fill)
        except OSError as error:
            raise UserError(f"cannot unpack {shown(entry.path) or '/'}: {error.strerror}") from error

    def finish(self) -> None:
        """Apply the whiteouts that were deferred, and close. No entry may follow."""
        try:
            for path, entry in self._deferred:
                self._delete_deferred(path, entry)
            if self._newest_mtime is not None:
                self._top.times = self._newest_mtime
        finally:
            self.close()

    def close(self) -> None:
        """Close the descriptors; `finish` does so too."""
        with ExitStack() as undo:  # all of them, even if one fails
            while self._open:
                undo.callback(self._open.popitem()[1].close)
            if self._whiteout is not None:
                undo.callback(sysio.close, self._whiteout)
                self._whiteout = None
            if not self._closed:
                undo.callback(self._top.close)
                self._closed = True

    def sentences(self) -> list[str]:
        """Return a sentence for each kind of thing that was left out."""
        facts = (
            (self.dropped, "extended attributes were left out: only root can set them"),
            (self.devices, "devices were left out: only root can make them"),
        )
        return [f"{count} {text}" for count, text in facts if count]

    def _add(self, entry: TarEntry, fill: Fill | None) -> None:
        if not entry.path:
            self._newest_mtime = None
            self._apply_directory_attributes(self._top, entry)
            return
        if self._newest_mtime is not None and b"/" not in entry.path:
            self._newest_mtime = max(self._newest_mtime, entry.mtime_ns)
        if not self._merged and whiteout.PREFIX in entry.path and self._apply_mark(entry):
            return
        if self._merged and not self._privileged and entry.kind in (Kind.CHARACTER, Kind.BLOCK):
            self.devices += 1
            return
        parent, _, name = entry.path.rpartition(b"/")
        self._make(self._directory(parent, entry), name, entry, fill)

    # --- marks -----------------------------------------------------------------------------------------

    def _apply_mark(self, entry: TarEntry) -> bool:
        """Apply a whiteout or an opaque mark; return False if the entry is neither."""
        *above, name = entry.path.split(b"/")
        if any(part.startswith(b".wh..wh.") for part in above):
            return True  # aufs metadata
        if any(map(whiteout.is_reserved, above)):
            raise ArchiveError(f"the entry {shown(entry.path)} is inside a whiteout")
        if not whiteout.is_reserved(name):
            return False
        path = b"/".join(above)
        if name == whiteout.OPAQUE_MARK:
            self._make_opaque(self._directory(path, entry))
        elif not name.startswith(b".wh..wh."):
            self._delete_name(path, name, entry)
        return True

    def _delete_name(self, path: bytes, mark: bytes, entry: TarEntry) -> None:
        name = whiteout.target(mark)
        if name is None:
            raise ArchiveError(f"the entry {shown(entry.path)} is a whiteout without a name")
        deletion = entry._replace(path=join(path, name))
        directory = self._try_open(path)
        if directory is not None:
            self._put_whiteout(directory, name)
        elif len(self._deferred) < _MAX_DEFERRED:
            # If the directory turns out to be deleted too, this whiteout means nothing: decided at the end.
            self._deferred.append((path, deletion))
        else:
            self._delete_deferred(path, deletion)

    def _delete_deferred(self, path: bytes, entry: TarEntry) -> None:
        if self._try_open(path) is not None or not self._has_no_parent(path):
            self._put_whiteout(self._directory(path, entry), entry.path.rpartition(b"/")[2])

    def _has_no_parent(self, path: bytes) -> bool:
        """Return whether a missing directory is below something that is deleted or is not a directory."""
        at = b""
        for name in path.split(b"/"):
            directory = self._try_open(at)
            if directory is None:
                return True
            at = join(at, name)
            try:
                found = sysio.stat_at(directory.fd, name)
            except FileNotFoundError:
                return sysio.exists_at(directory.fd, whiteout.name_for(name)[:MAX_NAME])
            if not stat.S_ISDIR(found.st_mode):
                return True
        return False

    def _put_whiteout(self, directory: _Directory, name: bytes) -> None:
        if directory.opaque:
            return
        try:
            self._make_whiteout(directory, name)
        except FileExistsError:
            inner = self._try_open(join(directory.path, name))
            if inner is not None:  # this layer has the name itself: its entry stays, and hides the lower ones
                self._make_opaque(inner)
        except PermissionError:
            with suppress(FileExistsError):
                sysio.mknod_at(directory.fd, whiteout.name_for(name), stat.S_IFREG | 0o600, 0)

    def _make_whiteout(self, directory: _Directory, name: bytes) -> None:
        """Make a whiteout device, or a hard link to one, which is faster and needs no inode.

        The kernel does the same: fs/overlayfs/dir.c, ovl_whiteout.
        """
        if self._whiteout is not None:
            try:
                sysio.link_at(self._whiteout, b"", directory.fd, name)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT):  # too many links, or none left
                    raise
            sysio.close(self._whiteout)
            self._whiteout = None
        sysio.mknod_at(directory.fd, name, stat.S_IFCHR, 0)
        self._whiteout = sysio.open_child(directory.fd, name, os.O_PATH)

    def _make_opaque(self, directory: _Directory) -> None:
        """Make a directory opaque, and remove the whiteouts in it, which mean nothing any more."""
        if directory.opaque:
            return
        directory.opaque = True
        for name, kind in sysio.list_dir(directory.fd):
            if self._is_whiteout(directory, name, kind):
                sysio.unlink_at(directory.fd, name)
        if self._mode is None:
            sysio.mknod_at(directory.fd, whiteout.OPAQUE_MARK, stat.S_IFREG | 0o600, 0)
        else:
            sysio.setxattr_at(directory.fd, b"", xattrs.prefix(self._mode) + xattrs.OPAQUE, opaque.OPAQUE_VALUE)

    @staticmethod
    def _is_whiteout(directory: _Directory, name: bytes, kind: int) -> bool:
        if whiteout.is_reserved(name):
            return True
        if kind not in (0, stat.S_IFCHR):
            return False
        found = sysio.stat_at(directory.fd, name)
        return whiteout.is_device_whiteout(found.st_mode, found.st_rdev)

    # --- directories -----------------------------------------------------------------------------------

    def _directory(self, path: bytes, entry: TarEntry) -> _Directory:
        """Return the directory for an entry, made if it is missing."""
        return self._try_open(path) or self._make_parents(path, entry)

    def _try_open(self, path: bytes) -> _Directory | None:
        """Return a directory, None if it is missing, or anything else has its name."""
        if not path:
            return self._top
        return self._cached(path) or self._open_from(self._root, path, path)

    def _cached(self, path: bytes) -> _Directory | None:
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
        return known

    def _open_from(self, dirfd: int, below: bytes, path: bytes) -> _Directory | None:
        """Open a directory `below` one that is open; `path` is its path in the layer."""
        try:
            fd = sysio.open_beneath(dirfd, below, _DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        return self._cache(self._opened(fd, path))

    def _opened(self, fd: int, path: bytes) -> _Directory:
        try:
            return _Directory(fd, path, self._mode)
        except BaseException:
            sysio.close(fd)
            raise

    def _cache(self, directory: _Directory) -> _Directory:
        self._open[directory.path] = directory
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return directory

    def _make_parents(self, path: bytes, entry: TarEntry) -> _Directory:
        """Make the missing parents of an entry: 0755, owned by root, with the time of the entry."""
        at = self._top
        for name in path.split(b"/"):
            here = join(at.path, name)
            found = self._child(at, name, here)
            if found is None:
                self._make_parent(at, name, here, entry)
                found = self._child(at, name, here)
                assert found is not None
            at = found
        return at

    def _child(self, parent: _Directory, name: bytes, path: bytes) -> _Directory | None:
        return self._cached(path) or self._open_from(parent.fd, name, path)

    def _make_parent(self, parent: _Directory, name: bytes, path: bytes, entry: TarEntry) -> None:
        missing = TarEntry(path, Kind.DIRECTORY, mtime_ns=entry.mtime_ns)
        try:
            self._create(parent, name, missing, None)
        except FileExistsError:
            if not self._is_whiteout(parent, name, 0):
                raise ArchiveError(
                    f"the entry {shown(entry.path)} leads through {shown(path)}, which is not a directory"
                ) from None
            self._replace(parent, name, missing, None)

    def _close_cached_below(self, path: bytes) -> None:
        start = path + b"/"
        for known in [known for known in self._open if known == path or known.startswith(start)]:
            self._open.pop(known).close()

    # --- objects ---------------------------------------------------------------------------------------

    def _make(self, directory: _Directory, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        try:
            self._create(directory, name, entry, fill)
        except FileExistsError:
            self._make_over_existing(directory, name, entry, fill)

    def _make_over_existing(self, directory: _Directory, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        """Make an object whose name exists: a directory gets new attributes, anything else is replaced."""
        if entry.kind is Kind.HARDLINK and entry.target == entry.path:
            return
        known = self._try_open(entry.path) if entry.kind is Kind.DIRECTORY else None
        if known is not None:
            self._apply_directory_attributes(known, entry)
        else:
            self._replace(directory, name, entry, fill)

    def _replace(self, directory: _Directory, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        deleted = self._is_whiteout(directory, name, 0)
        self._close_cached_below(join(directory.path, name))
        remove_tree(directory.fd, name)
        self._create(directory, name, entry, fill)
        if deleted and entry.kind is Kind.DIRECTORY:
            made = self._try_open(entry.path)
            assert made is not None
            self._make_opaque(made)

    def _create(self, directory: _Directory, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        """Make a new object. Raises FileExistsError if its name exists."""
        if entry.kind is Kind.FILE:
            self._create_file(directory.fd, name, entry, fill)
        elif entry.kind is Kind.DIRECTORY:
            sysio.mkdir_at(directory.fd, name, 0o700)
        elif entry.kind is Kind.SYMLINK:
            sysio.symlink_at(entry.target, directory.fd, name)
        elif entry.kind is Kind.HARDLINK:
            self._link(directory, name, entry)
            return
        else:
            self._create_special(directory.fd, name, entry)
        self._apply_attributes(directory, name, entry)

    def _create_file(self, dirfd: int, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        if entry.size > _CHECK_ROOM:
            self._require_room(entry)
        self._count_content(entry)
        fd = sysio.open_child(dirfd, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if fill is not None:
                fill(fd)
        finally:
            sysio.close(fd)

    def _require_room(self, entry: TarEntry) -> None:
        needed = entry.size if entry.extents is None else sum(length for _, length in entry.extents)
        space = sysio.statvfs_fd(self._root)
        free = space.f_bavail * space.f_frsize
        if needed > free:
            raise UserError(
                f"cannot unpack {shown(entry.path)}: it has {needed >> 20} MiB, and {free >> 20} MiB are free"
            )

    def _count_content(self, entry: TarEntry) -> None:
        """Refuse excessive content: holes need no space, and next to none in an archive, but are hashed for days."""
        self._content += entry.size
        if self._content > self._max_content:
            raise UserError(
                f"cannot unpack {shown(entry.path)}: the files of the layer have {self._content >> 20} MiB with their "
                f"holes, and at most {self._max_content >> 20} MiB are allowed"
            )

    def _create_special(self, dirfd: int, name: bytes, entry: TarEntry) -> None:
        kind = _SPECIAL[entry.kind]
        if kind == stat.S_IFCHR and entry.device == (0, 0):
            raise ArchiveError(f"the entry {shown(entry.path)} is a device 0:0, which is a whiteout")
        if self._privileged or self._merged:
            self._create_node(dirfd, name, kind | 0o600, entry)
        else:
            sysio.mknod_at(dirfd, name, stat.S_IFREG | 0o600, 0)  # the override xattr has its type

    @staticmethod
    def _create_node(dirfd: int, name: bytes, mode: int, entry: TarEntry) -> None:
        try:
            sysio.mknod_at(dirfd, name, mode, os.makedev(*entry.device))
        except PermissionError as error:
            raise UserError(
                f"cannot unpack {shown(entry.path)}: making a {entry.kind.value} requires root outside a user namespace"
            ) from error

    def _link(self, directory: _Directory, name: bytes, entry: TarEntry) -> None:
        parent, _, source = entry.target.rpartition(b"/")
        above = self._try_open(parent)
        found = None
        if above is not None and source:
            with suppress(FileNotFoundError):
                found = sysio.stat_at(above.fd, source)
        if above is None or found is None or self._is_reserved_or_whiteout(source, found):
            raise ArchiveError(
                f"the hard link {shown(entry.path)} leads to {shown(entry.target)}, which does not come before it"
            )
        if stat.S_ISDIR(found.st_mode):
            raise ArchiveError(
                f"the hard link {shown(entry.path)} leads to {shown(entry.target)}, which is a directory"
            )
        sysio.link_at(above.fd, source, directory.fd, name)

    def _is_reserved_or_whiteout(self, name: bytes, found: os.stat_result) -> bool:
        if whiteout.is_device_whiteout(found.st_mode, found.st_rdev):
            return True
        return not self._merged and whiteout.is_reserved(name)

    # --- attributes ------------------------------------------------------------------------------------

    def _apply_attributes(self, directory: _Directory, name: bytes, entry: TarEntry) -> None:
        """Set owner, xattrs, mode and times of a new object, in this order."""
        dirfd = directory.fd
        if self._privileged:
            sysio.chown_at(dirfd, name, entry.uid, entry.gid)
        if directory.inherits:
            drop_inherited_acls(dirfd, name, ())
        for attribute, value in entry.xattrs.items():
            self._set_xattr(dirfd, name, entry, attribute, value)
        if entry.kind is not Kind.SYMLINK:
            self._set_mode(dirfd, name, entry)
        sysio.utimens_at(dirfd, name, entry.mtime_ns, entry.mtime_ns)

    def _apply_directory_attributes(self, directory: _Directory, entry: TarEntry) -> None:
        """Set the attributes of an existing directory; its opaque mark stays."""
        kept = {OVERRIDE} if self._mode is None else {OVERRIDE, xattrs.prefix(self._mode) + xattrs.OPAQUE}
        for attribute in set(sysio.listxattr_at(directory.fd, b"")) - kept - _MACHINE_XATTRS:
            sysio.removexattr_at(directory.fd, b"", attribute)
        directory.inherits = False
        self._apply_attributes(directory, b"", entry)
        directory.inherits = _DEFAULT_ACL in entry.xattrs
        directory.times = entry.mtime_ns

    def _set_mode(self, dirfd: int, name: bytes, entry: TarEntry) -> None:
        if self._privileged:
            sysio.chmod_at(dirfd, name, entry.mode)
            return
        # The user who owns the object must be able to read it, whatever its mode in the layer; podman does the same.
        only_a_file = self._merged and entry.kind is not Kind.DIRECTORY
        sysio.chmod_at(dirfd, name, entry.mode & 0o777 | (0 if only_a_file else 0o700))
        if not self._merged:
            kind = _SPECIAL.get(entry.kind)
            value = Override(entry.uid, entry.gid, entry.mode, kind, os.makedev(*entry.device))
            sysio.setxattr_at(dirfd, name, OVERRIDE, override.encode(value))

    def _set_xattr(self, dirfd: int, name: bytes, entry: TarEntry, attribute: bytes, value: bytes) -> None:
        stored = self._stored_name(entry, attribute, value)
        if stored is None:
            return
        try:
            sysio.setxattr_at(dirfd, name, stored, value)
        except OSError as error:
            if not self._privileged and error.errno in _UNSUPPORTED:
                self.dropped += 1
                return
            raise UserError(
                f"cannot unpack {shown(entry.path)}: its attribute {shown(attribute)} cannot be kept: {error.strerror}"
            ) from error

    def _stored_name(self, entry: TarEntry, attribute: bytes, value: bytes) -> bytes | None:
        """Return the name under which an xattr is stored in a layer, None for one that is dropped."""
        if not 0 < len(attribute) <= xattrs.LONGEST or b"\0" in attribute or len(value) > _MAX_XATTR_VALUE:
            raise ArchiveError(f"the entry {shown(entry.path)} has an impossible attribute {shown(attribute)}")
        if attribute in _MACHINE_XATTRS:
            return None
        try:
            stored = xattrs.stored_name(attribute, override_active=True)
        except PermissionError:
            return None  # a private mark of another layer
        if self._privileged or self._merged or not stored.startswith(b"security."):
            return stored
        return override.covered_name(stored)


def _find_mode(root: int) -> Mode | None:
    """Return the mode of the xattrs with which directories can be marked here, None if there is none."""
    for mode in Mode:
        attribute = xattrs.prefix(mode) + xattrs.OPAQUE
        try:
            sysio.setxattr_at(root, b"", attribute, b"0")
            sysio.removexattr_at(root, b"", attribute)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return mode
    return None


def _max_content(root: int) -> int:
    """Return how many bytes the files of a layer may have; unlimited if the file system does not report its size."""
    space = sysio.statvfs_fd(root)
    return _MAX_CONTENT_FACTOR * space.f_blocks * space.f_frsize or sys.maxsize


def write_pieces(fd: int, entry: TarEntry, pieces: Iterable[memoryview]) -> None:
    """Write a file from its data in an archive, one extent after the other; long runs of zeros become holes."""
    extents = iter(((0, entry.size),) if entry.extents is None else entry.extents)
    offset, left, end = 0, 0, 0
    for piece in pieces:
        while piece:
            if not left:
                offset, left = next(extents)
            part, piece = piece[:left], piece[left:]
            end = write_sparse(fd, offset, part) or end
            offset, left = offset + len(part), left - len(part)
    if end != entry.size:
        sysio.truncate_fd(fd, entry.size)


def write_sparse(fd: int, offset: int, data: memoryview) -> int:
    """Write data without its long runs of zeros; return the end of what was written, 0 if nothing was."""
    end, start = 0, 0
    for at in range(0, len(data), _HOLE_CHECK):
        if not _is_zero(data[at : at + _HOLE_CHECK]):
            continue
        if at > start:
            end = offset + start + sysio.write_at(fd, offset + start, data[start:at])
        start = at + _HOLE_CHECK
    if start < len(data):
        end = offset + start + sysio.write_at(fd, offset + start, data[start:])
    return end


def _is_zero(block: memoryview) -> bool:
    # The first and the last byte decide nearly always.
    if len(block) < _SMALLEST_HOLE or block[0] or block[-1]:
        return False
    return bytes(block) == _ZEROS[: len(block)]
