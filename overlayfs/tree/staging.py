"""Copy-up: an object of a lower layer is built again in the work directory, complete, and published by one rename.

Building needs descriptors and values only, so it may run in a thread (design, D9). The order is that of semantics,
section 8: data, owner (which clears set-id bits and capabilities), attributes, mode, times, fsync. Without the fsync
before the rename a power cut leaves an empty file over an intact lower one (reliability, section 1).
"""

import errno
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from overlayfs import sysio
from overlayfs.format import xattrs
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Upper
from overlayfs.tree.workdir import drop_inherited_acls

# An upper that cannot hold these is no reason to fail: labels are set by policy, see semantics, section 8.
_OPTIONAL = frozenset((b"security.selinux",))
_OPTIONAL_PREFIXES = (b"trusted.",)
_CAPABILITY = b"security.capability"
_PUNCH_HOLE = 1 | 2  # FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of fallocate(2)
_SET_ID = stat.S_ISUID | stat.S_ISGID


class Content(Enum):
    """What becomes of the data of a regular file."""

    COPY = auto()  # cloned or copied, holes kept
    METACOPY = auto()  # stays in the lower layer: a metadata-only copy
    NONE = auto()  # about to be truncated: not copied


@dataclass(frozen=True)
class Source:
    """A lower object, pinned: all that building a copy needs.

    pin: an O_PATH descriptor. data: a descriptor open for reading, for Content.COPY of a regular file.
    marks: suffix and value of each attribute of the format that the copy gets. override: the layer's files carry
    override attributes, which belong to the layer and are not copied. suid: False when the copy of a file must not give
    anybody rights that the layer, which lies on a nosuid mount, does not give.
    """

    pin: int
    stat: AnyStat
    content: Content = Content.NONE
    data: int | None = None
    marks: Mapping[bytes, bytes] = field(default_factory=dict)
    override: bool = False
    suid: bool = True

    def close(self) -> None:
        """Give the descriptors back."""
        sysio.close(self.pin)
        if self.data is not None:
            sysio.close(self.data)


def build(upper: Upper, source: Source) -> bytes:
    """Build a copy of `source` in the work directory and return its temporary name; on an error nothing stays."""
    name = upper.work.temporary()
    try:
        _make(upper, source, name)
        _apply_attributes(upper, source, upper.work.fd, name)
        if stat.S_ISREG(source.stat.st_mode) and source.content is Content.COPY and not upper.volatile:
            _sync(upper, name)
    except BaseException:
        upper.work.tidy(name)
        raise
    return name


def build_directory(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    """Make a copy of a directory, without what is in it, outside of an upper but in the form that it has there."""
    sysio.mkdir_at(dirfd, name, 0o700)
    drop_inherited_acls(dirfd, name, ())
    _apply_attributes(upper, source, dirfd, name)


def _apply_attributes(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    """Give a new object all that its source has besides its content, and the marks of its place."""
    upper.set_owner(dirfd, name, source.stat.st_uid, source.stat.st_gid)
    copy_xattrs(upper, source, dirfd, name)
    for suffix, value in source.marks.items():
        upper.set_mark(dirfd, name, suffix, value)
    _copy_mode_and_times(upper, source, dirfd, name)


def _make(upper: Upper, source: Source, name: bytes) -> None:
    kind = stat.S_IFMT(source.stat.st_mode)
    if kind == stat.S_IFREG:
        _make_file(upper, source, name)
    elif kind == stat.S_IFDIR:
        sysio.mkdir_at(upper.work.fd, name, 0o700)
    elif kind == stat.S_IFLNK:
        sysio.symlink_at(sysio.readlink_at(source.pin, b""), upper.work.fd, name)
    else:
        upper.make_special(upper.work.fd, name, kind | 0o600, source.stat.st_rdev)


def _make_file(upper: Upper, source: Source, name: bytes) -> None:
    fd = sysio.open_child(upper.work.fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if source.content is Content.METACOPY:
            sysio.truncate_fd(fd, source.stat.st_size)
        elif source.content is Content.COPY and source.data is not None:
            copy_data(source.data, fd)
    finally:
        sysio.close(fd)


def copy_data(source: int, target: int) -> None:
    """Fill an empty file, or a hole, with all data of another: shared blocks where possible, else holes are kept."""
    if not sysio.clone_file(source, target):
        sysio.copy_data(source, target, sysio.stat_at(source, b"").st_size)


def copy_xattrs(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    """Copy all attributes but private ones and marks of the format; escaped ones stay escaped."""
    for attribute in sysio.listxattr_at(source.pin, b""):
        if xattrs.is_private(attribute, source.override) or (attribute == _CAPABILITY and not source.suid):
            continue
        try:
            sysio.setxattr_at(dirfd, name, attribute, sysio.getxattr_at(source.pin, b"", attribute))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM) or not _is_optional(upper, attribute):
                raise


def _is_optional(upper: Upper, attribute: bytes) -> bool:
    if attribute in _OPTIONAL or attribute.startswith(_OPTIONAL_PREFIXES):
        return True
    return upper.features.mode is None and not attribute.startswith(b"security.")


def _copy_mode_and_times(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    if not stat.S_ISLNK(source.stat.st_mode):
        kept = ~0 if source.suid or not stat.S_ISREG(source.stat.st_mode) else ~_SET_ID
        upper.set_mode(dirfd, name, stat.S_IMODE(source.stat.st_mode) & kept)
    cut = stat.S_ISREG(source.stat.st_mode) and source.content is Content.NONE and source.stat.st_size > 0
    mtime = time.time_ns() if cut else source.stat.st_mtime_ns  # truncating is a change of the content
    sysio.utimens_at(dirfd, name, source.stat.st_atime_ns, mtime)


def _sync(upper: Upper, name: bytes) -> None:
    # Without the right to read its own copy (rootless, mode 0) the owner syncs the file system instead.
    try:
        fd = sysio.open_child(upper.work.fd, name, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        sysio.syncfs(upper.sync_fd)
        return
    try:
        sysio.fsync(fd)
    finally:
        sysio.close(fd)


def fill(upper: Upper, pin: int, target: int, data: int) -> None:
    """Give a metadata-only copy, open for writing at `target` and pinned, its data: complete, synced, then unmarked.

    Nobody sees it: the size stays, and until the mark goes, which is last, a reader takes the data from below, also
    after a crash. Times stay. On an error the room that the data took is given back.
    """
    before = sysio.stat_at(target, b"")
    caps = sysio.find_xattr(target, b"", _CAPABILITY)
    try:
        copy_data(data, target)
    except OSError:
        with suppress(OSError):
            sysio.fallocate(target, _PUNCH_HOLE, 0, before.st_size)
        raise
    finally:
        if caps is not None:  # writing has removed it
            sysio.setxattr_at(pin, b"", _CAPABILITY, caps)
        sysio.utimens_at(target, b"", before.st_atime_ns, before.st_mtime_ns)
    if not upper.volatile:
        sysio.fsync(target)
    upper.drop_mark(pin, b"", xattrs.METACOPY)
