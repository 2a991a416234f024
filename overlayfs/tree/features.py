"""Features of the upper's file system: found out by trying them in the work directory, at every mount."""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import xattrs
from overlayfs.format.xattrs import Mode
from overlayfs.tree.workdir import WorkDir

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class Features:
    """What the upper's file system supports."""

    mode: Mode | None  # the attributes that our marks can be stored in; None: no attributes at all
    devices: bool  # whiteouts as 0:0 devices
    flags: bool  # RENAME_EXCHANGE, RENAME_NOREPLACE
    rename_whiteout: bool
    handles: bool  # file handles, from which the names of index entries are made
    acl: bool

    def missing(self) -> list[str]:
        """Return a sentence for each missing feature, with its consequence."""
        facts = (
            (self.mode is not None, "no extended attributes: opaque directories are marked by a file, "
             "directory renames copy, chmod copies data, inode numbers change over copy-up and remount"),
            (self.devices, "no device files: whiteouts are files named .wh.NAME, names are limited to 251 bytes"),
            (self.flags, "no RENAME_EXCHANGE: some changes take two steps and are not safe against a crash between"),
            (self.handles, "no file handles: hard links to lower files part after copy-up and remount"),
            (self.acl, "no POSIX ACLs"),
        )  # fmt: skip
        return [text for there, text in facts if not there]


def find_features(work: WorkDir, wanted: Mode | None) -> Features:
    """Return the features of the file system of a prepared work directory.

    `wanted` chooses the attributes; OSError EOPNOTSUPP if the file system does not have them.
    """
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
