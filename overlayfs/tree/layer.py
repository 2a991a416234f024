"""A read-only layer: one directory tree, accessed only by descriptors.

A place in a layer is (path, name): `path` names a directory by components from the layer's root, ``b""`` being
the root itself, and `name` is one child. No symbolic link, mount point or magic link is ever followed
(`sysio.open_beneath`). Errors of the file system are raised unchanged: only ENOENT means absent.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import MountError, oserror
from overlayfs.format import metacopy, opaque, origin, override, redirect, whiteout, xattrs
from overlayfs.format.origin import Origin
from overlayfs.format.xattrs import Mode
from overlayfs.tree.dirfds import DirFds
from overlayfs.tree.filesystem import FileSystem
from overlayfs.tree.stats import AnyStat, overridden
from overlayfs.union.resolve import Kind

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_PREFIXES = tuple(xattrs.prefix(mode) for mode in Mode)


class Entry(NamedTuple):
    """The object of a name in one layer; `stat` is None for ABSENT and for whiteouts that are not devices."""

    kind: Kind
    stat: AnyStat | None = None


class Marks(NamedTuple):
    """The marks of one entry."""

    opaque: bool = False
    redirect: bytes | None = None
    metacopy: bool = False
    origin: Origin | None = None
    nlink: bytes | None = None
    redirect_denied: bool = False  # it has a redirect that must not be followed: EPERM, instead of a partial view


NO_MARKS = Marks()
_ABSENT = Entry(Kind.ABSENT)
_WHITEOUT = Entry(Kind.WHITEOUT)


class Layer:
    """One layer of a stack. `index` counts from 0, the upper or the top; `lowest` marks the last one.

    suid, dev: whether the mount that the layer is on honours set-id bits (no nosuid) and devices (no nodev).
    """

    def __init__(self, index: int, root: int, dirfds: DirFds, mode: Mode | None, lowest: bool) -> None:
        self.index = index
        self.root = root
        self.lowest = lowest
        self.mode = mode
        self.filesystem = FileSystem.of(root)
        self._dirfds = dirfds
        self.dirfd = partial(dirfds.get, root)  # a borrowed descriptor of the directory at a path: each access asks
        self._prefix = xattrs.prefix(mode) if mode else b"\0"
        self.hidden: frozenset[tuple[int, int]] = frozenset()  # (st_dev, st_ino) of directories to leave out
        flags = sysio.statvfs_fd(root).f_flag
        self.suid, self.dev = not flags & os.ST_NOSUID, not flags & os.ST_NODEV
        self.override = next((a for a in override.ATTRIBUTES if sysio.find_xattr(root, b"", a) is not None), None)

    def close(self) -> None:
        """Close the root descriptor; the cache of directories belongs to the stack."""
        sysio.close(self.root)

    # --- looking ---------------------------------------------------------------------------------------

    def stat(self, path: bytes, name: bytes) -> AnyStat:
        """Return the attributes of an object, with its override attribute applied where this layer has them."""
        return self.stat_at(self.dirfd(path), name)

    def stat_at(self, dirfd: int, name: bytes) -> AnyStat:
        """Return the attributes of an object of this layer at a descriptor, with its override attribute applied."""
        found = sysio.stat_at(dirfd, name)
        if self.override is None or stat.S_IFMT(found.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            return found
        value = sysio.find_xattr(dirfd, name, self.override)
        return found if value is None else overridden(found, override.parse(value))

    def probe(self, path: bytes, name: bytes) -> Entry:
        """Return the object of a name in this layer (docs/on-disk-format.md)."""
        dirfd = self.dirfd(path)
        try:
            found = self.stat_at(dirfd, name)
        except FileNotFoundError:
            return _WHITEOUT if self._has_dot_whiteout(dirfd, name) else _ABSENT
        if self.hidden and (found.st_dev, found.st_ino) in self.hidden:
            return _ABSENT
        return Entry(self._kind(dirfd, name, found), found)

    def plain_file(self, path: bytes, name: bytes) -> AnyStat | None:
        """Return the attributes of a regular file that has data and no extended attributes, hence no marks.

        None for everything else and when nothing exists: `probe` and `marks` distinguish these.
        """
        dirfd = self.dirfd(path)
        try:
            found = sysio.stat_at(dirfd, name)
        except FileNotFoundError:
            return None
        plain = self.override is None and stat.S_ISREG(found.st_mode) and found.st_size > 0
        return found if plain and not sysio.listxattr_at(dirfd, name) else None

    def _kind(self, dirfd: int, name: bytes, found: AnyStat) -> Kind:
        if stat.S_ISDIR(found.st_mode):
            return Kind.DIR
        if whiteout.is_device_whiteout(found.st_mode, found.st_rdev):
            return Kind.WHITEOUT
        if stat.S_ISREG(found.st_mode) and found.st_size == 0 and self._has_xattr_whiteout(dirfd, name):
            return Kind.WHITEOUT
        return Kind.FILE

    def _has_xattr_whiteout(self, dirfd: int, name: bytes) -> bool:
        return any(sysio.find_xattr(dirfd, name, prefix + xattrs.WHITEOUT) is not None for prefix in _PREFIXES)

    def _has_dot_whiteout(self, dirfd: int, name: bytes) -> bool:
        try:
            return stat.S_ISREG(sysio.stat_at(dirfd, whiteout.PREFIX + name).st_mode)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return False
            raise

    def names(self, path: bytes) -> dict[bytes, Kind]:
        """Return every name of a directory that takes part in a merge, with its kind.

        A `.wh.NAME` beside a directory NAME makes it opaque. Whiteouts of the attribute form appear as files here,
        because recognising them would cost a call for each; `probe` recognises them.
        """
        dirfd = self.dirfd(path)
        found: dict[bytes, Kind] = {}
        dotted: list[bytes] = []
        for name, kind in sysio.list_dir(dirfd):
            if whiteout.is_reserved(name):
                dotted.append(name)
            else:
                found[name] = self._listed_kind(dirfd, name, kind)
        self._add_dot_whiteouts(dirfd, dotted, found)
        return found

    def _listed_kind(self, dirfd: int, name: bytes, kind: int) -> Kind:
        if kind == stat.S_IFDIR:
            return Kind.DIR
        if kind in (0, stat.S_IFCHR) or self.override is not None:
            with suppress(OSError):  # a damaged object is listed; only access to it is an error
                return self._kind(dirfd, name, self.stat_at(dirfd, name))
        return Kind.FILE

    def _add_dot_whiteouts(self, dirfd: int, dotted: Iterable[bytes], found: dict[bytes, Kind]) -> None:
        for mark in dotted:
            name = whiteout.target(mark)
            if name is None or not self._has_dot_whiteout(dirfd, name):
                continue
            found[name] = Kind.OPAQUE if found.get(name) is Kind.DIR else found.get(name, Kind.WHITEOUT)

    # --- marks -----------------------------------------------------------------------------------------

    def marks(self, path: bytes, name: bytes, found: AnyStat) -> Marks:
        """Return the marks of an entry whose attributes are `found`; EIO for a malformed metacopy mark."""
        dirfd, isdir = self.dirfd(path), stat.S_ISDIR(found.st_mode)
        names = sysio.listxattr_at(dirfd, name)
        if not names and not isdir:
            return NO_MARKS
        present = {a for a in names if a.startswith(_PREFIXES) or a in _FOREIGN}
        cut = isdir and not self.lowest and self._is_opaque(path, name, present)
        if not present:
            return Marks(opaque=True) if cut else NO_MARKS
        value = self._read_own(dirfd, name, present)
        redirected = redirect.parse(value[xattrs.REDIRECT]) if xattrs.REDIRECT in value else None
        redirect_denied = redirected is not None and not self._may_follow(found) and not self.lowest
        return _file_marks(value, isdir)._replace(
            opaque=cut, redirect=None if redirect_denied else redirected, redirect_denied=redirect_denied
        )

    def marks_at(self, dirfd: int, name: bytes) -> Marks:
        """Return the marks of a file in a directory outside the tree, such as the index."""
        return self.marks_of(dirfd, name, sysio.listxattr_at(dirfd, name))

    def marks_of(self, dirfd: int, name: bytes, attributes: Sequence[bytes]) -> Marks:
        """Return the marks of such a file whose extended attributes have been listed already."""
        return _file_marks(self._read_own(dirfd, name, set(attributes))) if attributes else NO_MARKS

    def _read_own(self, dirfd: int, name: bytes, present: set[bytes]) -> dict[bytes, bytes]:
        values: dict[bytes, bytes] = {}
        for suffix in (xattrs.REDIRECT, xattrs.METACOPY, xattrs.ORIGIN, xattrs.NLINK):
            if self._prefix + suffix in present:
                values[suffix] = sysio.getxattr_at(dirfd, name, self._prefix + suffix)
        return values

    def _may_follow(self, found: AnyStat) -> bool:
        # Users cannot forge trusted.*, but they can forge user.*: only the mounting user's own redirects are followed.
        return self.mode is Mode.TRUSTED or found.st_uid == os.geteuid()

    def _is_opaque(self, path: bytes, name: bytes, present: set[bytes]) -> bool:
        dirfd = self.dirfd(path)
        if name:
            marked = any(
                opaque.is_opaque(sysio.find_xattr(dirfd, name, prefix + xattrs.OPAQUE))
                for prefix in _PREFIXES
                if prefix + xattrs.OPAQUE in present
            )
            if marked or self._is_foreign_opaque(dirfd, name, present) or self._has_dot_whiteout(dirfd, name):
                return True
        return self._has_opaque_file(join(path, name))

    def _is_foreign_opaque(self, dirfd: int, name: bytes, present: set[bytes]) -> bool:
        attribute = xattrs.FUSEOVERLAYFS_OPAQUE
        if attribute not in present:
            return False
        return opaque.is_opaque_fuseoverlayfs(sysio.find_xattr(dirfd, name, attribute))

    def _has_opaque_file(self, path: bytes) -> bool:
        try:
            return stat.S_ISREG(sysio.stat_at(self.dirfd(path), whiteout.OPAQUE_MARK).st_mode)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES):
                return False
            raise

    # --- content ---------------------------------------------------------------------------------------

    def open_file(self, path: bytes, name: bytes, keep_atime: bool = True) -> int:
        """Open a regular file for reading; EIO when something else has taken its place (CVE-2024-9676)."""
        fd = open_readable(self._dirfds, self.dirfd(path), name, keep_atime)
        try:
            if not stat.S_ISREG(sysio.stat_at(fd, b"").st_mode):
                raise oserror(errno.EIO, name)
        except BaseException:
            sysio.close(fd)
            raise
        return fd

    def pin(self, path: bytes, name: bytes) -> int:
        """Return an O_PATH descriptor of any object: it outlives the object's names."""
        dirfd = self.dirfd(path)
        return self._dirfds.retry(lambda: sysio.open_child(dirfd, name, os.O_PATH))


def _file_marks(value: dict[bytes, bytes], isdir: bool = False) -> Marks:
    """Return the marks of one object from their values, without those that only directories have."""
    is_copy = not isdir and xattrs.METACOPY in value
    if is_copy:
        metacopy.check(value[xattrs.METACOPY])
    came_from = origin.decode(value[xattrs.ORIGIN]) if xattrs.ORIGIN in value else None
    return Marks(metacopy=is_copy, origin=came_from, nlink=value.get(xattrs.NLINK))


_FOREIGN = frozenset((xattrs.FUSEOVERLAYFS_OPAQUE,))


def open_directory(path: bytes, what: str) -> int:
    """Open a directory that the user named, following links; MountError with a sentence if that fails."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        reason = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a directory"}.get(
            error.errno or 0, f"cannot be opened: {error.strerror}"
        )
        raise MountError(f"{what} {os.fsdecode(path)} {reason}") from error


def join(path: bytes, name: bytes) -> bytes:
    """Return the path of a child; either part may be empty."""
    return path + b"/" + name if path and name else path or name


def open_readable(dirfds: DirFds, dirfd: int, name: bytes, keep_atime: bool) -> int:
    """Open for reading, with `keep_atime` leaving the access time unchanged where O_NOATIME is permitted (open(2))."""
    if keep_atime:
        try:
            return dirfds.open_child(dirfd, name, _READ | os.O_NOATIME)
        except PermissionError:
            pass
    return dirfds.open_child(dirfd, name, _READ)
