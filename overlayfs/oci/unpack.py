"""Making a layer from the entries of an archive, one after the other, in bounded memory.

Everything is made by descriptor: the parent is opened from the root of the layer, never through a link or a mount
(`sysio.open_beneath`), and then one name that is not followed. So nothing outside the layer can be reached, whatever
the archive says; an archive that tries is refused whole, with the entry's name.

What entries mean is in formats, section 10 (OCI image-spec ``layer.md``): deletions and opaque marks concern lower
layers only and may stand anywhere; of two entries with one name the last counts; a directory over a directory changes
its attributes. Each object gets its owner first, then attributes, mode, times: chown clears what the others set. The
times of a directory are put back whenever it leaves the cache of open directories, so none need be remembered.

Where the process may not change owners, they go into override attributes (`format.override`), as podman keeps them.
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
_LARGEST_VALUE = 64 * 1024  # XATTR_SIZE_MAX
_OPEN = 64  # directories
_MAX_DEFERRED = 100_000  # deletions in directories that have not come yet
_LARGE = 64 << 20  # bytes of a file for which it is worth asking how much room there is
_MOST_CONTENT = 4  # times the file system's own size that the files of a layer may come to, holes counted
_SOLID = 64 * 1024
_NOTHING = bytes(_SOLID)
_SMALLEST_HOLE = 4096
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_DEFAULT_ACL = b"system.posix_acl_default"
_LOCAL = frozenset((b"security.selinux", b"system.nfs4_acl"))
"""Attributes that belong to a machine, not to a layer."""
_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES)
_SPECIAL = {Kind.FIFO: stat.S_IFIFO, Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK}

Fill = Callable[[int], None]
"""Writes the content of a file to a descriptor that is open for writing."""


class _Directory:
    """An open directory. times: what its mtime shall be. inherits: what is made in it gets a default ACL."""

    __slots__ = ("fd", "inherits", "opaque", "path", "times")

    def __init__(self, fd: int, path: bytes, mode: Mode | None) -> None:
        self.fd = fd
        self.path = path
        self.times = sysio.stat_at(fd, b"").st_mtime_ns
        attributes = sysio.listxattr_at(fd, b"")
        self.inherits = _DEFAULT_ACL in attributes
        self.opaque = mode is not None and xattrs.prefix(mode) + xattrs.OPAQUE in attributes

    def close(self) -> None:
        """Give the descriptor back, the times put right."""
        try:
            sysio.utimens_at(self.fd, b"", self.times, self.times)
        finally:
            sysio.close(self.fd)


class Unpacker:
    """Makes objects below the directory `root`, which is empty and stays the caller's. Call `finish` at the end.

    `merged`: what is made is a plain tree, without marks of any kind. Without privilege its owners are the user, and
    there are no devices in it. dropped, devices: how many attributes and devices could not be kept.
    """

    def __init__(self, root: int, merged: bool = False) -> None:
        self._root = root
        self._merged = merged
        self._privileged = os.geteuid() == 0
        self._mode = _find_mode(root)
        self._open: OrderedDict[bytes, _Directory] = OrderedDict()
        self._whiteout: int | None = None  # pins a device 0:0 that can get more names
        self._deferred: list[tuple[bytes, TarEntry]] = []
        self._top = self._opened(sysio.open_child(root, b"", os.O_PATH | os.O_DIRECTORY), b"")
        self._closed = False
        self._content = 0  # bytes of all files so far, holes counted
        self._most_content = _most_content(root)
        self.dropped = 0
        self.devices = 0
        self._newest: int | None = 0  # time of a root that has no entry; None when it has one
        try:
            self._apply_directory_attributes(self._top, TarEntry(b"", Kind.DIRECTORY))
        except BaseException:
            self.close()
            raise

    def add(self, entry: TarEntry, fill: Fill | None = None) -> None:
        """Make what an entry says; ArchiveError when it says what must not be, UserError when it cannot be."""
        try:
            self._add(entry, fill)
        except OSError as error:
            raise UserError(f"cannot unpack {shown(entry.path) or '/'}: {error.strerror}") from error

    def finish(self) -> None:
        """Settle what had to wait, and close all. No entry may follow."""
        try:
            for path, entry in self._deferred:
                self._delete_late(path, entry)
            if self._newest is not None:
                self._top.times = self._newest
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptors back; `finish` does so too."""
        with ExitStack() as undo:  # all of them, whatever one of them says
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
            self._newest = None
            self._apply_directory_attributes(self._top, entry)
            return
        if self._newest is not None and b"/" not in entry.path:
            self._newest = max(self._newest, entry.mtime_ns)
        if not self._merged and whiteout.PREFIX in entry.path and self._is_mark(entry):
            return
        if self._merged and not self._privileged and entry.kind in (Kind.CHARACTER, Kind.BLOCK):
            self.devices += 1
            return
        parent, _, name = entry.path.rpartition(b"/")
        self._make(self._directory(parent, entry), name, entry, fill)

    # --- marks -----------------------------------------------------------------------------------------

    def _is_mark(self, entry: TarEntry) -> bool:
        """Carry out a deletion or an opaque mark; False for an ordinary name."""
        *above, name = entry.path.split(b"/")
        if any(part.startswith(b".wh..wh.") for part in above):
            return True  # what aufs keeps for itself
        if any(map(whiteout.is_reserved, above)):
            raise ArchiveError(f"the entry {shown(entry.path)} lies in a name that means a deletion")
        if not whiteout.is_reserved(name):
            return False
        path = b"/".join(above)
        if name == whiteout.OPAQUE_MARK:
            self._make_opaque(self._directory(path, entry))
        elif not name.startswith(b".wh..wh."):
            self._delete(path, name, entry)
        return True

    def _delete(self, path: bytes, mark: bytes, entry: TarEntry) -> None:
        name = whiteout.target(mark)
        if name is None:
            raise ArchiveError(f"the entry {shown(entry.path)} deletes no name")
        deletion = entry._replace(path=join(path, name))
        directory = self._try_open(path)
        if directory is not None:
            self._put_whiteout(directory, name)
        elif len(self._deferred) < _MAX_DEFERRED:
            # The directory may be deleted itself, and then this says nothing: known when all has come.
            self._deferred.append((path, deletion))
        else:
            self._delete_late(path, deletion)

    def _delete_late(self, path: bytes, entry: TarEntry) -> None:
        if self._try_open(path) is not None or not self._is_below_nothing(path):
            self._put_whiteout(self._directory(path, entry), entry.path.rpartition(b"/")[2])

    def _is_below_nothing(self, path: bytes) -> bool:
        """Return whether a directory that is asked for lies in something deleted or in no directory at all."""
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
            if inner is not None:  # the entry of this layer wins, and covers what lies below
                self._make_opaque(inner)
        except PermissionError:
            with suppress(FileExistsError):
                sysio.mknod_at(directory.fd, whiteout.name_for(name), stat.S_IFREG | 0o600, 0)

    def _make_whiteout(self, directory: _Directory, name: bytes) -> None:
        """Make a device 0:0, or a link to one: many times as fast, and no inode; the kernel does so too (dir.c)."""
        if self._whiteout is not None:
            try:
                sysio.link_at(self._whiteout, b"", directory.fd, name)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT):  # as many names as can be, or none left
                    raise
            sysio.close(self._whiteout)
            self._whiteout = None
        sysio.mknod_at(directory.fd, name, stat.S_IFCHR, 0)
        self._whiteout = sysio.open_child(directory.fd, name, os.O_PATH)

    def _make_opaque(self, directory: _Directory) -> None:
        """Make a directory opaque; the deletions in it say nothing any more."""
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
        """Return a directory in which an entry is to be, made if it is missing."""
        return self._try_open(path) or self._make_parents(path, entry)

    def _try_open(self, path: bytes) -> _Directory | None:
        """Return a directory; None when it is missing or anything else is in its way."""
        if not path:
            return self._top
        return self._known(path) or self._open_from(self._root, path, path)

    def _known(self, path: bytes) -> _Directory | None:
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
        return known

    def _open_from(self, dirfd: int, below: bytes, path: bytes) -> _Directory | None:
        """Open the directory `below` one that is open already; `path` is where it lies in the layer."""
        try:
            fd = sysio.open_beneath(dirfd, below, _DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        return self._keep(self._opened(fd, path))

    def _opened(self, fd: int, path: bytes) -> _Directory:
        try:
            return _Directory(fd, path, self._mode)
        except BaseException:
            sysio.close(fd)
            raise

    def _keep(self, directory: _Directory) -> _Directory:
        self._open[directory.path] = directory
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()
        return directory

    def _make_parents(self, path: bytes, entry: TarEntry) -> _Directory:
        """Make the directories that an entry leaves out: 0755, root's, as old as the entry."""
        at = self._top
        for name in path.split(b"/"):
            here = join(at.path, name)
            found = self._child(at, name, here)
            if found is None:
                self._make_missing(at, name, here, entry)
                found = self._child(at, name, here)
                assert found is not None
            at = found
        return at

    def _child(self, parent: _Directory, name: bytes, path: bytes) -> _Directory | None:
        return self._known(path) or self._open_from(parent.fd, name, path)

    def _make_missing(self, parent: _Directory, name: bytes, path: bytes, entry: TarEntry) -> None:
        missing = TarEntry(path, Kind.DIRECTORY, mtime_ns=entry.mtime_ns)
        try:
            self._create(parent, name, missing, None)
        except FileExistsError:
            if not self._is_whiteout(parent, name, 0):
                raise ArchiveError(
                    f"the entry {shown(entry.path)} leads through {shown(path)}, which is no directory"
                ) from None
            self._replace(parent, name, missing, None)

    def _forget_below(self, path: bytes) -> None:
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
        """Make what has a name that is taken: attributes of a directory change, anything else is replaced."""
        if entry.kind is Kind.HARDLINK and entry.target == entry.path:
            return
        known = self._try_open(entry.path) if entry.kind is Kind.DIRECTORY else None
        if known is not None:
            self._apply_directory_attributes(known, entry)
        else:
            self._replace(directory, name, entry, fill)

    def _replace(self, directory: _Directory, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        deleted = self._is_whiteout(directory, name, 0)
        self._forget_below(join(directory.path, name))
        remove_tree(directory.fd, name)
        self._create(directory, name, entry, fill)
        if deleted and entry.kind is Kind.DIRECTORY:
            made = self._try_open(entry.path)
            assert made is not None
            self._make_opaque(made)

    def _create(self, directory: _Directory, name: bytes, entry: TarEntry, fill: Fill | None) -> None:
        """Make a new object; FileExistsError when its name is taken."""
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
        if entry.size > _LARGE:
            self._require_room(entry)
        self._count(entry)
        fd = sysio.open_child(dirfd, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if fill is not None:
                fill(fd)
        finally:
            sysio.close(fd)

    def _require_room(self, entry: TarEntry) -> None:
        needed = entry.size if entry.extents is None else sum(length for _, length in entry.extents)
        there = sysio.statvfs_fd(self._root)
        free = there.f_bavail * there.f_frsize
        if needed > free:
            raise UserError(
                f"cannot unpack {shown(entry.path)}: it has {needed >> 20} MiB, and {free >> 20} MiB are free"
            )

    def _count(self, entry: TarEntry) -> None:
        """Refuse content out of all proportion: zeros take no room and next to no archive, and are hashed for days."""
        self._content += entry.size
        if self._content > self._most_content:
            told = f"the files of the layer come to {self._content >> 20} MiB with their holes"
            raise UserError(
                f"cannot unpack {shown(entry.path)}: {told}, and no more than {self._most_content >> 20} MiB are taken"
            )

    def _create_special(self, dirfd: int, name: bytes, entry: TarEntry) -> None:
        kind = _SPECIAL[entry.kind]
        if kind == stat.S_IFCHR and entry.device == (0, 0):
            raise ArchiveError(f"the entry {shown(entry.path)} is a device 0:0, which means a deletion")
        if self._privileged or self._merged:
            self._create_node(dirfd, name, kind | 0o600, entry)
        else:
            sysio.mknod_at(dirfd, name, stat.S_IFREG | 0o600, 0)  # its type goes into the override attribute

    @staticmethod
    def _create_node(dirfd: int, name: bytes, mode: int, entry: TarEntry) -> None:
        try:
            sysio.mknod_at(dirfd, name, mode, os.makedev(*entry.device))
        except PermissionError as error:
            raise UserError(
                f"cannot unpack {shown(entry.path)}: making a {entry.kind.value} needs root outside of a user namespace"
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
                f"the hard link {shown(entry.path)} leads to {shown(entry.target)}, which does not stand before it"
            )
        if stat.S_ISDIR(found.st_mode):
            told = f"the hard link {shown(entry.path)} leads to {shown(entry.target)}"
            raise ArchiveError(f"{told}, which is a directory")
        sysio.link_at(above.fd, source, directory.fd, name)

    def _is_reserved_or_whiteout(self, name: bytes, found: os.stat_result) -> bool:
        if whiteout.is_device_whiteout(found.st_mode, found.st_rdev):
            return True
        return not self._merged and whiteout.is_reserved(name)

    # --- attributes ------------------------------------------------------------------------------------

    def _apply_attributes(self, directory: _Directory, name: bytes, entry: TarEntry) -> None:
        """Give a new object its owner, attributes, mode and times, in this order."""
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
        """Give a directory that is there the attributes of an entry; what marks it stays."""
        kept = {OVERRIDE} if self._mode is None else {OVERRIDE, xattrs.prefix(self._mode) + xattrs.OPAQUE}
        for attribute in set(sysio.listxattr_at(directory.fd, b"")) - kept - _LOCAL:
            sysio.removexattr_at(directory.fd, b"", attribute)
        directory.inherits = False
        self._apply_attributes(directory, b"", entry)
        directory.inherits = _DEFAULT_ACL in entry.xattrs
        directory.times = entry.mtime_ns

    def _set_mode(self, dirfd: int, name: bytes, entry: TarEntry) -> None:
        if self._privileged:
            sysio.chmod_at(dirfd, name, entry.mode)
            return
        # The owner must reach the object whatever its users may do: widened as podman does.
        only_a_file = self._merged and entry.kind is not Kind.DIRECTORY
        sysio.chmod_at(dirfd, name, entry.mode & 0o777 | (0 if only_a_file else 0o700))
        if not self._merged:
            kind = _SPECIAL.get(entry.kind)
            told = Override(entry.uid, entry.gid, entry.mode, kind, os.makedev(*entry.device))
            sysio.setxattr_at(dirfd, name, OVERRIDE, override.encode(told))

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
        """Return the name under which an attribute lies in a layer, None for one that is not taken over."""
        if not 0 < len(attribute) <= xattrs.LONGEST or b"\0" in attribute or len(value) > _LARGEST_VALUE:
            raise ArchiveError(f"the entry {shown(entry.path)} has an impossible attribute {shown(attribute)}")
        if attribute in _LOCAL:
            return None
        try:
            stored = xattrs.stored_name(attribute, override_active=True)
        except PermissionError:
            return None  # a private mark of somebody's layer
        if self._privileged or self._merged or not stored.startswith(b"security."):
            return stored
        return override.covered_name(stored)


def _find_mode(root: int) -> Mode | None:
    """Return the prefix of the marks that can be written here."""
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


def _most_content(root: int) -> int:
    """Return how many bytes the files of a layer may come to; no bound where the file system tells no size."""
    there = sysio.statvfs_fd(root)
    return _MOST_CONTENT * there.f_blocks * there.f_frsize or sys.maxsize


def write_pieces(fd: int, entry: TarEntry, pieces: Iterable[memoryview]) -> None:
    """Write a file's data as an archive holds it, one extent behind the other; zeros become holes."""
    extents = iter(((0, entry.size),) if entry.extents is None else entry.extents)
    offset, left, end = 0, 0, 0
    for piece in pieces:
        while piece:
            if not left:
                offset, left = next(extents)
            part, piece = piece[:left], piece[left:]
            end = write_solid(fd, offset, part) or end
            offset, left = offset + len(part), left - len(part)
    if end != entry.size:
        sysio.truncate_fd(fd, entry.size)


def write_solid(fd: int, offset: int, data: memoryview) -> int:
    """Write data but for its long runs of zeros; return the end of what was written, 0 for nothing."""
    end, start = 0, 0
    for at in range(0, len(data), _SOLID):
        if not _is_zero(data[at : at + _SOLID]):
            continue
        if at > start:
            end = offset + start + sysio.write_at(fd, offset + start, data[start:at])
        start = at + _SOLID
    if start < len(data):
        end = offset + start + sysio.write_at(fd, offset + start, data[start:])
    return end


def _is_zero(block: memoryview) -> bool:
    # Nearly every block is told from its edges.
    if len(block) < _SMALLEST_HOLE or block[0] or block[-1]:
        return False
    return bytes(block) == _NOTHING[: len(block)]
