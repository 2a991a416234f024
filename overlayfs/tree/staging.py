"""Staging of a copy-up: a complete copy of a lower object in the work directory, which one rename then publishes.

Building needs only descriptors and values, so it may run in a thread. The order is: data, owner (which clears set-id
bits and capabilities), attributes, mode, times, fsync. Without the fsync before the rename a power cut can leave an
empty file over an intact lower one (docs/reliability.md, planted bug M1).
"""

import errno
import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.format import xattrs
from overlayfs.tree.stats import AnyStat
from overlayfs.tree.upper import Upper
from overlayfs.tree.workdir import drop_inherited_acls

# An upper that cannot store these is no reason to fail: labels are set by policy.
_OPTIONAL = frozenset((b"security.selinux",))
_OPTIONAL_PREFIXES = (b"trusted.",)
_CAPABILITY = b"security.capability"
_PUNCH_HOLE = 1 | 2  # FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of fallocate(2)
_SET_ID = stat.S_ISUID | stat.S_ISGID


class Content(Enum):
    """How the data of a regular file is copied up."""

    COPY = auto()  # cloned or copied, holes kept
    METACOPY = auto()  # stays in the lower layer: a metadata-only copy
    NONE = auto()  # about to be truncated: not copied


@dataclass(frozen=True)
class Source:
    """A pinned lower object and all that is needed to copy it.

    pin: an O_PATH descriptor. data: a descriptor open for reading, for Content.COPY of a regular file.
    marks: suffix and value of each mark that the copy gets. override: the layer's files have override attributes,
    which belong to the layer and are not copied. suid: False if the layer is on a nosuid mount, so that the copy of a
    file must not have set-id bits or capabilities.
    """

    pin: int
    stat: AnyStat
    content: Content = Content.NONE
    data: int | None = None
    marks: Mapping[bytes, bytes] = field(default_factory=dict)
    override: bool = False
    suid: bool = True
    attributes: Sequence[bytes] | None = None

    def close(self) -> None:
        """Close the descriptors."""
        sysio.close(self.pin)
        if self.data is not None:
            sysio.close(self.data)


class Staged(NamedTuple):
    """A complete copy in the work directory: its temporary name, and for a regular file a descriptor for writing."""

    name: bytes
    fd: int | None = None

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd is not None:
            sysio.close(self.fd)


def build(upper: Upper, source: Source) -> Staged:
    """Build a copy of `source` in the work directory; on an error nothing stays."""
    name = upper.work.temporary()
    fd = None
    try:
        if stat.S_ISREG(source.stat.st_mode):
            fd = _make_file(upper, source, name)
            _apply_attributes(upper, source, fd, b"")
            if source.content is Content.COPY and not upper.volatile:
                sysio.fsync(fd)
        else:
            _make_special(upper, source, name)
            _apply_attributes(upper, source, upper.work.fd, name)
    except BaseException:
        if fd is not None:
            sysio.close(fd)
        upper.work.tidy(name)
        raise
    return Staged(name, fd)


def build_directory(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    """Make a copy of a directory without its entries at (`dirfd`, `name`), outside the upper but in its format."""
    sysio.mkdir_at(dirfd, name, 0o700)
    drop_inherited_acls(dirfd, name, ())
    _apply_attributes(upper, source, dirfd, name)


def _apply_attributes(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    """Give a new object everything that its source has besides its content, and the marks of its place."""
    found = source.stat
    upper.set_owner(dirfd, name, found.st_uid, found.st_gid)
    if source.attributes is None or source.attributes:
        copy_xattrs(upper, source, dirfd, name)
    for suffix, value in source.marks.items():
        upper.set_mark(dirfd, name, suffix, value)
    is_file = stat.S_ISREG(found.st_mode)
    if not stat.S_ISLNK(found.st_mode):
        upper.set_mode(dirfd, name, stat.S_IMODE(found.st_mode) & (~0 if source.suid or not is_file else ~_SET_ID))
    truncated = is_file and source.content is Content.NONE and found.st_size > 0
    mtime = time.time_ns() if truncated else found.st_mtime_ns  # truncation changes the content
    sysio.utimens_at(dirfd, name, found.st_atime_ns, mtime)


def _make_special(upper: Upper, source: Source, name: bytes) -> None:
    kind = stat.S_IFMT(source.stat.st_mode)
    if kind == stat.S_IFDIR:
        sysio.mkdir_at(upper.work.fd, name, 0o700)
    elif kind == stat.S_IFLNK:
        sysio.symlink_at(sysio.readlink_at(source.pin, b""), upper.work.fd, name)
    else:
        upper.make_special(upper.work.fd, name, kind | 0o600, source.stat.st_rdev)


def _make_file(upper: Upper, source: Source, name: bytes) -> int:
    fd = sysio.open_child(upper.work.fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if source.content is Content.METACOPY:
            sysio.truncate_fd(fd, source.stat.st_size)
        elif source.data is not None and not sysio.clone_file(source.data, fd):
            sysio.copy_data(source.data, fd, source.stat.st_size)
    except BaseException:
        sysio.close(fd)
        raise
    return fd


def copy_data(source: int, target: int) -> None:
    """Copy all data of a file into an empty one or a hole: by sharing blocks where possible, else keeping holes."""
    if not sysio.clone_file(source, target):
        sysio.copy_data(source, target, sysio.stat_at(source, b"").st_size)


def copy_xattrs(upper: Upper, source: Source, dirfd: int, name: bytes) -> None:
    """Copy all extended attributes except private ones and marks; escaped ones stay escaped."""
    attributes = sysio.listxattr_at(source.pin, b"") if source.attributes is None else source.attributes
    for attribute in attributes:
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


def fill(upper: Upper, pin: int, target: int, data: int) -> None:
    """Copy the data into a metadata-only copy, sync it, then remove its metacopy mark.

    pin, target: the copy, as an O_PATH descriptor and open for writing. data: the lower file, open for reading. Until
    the mark is removed, which is last, readers take the data from the lower file, also after a crash. Size and times
    are unchanged. After an error the space that the data took is freed.
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
        if caps is not None:  # which writing has removed
            sysio.setxattr_at(pin, b"", _CAPABILITY, caps)
        sysio.utimens_at(target, b"", before.st_atime_ns, before.st_mtime_ns)
    if not upper.volatile:
        sysio.fsync(target)
    upper.drop_mark(pin, b"", xattrs.METACOPY)
