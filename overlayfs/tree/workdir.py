"""The work directory: locked for one mount, emptied, then used to stage changes.

In the directory that the user names are `work/` (emptied at every mount), `index/` (hard links of copied-up files, in
the kernel's format) and `work/incompat/NAME` (a mark that forbids a mount by programs that do not know NAME).
Sources: docs/on-disk-format.md and the kernel's fs/overlayfs/super.c.
"""

import errno
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterable

from overlayfs import sysio
from overlayfs.errors import InUseError, MountError
from overlayfs.format import acl
from overlayfs.tree.layer import open_directory

_WORK = b"work"
_INDEX = b"index"
_INCOMPAT = b"incompat"
_VOLATILE = b"volatile"
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_ACLS = frozenset((acl.ACCESS, acl.DEFAULT))
_POLL = 0.02  # seconds between two attempts to lock: flock(2) has no timeout


class WorkDir:
    """`fd` is the descriptor of `work/`, `index` that of `index/` or None; both on the upper's file system."""

    def __init__(self, root: int, path: bytes) -> None:
        self.root = root
        self.path = path
        self.fd = -1
        self.index: int | None = None
        self._volatile = False
        self._numbers = itertools.count(1)
        self._left: list[bytes] = []  # names that could not be removed

    @classmethod
    def open(cls, path: bytes) -> "WorkDir":
        """Open the directory that the user named; MountError if that fails."""
        return cls(open_directory(path, "work directory"), path)

    def prepare(self) -> None:
        """Empty or make `work/`; the lock must be held. MountError when an incompatible mark is found."""
        self._refuse_incompatible()
        remove_tree(self.root, _WORK)
        sysio.mkdir_at(self.root, _WORK, 0o700)
        drop_inherited_acls(self.root, _WORK, ())
        sysio.chmod_at(self.root, _WORK, 0o700)
        self.fd = sysio.open_beneath(self.root, _WORK, os.O_PATH | os.O_DIRECTORY)

    def _refuse_incompatible(self) -> None:
        try:
            fd = sysio.open_beneath(self.root, _WORK + b"/" + _INCOMPAT, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            marks = [name for name, _ in sysio.list_dir(fd)]
        finally:
            sysio.close(fd)
        for mark in marks:
            place = os.fsdecode(os.path.join(self.path, _WORK, _INCOMPAT, mark))
            if mark == _VOLATILE:
                raise MountError(
                    f"a volatile mount of this upper was not unmounted cleanly, so it may have lost data; "
                    f"remove {place} to use it anyway"
                )
            raise MountError(f"the work directory needs an unknown feature: {place}")

    def open_index(self) -> None:
        """Make and open `index/`."""
        if not sysio.exists_at(self.root, _INDEX):
            sysio.mkdir_at(self.root, _INDEX, 0o700)
        self.index = sysio.open_beneath(self.root, _INDEX, os.O_PATH | os.O_DIRECTORY)

    def has_index_entries(self) -> bool:
        """Return whether a mount with an index has left entries."""
        if not sysio.exists_at(self.root, _INDEX):
            return False
        fd = sysio.open_beneath(self.root, _INDEX, os.O_PATH | os.O_DIRECTORY)
        try:
            return bool(sysio.list_dir(fd))
        finally:
            sysio.close(fd)

    def drop_unused_index(self) -> None:
        """Remove an index that is not in use: its entries refer to the upper, which is about to be replaced."""
        if self.index is None:
            remove_tree(self.root, _INDEX)

    def mark_volatile(self) -> None:
        """Write the mark of a mount that does not sync, before its first change (kernel: work/incompat/volatile)."""
        sysio.mkdir_at(self.fd, _INCOMPAT, 0o700)
        incompat = sysio.open_beneath(self.fd, _INCOMPAT, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sysio.mkdir_at(incompat, _VOLATILE, 0o700)
            volatile = sysio.open_beneath(incompat, _VOLATILE, os.O_PATH | os.O_DIRECTORY)
            try:
                sysio.mknod_at(volatile, b"dirty", stat.S_IFREG | 0o600, 0)
            finally:
                sysio.close(volatile)
            sysio.fsync(incompat)
        finally:
            sysio.close(incompat)
        self._volatile = True

    def temporary(self) -> bytes:
        """Return an unused name in `work/`, in the kernel's form. Thread-safe."""
        left, self._left = self._left, []
        for name in left:
            self.tidy(name)
        return b"#%x" % next(self._numbers)

    def discard(self, name: bytes) -> None:
        """Remove a staged object of any type, directories with their content; it may be gone already."""
        remove_tree(self.fd, name)

    def tidy(self, name: bytes) -> None:
        """Discard an object whose removal may fail: it is tried again later, and the next mount empties `work/`."""
        try:
            self.discard(name)
        except OSError:
            self._left.append(name)

    def close(self, clean: bool) -> None:
        """Close the descriptors; `clean`: all data is synced, so that the volatile mark is removed."""
        if clean and self._volatile:
            remove_tree(self.fd, _INCOMPAT)
        for fd in (self.fd, self.index, self.root):
            if fd is not None and fd >= 0:
                sysio.close(fd)


def drop_inherited_acls(dirfd: int, name: bytes, wanted: Iterable[bytes]) -> None:
    """Remove the ACLs that an object inherited from the directory it was made in, except the attributes in `wanted`.

    A staged object must have the ACLs of its source and no others; the kernel clears those of its work directory for
    the same reason (super.c, ovl_workdir_create).
    """
    for attribute in _ACLS.intersection(sysio.listxattr_at(dirfd, name)).difference(wanted):
        sysio.removexattr_at(dirfd, name, attribute)


def remove_tree(dirfd: int, name: bytes) -> None:
    """Remove an object of any type, directories with their content, without following links."""
    if _unlink(dirfd, name):
        return
    # By path from here on: a tree may be deeper than the interpreter's stack, or than there are descriptors.
    pending = [(name, False)]
    while pending:
        path, emptied = pending.pop()
        parent, _, base = path.rpartition(b"/")
        above = sysio.open_beneath(dirfd, parent, _WALK) if parent else dirfd
        try:
            if emptied:
                sysio.rmdir_at(above, base)
                continue
            pending.append((path, True))
            pending.extend((path + b"/" + child, False) for child in _empty(above, base))
        finally:
            if parent:
                sysio.close(above)


def _unlink(dirfd: int, name: bytes) -> bool:
    """Remove a name; return False if it is a directory. It may be gone already."""
    try:
        sysio.unlink_at(dirfd, name)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        return False
    return True


def _empty(dirfd: int, name: bytes) -> list[bytes]:
    """Remove the entries of a directory except the directories among them, and return the names of those."""
    if sysio.stat_at(dirfd, name).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        sysio.chmod_at(dirfd, name, 0o700)
    fd = sysio.open_child(dirfd, name, os.O_PATH | os.O_DIRECTORY)
    try:
        return [child for child, kind in sysio.list_dir(fd) if kind == stat.S_IFDIR or not _unlink(fd, child)]
    finally:
        sysio.close(fd)


def lock(fd: int, what: str, path: bytes, wait: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Lock an upper or work directory; wait up to `wait` seconds for another process to unlock it, else InUseError.

    The lock is a flock of the directory itself: the same for every path and bind mount of it, and released with its
    process.
    """
    until = clock() + wait
    while not sysio.try_lock(fd):
        if clock() >= until:
            raise InUseError(what, path, lock_holder(fd))
        time.sleep(_POLL)


def lock_holder(fd: int) -> int | None:
    """Return the pid that holds the flock of an open directory, from /proc/locks (proc(5)), or None."""
    found = sysio.stat_at(fd, b"")
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks", encoding="ascii") as table:
        for line in table:
            words = line.split()
            if place in words and "FLOCK" in words:
                return int(words[words.index(place) - 1])
    return None
