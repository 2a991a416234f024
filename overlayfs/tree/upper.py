"""The writable layer: what its file system can do, and every change that is made to it.

A change is carried out by a plan of `union.plans`; what a plan calls the publishing step is one system call here.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import opaque, override, whiteout, xattrs
from overlayfs.format.override import Override
from overlayfs.format.xattrs import Mode
from overlayfs.tree.dirfds import DirFds
from overlayfs.tree.layer import Layer, Marks
from overlayfs.tree.workdir import WorkDir
from overlayfs.union.plans import Create, Mark, Move, Remove, Rename

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.ENOSYS)

Maker = Callable[[int, bytes], None]  # makes or changes the object at (dirfd, name)
Place = tuple[bytes, bytes]  # (path of the directory, name)


@dataclass(frozen=True)
class Features:
    """What the upper's file system offers: found out by trying, at every mount."""

    mode: Mode | None  # which attributes can hold our marks; None: no attributes at all
    devices: bool  # whiteouts as 0:0 devices
    flags: bool  # RENAME_EXCHANGE, RENAME_NOREPLACE
    rename_whiteout: bool
    handles: bool  # file handles, which name the entries of the index
    acl: bool

    def missing(self) -> list[str]:
        """Return a sentence for each feature that is off, and what follows."""
        facts = (
            (self.mode is not None, "no extended attributes: opaque directories are marked by a file, "
             "directory renames copy, chmod copies data, inode numbers change over copy-up and remount"),
            (self.devices, "no device files: whiteouts are files named .wh.NAME, names are limited to 251 bytes"),
            (self.flags, "no RENAME_EXCHANGE: some changes take two steps and are not safe against a crash between"),
            (self.handles, "no file handles: hard links to lower files part after copy-up and remount"),
            (self.acl, "no POSIX ACLs"),
        )  # fmt: skip
        return [text for there, text in facts if not there]


class Upper(Layer):
    """The upper directory with its work directory. All paths are paths of the overlay: the upper is never moved."""

    def __init__(
        self, root: int, dirfds: DirFds, features: Features, work: WorkDir, volatile: bool, override_as: bytes | None
    ) -> None:
        super().__init__(0, root, dirfds, features.mode, lowest=False)
        self.features = features
        self.work = work
        self.volatile = volatile
        self.sync_fd = work.root
        self.override = self.override or override_as

    # --- marks -----------------------------------------------------------------------------------------

    def set_mark(self, dirfd: int, name: bytes, suffix: bytes, value: bytes) -> None:
        """Write an attribute of the format. Without attributes only opaque has another form, a file."""
        if self.mode is not None:
            self._set_mark_xattr(dirfd, name, suffix, value)
        elif suffix == xattrs.OPAQUE:
            self._set_opaque_file(dirfd, name)

    def _set_mark_xattr(self, dirfd: int, name: bytes, suffix: bytes, value: bytes) -> None:
        try:
            sysio.setxattr_at(dirfd, name, self._prefix + suffix, value)
        except OSError as error:
            # user.* is for files and directories only (xattr(7)): an origin on a symlink is a luxury.
            if error.errno != errno.EPERM or suffix != xattrs.ORIGIN:
                raise

    def _set_opaque_file(self, dirfd: int, name: bytes) -> None:
        inside = sysio.open_child(dirfd, name, os.O_PATH | os.O_DIRECTORY)
        try:
            with suppress(FileExistsError):
                sysio.mknod_at(inside, whiteout.OPAQUE_MARK, stat.S_IFREG | 0o600, 0)
        finally:
            sysio.close(inside)

    def get_mark(self, dirfd: int, name: bytes, suffix: bytes) -> bytes | None:
        """Return the value of an attribute of the format, or None."""
        return None if self.mode is None else sysio.find_xattr(dirfd, name, self._prefix + suffix)

    def drop_mark(self, dirfd: int, name: bytes, suffix: bytes) -> None:
        """Remove an attribute of the format; it may be gone already."""
        try:
            sysio.removexattr_at(dirfd, name, self._prefix + suffix)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise

    def set_opaque(self, dirfd: int, name: bytes) -> None:
        """Cut a directory off from what lies below it."""
        self.set_mark(dirfd, name, xattrs.OPAQUE, opaque.OPAQUE_VALUE)

    def index_marks(self, name: bytes) -> Marks:
        """Return the marks of an entry of the index."""
        assert self.work.index is not None
        return self.marks_at(self.work.index, name)

    # --- owner and mode --------------------------------------------------------------------------------

    def set_owner(self, dirfd: int, name: bytes, uid: int, gid: int) -> None:
        """Set owner and group, -1 keeps one; in the override attribute if this upper has them there."""
        if self.override is None or not self._set_override(dirfd, name, uid=uid, gid=gid):
            found = sysio.stat_at(dirfd, name)
            if uid in (-1, found.st_uid) and gid in (-1, found.st_gid) and not _clears_bits(found):
                return
            sysio.chown_at(dirfd, name, uid, gid)

    def set_mode(self, dirfd: int, name: bytes, mode: int) -> None:
        """Set permission bits; in the override attribute if this upper has them there."""
        if self.override is None or not self._set_override(dirfd, name, mode=mode):
            sysio.chmod_at(dirfd, name, mode)

    def _set_override(self, dirfd: int, name: bytes, uid: int = -1, gid: int = -1, mode: int = -1) -> bool:
        real = sysio.stat_at(dirfd, name)
        if stat.S_IFMT(real.st_mode) not in (stat.S_IFREG, stat.S_IFDIR) or self.override is None:
            return False
        value = sysio.find_xattr(dirfd, name, self.override)
        old = override.parse(value) if value else Override(real.st_uid, real.st_gid, stat.S_IMODE(real.st_mode))
        new = Override(
            old.uid if uid == -1 else uid,
            old.gid if gid == -1 else gid,
            old.mode if mode == -1 else mode & 0o7777,
            old.kind,
            old.rdev,
        )
        # The daemon must reach the object whatever its users may do: widened as fuse-overlayfs does.
        sysio.chmod_at(dirfd, name, stat.S_IMODE(real.st_mode) & 0o777 | 0o755)
        sysio.setxattr_at(dirfd, name, self.override, override.encode(new))
        return True

    def make_special(self, dirfd: int, name: bytes, mode: int, rdev: int) -> None:
        """Make a device, FIFO or socket; as a file with its type in the override attribute if this upper does so."""
        if self.override is None:
            sysio.mknod_at(dirfd, name, mode, rdev)
            return
        sysio.mknod_at(dirfd, name, stat.S_IFREG | 0o755, 0)
        shown = Override(os.geteuid(), os.getegid(), stat.S_IMODE(mode), stat.S_IFMT(mode), rdev)
        sysio.setxattr_at(dirfd, name, self.override, override.encode(shown))

    def apply_attributes_to_root(self, source: Layer) -> None:
        """Give the root owner, mode, attributes and times of another layer's root, without its marks."""
        found = source.stat_at(source.root, b"")
        self.set_owner(self.root, b"", found.st_uid, found.st_gid)
        for attribute in sysio.listxattr_at(source.root, b""):
            if not xattrs.is_private(attribute, source.override is not None):
                sysio.setxattr_at(self.root, b"", attribute, sysio.getxattr_at(source.root, b"", attribute))
        self.set_mode(self.root, b"", stat.S_IMODE(found.st_mode))
        sysio.utimens_at(self.root, b"", found.st_atime_ns, found.st_mtime_ns)

    # --- creating --------------------------------------------------------------------------------------

    def create(self, place: Place, how: Create, make: Maker, dress: Maker | None) -> None:
        """Make an object at `place`. `dress` gives it what must be there before its name appears.

        EEXIST when the name is taken after all. On an error nothing stays.
        """
        if how is Create.IN_PLACE and dress is None:
            make(self.dirfd(place[0]), place[1])
            return
        temporary = self.work.temporary()
        try:
            make(self.work.fd, temporary)
            if dress is not None:
                dress(self.work.fd, temporary)
            self.publish(temporary, place, how)
        except BaseException:
            self.work.tidy(temporary)
            raise

    def publish(self, temporary: bytes, place: Place, how: Create) -> None:
        """Move a staged object to its place: the step that makes a creation or copy-up visible."""
        dirfd = self.dirfd(place[0])
        if how is Create.EXCHANGE_WHITEOUT:
            self._exchange(self.work.fd, temporary, dirfd, place[1])
            self.work.tidy(temporary)
        elif how is Create.OVER_WHITEOUT or not self.features.flags:
            sysio.rename_at(self.work.fd, temporary, dirfd, place[1])
        else:
            sysio.rename_at(self.work.fd, temporary, dirfd, place[1], sysio.RENAME_NOREPLACE)

    def link(self, source_dirfd: int, source_name: bytes, place: Place, how: Create) -> None:
        """Give an upper object one more name at `place`."""
        if how is Create.IN_PLACE:
            sysio.link_at(source_dirfd, source_name, self.dirfd(place[0]), place[1])
            return
        temporary = self.work.temporary()
        sysio.link_at(source_dirfd, source_name, self.work.fd, temporary)
        try:
            self.publish(temporary, place, how)
        except BaseException:
            self.work.tidy(temporary)
            raise

    # --- removing --------------------------------------------------------------------------------------

    def remove(self, place: Place, how: Remove, is_dir: bool) -> None:
        """Take a name away as the plan says."""
        dirfd, name = self.dirfd(place[0]), place[1]
        if how is Remove.UNLINK:
            (sysio.rmdir_at if is_dir else sysio.unlink_at)(dirfd, name)
        elif how is Remove.MOVE_ASIDE:
            self._move_aside(dirfd, name)
        elif not self.features.devices:
            self._hide_by_dot_file(place, is_dir)
        elif how is Remove.HIDE:
            sysio.mknod_at(dirfd, name, stat.S_IFCHR, 0)
        else:
            self._put_whiteout(dirfd, name, exchange=how is Remove.EXCHANGE_WHITEOUT)

    def _put_whiteout(self, dirfd: int, name: bytes, exchange: bool) -> None:
        """Put a whiteout in the place of whatever has the name; `exchange` for a directory, emptied aside after."""
        temporary = self.work.temporary()
        sysio.mknod_at(self.work.fd, temporary, stat.S_IFCHR, 0)
        try:
            if not exchange:
                sysio.rename_at(self.work.fd, temporary, dirfd, name)
                return
            self._exchange(self.work.fd, temporary, dirfd, name)
        except BaseException:
            self.work.tidy(temporary)
            raise
        self.work.tidy(temporary)

    def _move_aside(self, dirfd: int, name: bytes) -> None:
        temporary = self.work.temporary()
        sysio.rename_at(dirfd, name, self.work.fd, temporary)
        self.work.tidy(temporary)

    def _hide_by_dot_file(self, place: Place, is_dir: bool) -> None:
        # The whiteout has its own name: it is there first, and hides nothing of its own layer.
        dirfd, name = self.dirfd(place[0]), place[1]
        self._make_dot_whiteout(dirfd, name)
        try:
            if is_dir:
                self._move_aside(dirfd, name)
            else:
                sysio.unlink_at(dirfd, name)
        except FileNotFoundError:
            pass  # there was only the lower object

    def _make_dot_whiteout(self, dirfd: int, name: bytes) -> None:
        with suppress(FileExistsError):
            sysio.mknod_at(dirfd, whiteout.name_for(name), stat.S_IFREG | 0o600, 0)

    # --- moving ----------------------------------------------------------------------------------------

    def rename(self, source: Place, target: Place, plan: Rename, redirects: tuple[bytes | None, bytes | None]) -> None:
        """Carry out a rename plan; `redirects` are the values for a source and a target that get one."""
        self._mark_moving(source, plan.source_mark, redirects[0])
        self._mark_moving(target, plan.target_mark, redirects[1])
        if plan.clear_target:
            self.clear(target)
        self._move(source, target, plan.move)
        if plan.sweep_old:
            with suppress(OSError):  # it hides nothing
                sysio.unlink_at(self.dirfd(source[0]), source[1])

    def _mark_moving(self, place: Place, mark: Mark, redirect: bytes | None) -> None:
        dirfd = self.dirfd(place[0])
        if mark is Mark.OPAQUE:
            self.set_opaque(dirfd, place[1])
        if redirect is not None:
            self.set_mark(dirfd, place[1], xattrs.REDIRECT, redirect)

    def _move(self, source: Place, target: Place, move: Move) -> None:
        old, new = self.dirfd(source[0]), self.dirfd(target[0])
        if Move.EXCHANGE in move:
            self._exchange(old, source[1], new, target[1])
        elif Move.WHITEOUT not in move:
            sysio.rename_at(old, source[1], new, target[1])
        elif not self.features.devices:
            self._make_dot_whiteout(old, source[1])
            sysio.rename_at(old, source[1], new, target[1])
        elif self.features.rename_whiteout:
            sysio.rename_at(old, source[1], new, target[1], sysio.RENAME_WHITEOUT)
        else:
            sysio.rename_at(old, source[1], new, target[1])
            self._put_whiteout(old, source[1], exchange=False)

    def clear(self, place: Place) -> None:
        """Replace a directory that holds only whiteouts by an empty opaque one of the same attributes.

        The kernel does so before it renames over one (ovl_clear_empty).
        """
        dirfd, name = self.dirfd(place[0]), place[1]
        found = sysio.stat_at(dirfd, name)
        temporary = self.work.temporary()
        try:
            sysio.mkdir_at(self.work.fd, temporary, 0o700)
            sysio.chown_at(self.work.fd, temporary, found.st_uid, found.st_gid)
            for attribute in sysio.listxattr_at(dirfd, name):
                sysio.setxattr_at(self.work.fd, temporary, attribute, sysio.getxattr_at(dirfd, name, attribute))
            self.set_opaque(self.work.fd, temporary)
            sysio.chmod_at(self.work.fd, temporary, stat.S_IMODE(found.st_mode))
            self._exchange(self.work.fd, temporary, dirfd, name)
        finally:
            self.work.tidy(temporary)
        self.forget(place)

    def _exchange(self, dirfd: int, name: bytes, other_dirfd: int, other_name: bytes) -> None:
        if self.features.flags:
            sysio.rename_at(dirfd, name, other_dirfd, other_name, sysio.RENAME_EXCHANGE)
            return
        temporary = self.work.temporary()
        sysio.rename_at(other_dirfd, other_name, self.work.fd, temporary)
        sysio.rename_at(dirfd, name, other_dirfd, other_name)
        sysio.rename_at(self.work.fd, temporary, dirfd, name)

    def forget(self, place: Place) -> None:
        """Drop the cached descriptor of a directory that goes; those in it have gone before."""
        self._dirfds.forget(self.root, _path(place))

    def forget_moved(self, *places: Place) -> None:
        """Drop the cached descriptors of directories that have moved away from or to these places."""
        for place in places:
            self._dirfds.forget_below(self.root, _path(place))


def _path(place: Place) -> bytes:
    return place[0] + b"/" + place[1] if place[0] else place[1]


def _clears_bits(found: os.stat_result) -> bool:
    # chown(2) of anything but a directory clears set-id bits even when it changes nothing: keep that.
    return not stat.S_ISDIR(found.st_mode) and bool(found.st_mode & (stat.S_ISUID | stat.S_ISGID))


# --- what the file system can do -----------------------------------------------------------------------------


def find_features(work: WorkDir, wanted: Mode | None) -> Features:
    """Try out what the file system of a prepared work directory offers; `wanted` chooses the attributes."""
    probe = work.temporary()
    sysio.mkdir_at(work.fd, probe, 0o700)
    fd = sysio.open_child(work.fd, probe, os.O_PATH | os.O_DIRECTORY)
    try:
        return Features(
            mode=_find_mode(fd, wanted),
            devices=_works(lambda: sysio.mknod_at(fd, b"whiteout", stat.S_IFCHR, 0)),
            flags=_works(lambda: _try_exchange(fd)),
            rename_whiteout=_works(lambda: _try_rename_whiteout(fd)),
            handles=sysio.file_handle(fd, b"") is not None,
            acl=_has_acl(fd),
        )
    finally:
        sysio.close(fd)
        work.discard(probe)


def _works(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _find_mode(fd: int, wanted: Mode | None) -> Mode | None:
    for mode in (wanted,) if wanted else Mode:
        attribute = xattrs.prefix(mode) + xattrs.OPAQUE
        if _works(partial(sysio.setxattr_at, fd, b"", attribute, b"0")):
            return mode
    if wanted is not None:
        raise oserror(errno.EOPNOTSUPP)
    return None


def _try_exchange(fd: int) -> None:
    for name in (b"one", b"two"):
        sysio.mknod_at(fd, name, stat.S_IFREG | 0o600, 0)
    sysio.rename_at(fd, b"one", fd, b"two", sysio.RENAME_EXCHANGE)


def _try_rename_whiteout(fd: int) -> None:
    sysio.mknod_at(fd, b"moving", stat.S_IFREG | 0o600, 0)
    sysio.rename_at(fd, b"moving", fd, b"moved", sysio.RENAME_WHITEOUT)


def _has_acl(fd: int) -> bool:
    try:
        sysio.getxattr_at(fd, b"", b"system.posix_acl_default")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True
