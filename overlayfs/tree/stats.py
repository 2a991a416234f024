"""Attributes of an object: a real stat result, or one that was changed by an override attribute."""

import os
import stat
from typing import NamedTuple

from overlayfs.format.override import Override


class Stat(NamedTuple):
    """The part of `os.stat_result` that we use; times in nanoseconds since 1970."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blocks: int
    st_blksize: int
    st_rdev: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int


AnyStat = os.stat_result | Stat


def overridden(real: os.stat_result, override: Override) -> Stat:
    """Return `real` with owner, mode, type and device of an override attribute (`format.override`)."""
    kind = override.kind if override.kind is not None else stat.S_IFMT(real.st_mode)
    return Stat(
        kind | stat.S_IMODE(override.mode),
        real.st_ino,
        real.st_dev,
        real.st_nlink,
        override.uid,
        override.gid,
        real.st_size,
        real.st_blocks,
        real.st_blksize,
        override.rdev,
        real.st_atime_ns,
        real.st_mtime_ns,
        real.st_ctime_ns,
    )


def resized(real: AnyStat, size: int) -> AnyStat:
    """Return `real` with another size."""
    if real.st_size == size:
        return real
    fields = {name: getattr(real, name) for name in Stat._fields}
    return Stat(**{**fields, "st_size": size})
