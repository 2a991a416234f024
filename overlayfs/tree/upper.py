"""The writable layer, and every change that is made to it.

Changes of names follow a plan of `union.plans`; the publishing step of a plan is one system call here.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from overlayfs import sysio
from overlayfs.format import opaque, override, whiteout, xattrs
from overlayfs.format.override import Override
from overlayfs.tree.dirfds import DirFds
from overlayfs.tree.features import Features
from overlayfs.tree.layer import Layer, Marks
from overlayfs.tree.workdir import WorkDir
from overlayfs.union.plans import Create, Mark, Move, Remove, Rename

Maker = Callable[[int, bytes], None]  # makes or changes the object at (dirfd, name)
Place = tuple[bytes, bytes]  # (path of the directory, name)


class Upper(Layer):
    """The upper directory with its work directory. All paths are paths of the overlay.

    override_as: the attribute in which owner and mode are kept, if the upper has none of its own (`format.override`).
    """

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
        """Write a mark. Without extended attributes only the opaque mark can be written, as a file."""
        if self.mode is None:
            if suffix == xattrs.OPAQUE:
                self._set_opaque_file(dirfd, name)
            return
        try:
            sysio.setxattr_at(dirfd, name, self._prefix + suffix, value)
        except OSError as error:
            # user.* is for files and directories only (xattr(7)), and a symlink can do without its origin.
            if error.errno != errno.EPERM or suffix != xattrs.ORIGIN:
                raise

    def _set_opaque_file(self, dirfd: int, name: bytes) -> None:
        inside = sysio.open_child(dirfd, name, os.O_PATH | os.O_DIRECTORY)
        try:
            with suppress(FileExistsError):
                sysio.mknod_at(inside, whiteout.OPAQUE_MARK, stat.S_IFREG | 0o600, 0)
        finally:
            sysio.close(inside)

    def drop_mark(self, dirfd: int, name: bytes, suffix: bytes) -> None:
        """Remove a mark; it may be gone already."""
        try:
            sysio.removexattr_at(dirfd, name, self._prefix + suffix)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise

    def set_opaque(self, dirfd: int, name: bytes) -> None:
        """Make a directory opaque: it hides the lower directories."""
        self.set_mark(dirfd, name, xattrs.OPAQUE, opaque.OPAQUE_VALUE)

    def index_marks(self, name: bytes) -> Marks:
        """Return the marks of an entry of the index."""
        assert self.work.index is not None
        return self.marks_at(self.work.index, name)

    # --- owner and mode --------------------------------------------------------------------------------

    def set_owner(self, dirfd: int, name: bytes, uid: int, gid: int) -> None:
        """Set owner and group, -1 keeps one; in the override attribute if this upper keeps them there."""
        if self.override is None or not self._set_override(dirfd, name, uid=uid, gid=gid):
            found = sysio.stat_at(dirfd, name)
            # chown(2) of anything but a directory clears set-id bits even if it changes nothing; callers rely on that.
            clears_bits = found.st_mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISDIR(found.st_mode)
            if uid in (-1, found.st_uid) and gid in (-1, found.st_gid) and not clears_bits:
                return
            sysio.chown_at(dirfd, name, uid, gid)

    def set_mode(self, dirfd: int, name: bytes, mode: int) -> None:
        """Set permission bits; in the override attribute if this upper keeps them there."""
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
        # The daemon must have access whatever the shown mode says: real permissions are widened as in fuse-overlayfs.
        sysio.chmod_at(dirfd, name, stat.S_IMODE(real.st_mode) & 0o777 | 0o755)
        sysio.setxattr_at(dirfd, name, self.override, override.encode(new))
        return True

    def make_special(self, dirfd: int, name: bytes, mode: int, rdev: int) -> None:
        """Make a device, FIFO or socket; as a file with an override attribute if this upper uses them."""
        if self.override is None:
            sysio.mknod_at(dirfd, name, mode, rdev)
            return
        sysio.mknod_at(dirfd, name, stat.S_IFREG | 0o755, 0)
        shown = Override(os.geteuid(), os.getegid(), stat.S_IMODE(mode), stat.S_IFMT(mode), rdev)
        sysio.setxattr_at(dirfd, name, self.override, override.encode(shown))

    def copy_root_attributes(self, source: Layer) -> None:
        """Copy owner, mode, attributes and times of another layer's root to this root, without its marks."""
        found = source.stat_at(source.root, b"")
        self.set_owner(self.root, b"", found.st_uid, found.st_gid)
        for attribute in sysio.listxattr_at(source.root, b""):
            if not xattrs.is_private(attribute, source.override is not None):
                sysio.setxattr_at(self.root, b"", attribute, sysio.getxattr_at(source.root, b"", attribute))
        self.set_mode(self.root, b"", stat.S_IMODE(found.st_mode))
        sysio.utimens_at(self.root, b"", found.st_atime_ns, found.st_mtime_ns)

    # --- creating --------------------------------------------------------------------------------------

    def create(self, place: Place, how: Create, make: Maker, prepare: Maker | None) -> None:
        """Make an object at `place`. `prepare` applies what must be there before its name appears.

        EEXIST when the name exists meanwhile. After an error nothing is left.
        """
        if how is Create.IN_PLACE and prepare is None:
            make(self.dirfd(place[0]), place[1])
            return
        temporary = self.work.temporary()
        try:
            make(self.work.fd, temporary)
            if prepare is not None:
                prepare(self.work.fd, temporary)
            self.publish(temporary, self.dirfd(place[0]), place[1], how)
        except BaseException:
            self.work.tidy(temporary)
            raise

    def publish(self, temporary: bytes, dirfd: int, name: bytes, how: Create) -> None:
        """Move a staged object to its place, the step that makes a creation or copy-up visible."""
        if how is Create.EXCHANGE_WHITEOUT:
            self._exchange(self.work.fd, temporary, dirfd, name)
            self.work.tidy(temporary)
        elif how is Create.OVER_WHITEOUT or not self.features.flags:
            sysio.rename_at(self.work.fd, temporary, dirfd, name)
        else:
            sysio.rename_at(self.work.fd, temporary, dirfd, name, sysio.RENAME_NOREPLACE)

    def link(self, source_dirfd: int, source_name: bytes, place: Place, how: Create) -> None:
        """Give an upper object one more name at `place`."""
        if how is Create.IN_PLACE:
            sysio.link_at(source_dirfd, source_name, self.dirfd(place[0]), place[1])
            return
        temporary = self.work.temporary()
        sysio.link_at(source_dirfd, source_name, self.work.fd, temporary)
        try:
            self.publish(temporary, self.dirfd(place[0]), place[1], how)
        except BaseException:
            self.work.tidy(temporary)
            raise

    # --- removing --------------------------------------------------------------------------------------

    def remove(self, place: Place, how: Remove, is_dir: bool) -> None:
        """Remove a name by a plan."""
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
        """Replace the object of a name by a whiteout; `exchange` for a directory, which is then emptied in `work/`."""
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
        # The whiteout has a name of its own, so it can be made first; it hides nothing in its own layer.
        dirfd, name = self.dirfd(place[0]), place[1]
        self._make_dot_whiteout(dirfd, name)
        try:
            if is_dir:
                self._move_aside(dirfd, name)
            else:
                sysio.unlink_at(dirfd, name)
        except FileNotFoundError:
            pass  # only the lower object existed

    def _make_dot_whiteout(self, dirfd: int, name: bytes) -> None:
        with suppress(FileExistsError):
            sysio.mknod_at(dirfd, whiteout.name_for(name), stat.S_IFREG | 0o600, 0)

    # --- moving ----------------------------------------------------------------------------------------

    def rename(self, source: Place, target: Place, plan: Rename, redirects: tuple[bytes | None, bytes | None]) -> None:
        """Execute a rename plan; `redirects` are the values for a source and a target that get one."""
        self._mark_moving(source, plan.source_mark, redirects[0])
        self._mark_moving(target, plan.target_mark, redirects[1])
        if plan.clear_target:
            self.clear(target)
        self._move(source, target, plan.move)
        if plan.sweep_old:
            with suppress(OSError):  # a whiteout that hides nothing
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
        """Replace a directory that contains only whiteouts by an empty opaque one with the same attributes.

        The kernel does the same before it renames over such a directory (ovl_clear_empty).
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
        """Close the cached descriptor of a directory that is removed; those inside it are closed already."""
        self._dirfds.forget(self.root, _path(place))

    def forget_moved(self, *places: Place) -> None:
        """Close the cached descriptors of directories that have moved from or to these places."""
        for place in places:
            self._dirfds.forget_below(self.root, _path(place))


def _path(place: Place) -> bytes:
    return place[0] + b"/" + place[1] if place[0] else place[1]
