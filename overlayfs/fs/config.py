"""What a stack is made of and how it shall behave: plain, frozen values."""

from dataclasses import dataclass
from typing import NamedTuple

from overlayfs.format.xattrs import Mode


class IdRange(NamedTuple):
    """One row of an id map, as in user_namespaces(7): `length` ids from `inside` stand for those from `outside`."""

    inside: int
    outside: int
    length: int


@dataclass(frozen=True)
class StackConfig:
    """The layers of one overlay and the choices made for it.

    `lower` names the read-only layers, top first; `upper` and `work` are both given or both None
    (None: the overlay is read-only). Paths are bytes, relative ones count from the current directory.
    `hidden` are directories, by (st_dev, st_ino), that no layer shows; upper and work are such anyway.
    Choices that are None are made by `Overlay` from what it finds: `xattr_mode` is TRUSTED where the
    process may write `trusted.*` attributes, and redirect_dir, metacopy and index are on in that mode.
    """

    lower: tuple[bytes, ...]
    upper: bytes | None = None
    work: bytes | None = None
    xattr_mode: Mode | None = None
    volatile: bool = False
    redirect_dir: bool | None = None
    metacopy: bool | None = None
    index: bool | None = None
    noacl: bool = False
    static_nlink: bool = False
    xino: bool = True
    ino32: bool = False
    uid_map: tuple[IdRange, ...] = ()
    gid_map: tuple[IdRange, ...] = ()
    squash_uid: int | None = None
    squash_gid: int | None = None
    xattr_permissions: int = 0
    hidden: frozenset[tuple[int, int]] = frozenset()
    lock_wait: float = 5.0
