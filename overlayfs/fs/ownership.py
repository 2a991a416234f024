"""Owners as the mount shows them and as the layers hold them: id maps, then squashing (fuse-overlayfs(1))."""

from collections.abc import Sequence

from overlayfs.fs.config import IdRange, StackConfig

OVERFLOW_ID = 65534  # what the kernel shows for an id that a map does not hold (user_namespaces(7))
_KEEP = -1


class Ownership:
    """Translates owners in both directions; ids outside a map are shown as 65534 and written as they are."""

    def __init__(self, config: StackConfig) -> None:
        self._uids, self._gids = config.uid_map, config.gid_map
        self._squash_uid, self._squash_gid = config.squash_uid, config.squash_gid
        self.plain = not (self._uids or self._gids) and config.squash_uid is None and config.squash_gid is None

    def shown(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the owner that the mount shows for one on disk."""
        shown_uid = self._squash_uid if self._squash_uid is not None else _to_inside(self._uids, uid)
        shown_gid = self._squash_gid if self._squash_gid is not None else _to_inside(self._gids, gid)
        return shown_uid, shown_gid

    def stored(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the owner to write for one that a caller gave; -1 stays -1."""
        return _to_outside(self._uids, uid), _to_outside(self._gids, gid)


def _to_inside(ranges: Sequence[IdRange], outside: int) -> int:
    if not ranges:
        return outside
    for row in ranges:
        if row.outside <= outside < row.outside + row.length:
            return outside - row.outside + row.inside
    return OVERFLOW_ID


def _to_outside(ranges: Sequence[IdRange], inside: int) -> int:
    for row in ranges:
        if inside != _KEEP and row.inside <= inside < row.inside + row.length:
            return inside - row.inside + row.outside
    return inside
