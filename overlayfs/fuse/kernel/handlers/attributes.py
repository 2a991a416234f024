"""GETATTR, SETATTR and STATX; and IOCTL, whose only commands read and change the flags of chattr(1)."""

import os

from overlayfs import sysio
from overlayfs.fs.copyup import Requirements
from overlayfs.fs.metadata import Attributes, Changes
from overlayfs.fs.space import CHANGING_REQUESTS
from overlayfs.fuse.kernel.protocol import LAYOUTS, Attr, Init, Op
from overlayfs.fuse.kernel.request import Handler, Reply, Request
from overlayfs.fuse.kernel.session import Session

_SETATTR = LAYOUTS["setattr_in"]
_IOCTL = LAYOUTS["ioctl_in"]
_IOCTL_OUT = LAYOUTS["ioctl_out"]

# Plain integers: testing an enum flag takes half a microsecond each time.
_MODE, _UID, _GID, _FH = int(Attr.MODE), int(Attr.UID), int(Attr.GID), int(Attr.FH)
_SIZE_SET, _KILL = int(Attr.SIZE), int(Attr.KILL_SUIDGID)
_ATIME, _ATIME_NOW = int(Attr.ATIME), int(Attr.ATIME_NOW)
_MTIME, _MTIME_NOW = int(Attr.MTIME), int(Attr.MTIME_NOW)

_NOTHING = Changes()
_LARGEST_IOCTL = 1 << 14  # bytes; the size field of a command number has 14 bits (asm-generic/ioctl.h)
_BILLION = 1_000_000_000
_BASIC_STATS = 0x7FF  # STATX_BASIC_STATS of statx(2)
_BTIME = 0x800


class AttributeHandlers:
    """Handles requests about the attributes of nodes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self._kills = bool(session.features & Init.HANDLE_KILLPRIV_V2)
        self.handlers: dict[int, Handler] = {
            Op.GETATTR: self.getattr,
            Op.SETATTR: self.setattr,
            Op.STATX: self.statx,
            Op.IOCTL: self.ioctl,
        }

    def getattr(self, request: Request) -> Reply:
        """Answer with the attributes of the real object."""
        node = self._session.node(request.nodeid)
        return self._session.attributes(request, node, self._overlay.attributes(node))

    def statx(self, request: Request) -> Reply:
        """Answer with attributes and the time of birth, for which the kernel asks only here."""
        node = self._session.node(request.nodeid)
        born = self._overlay.space.birth(node)
        return self._session.ok(request, self._statx(self._overlay.attributes(node), born))

    def _statx(self, found: Attributes, born: int | None) -> bytes:
        seconds, nanoseconds = divmod(int(self._session.policy.attributes * _BILLION), _BILLION)
        times = {"atime": found.atime_ns, "btime": born or 0, "ctime": found.ctime_ns, "mtime": found.mtime_ns}
        return LAYOUTS["statx_out"].encode(
            attr_valid=seconds,
            attr_valid_nsec=nanoseconds,
            mask=_BASIC_STATS | (0 if born is None else _BTIME),
            blksize=found.blksize,
            nlink=found.nlink,
            uid=found.uid,
            gid=found.gid,
            mode=found.mode,
            ino=found.ino,
            size=found.size,
            blocks=found.blocks,
            rdev_major=os.major(found.rdev),
            rdev_minor=os.minor(found.rdev),
            **{f"{name}_sec": time // _BILLION for name, time in times.items()},
            **{f"{name}_nsec": time % _BILLION for name, time in times.items()},
        )

    def setattr(self, request: Request) -> Reply:
        """Change all attributes of the request in one call: the kernel sends new modes together with owner or size."""
        fields = _SETATTR.unpack_from(request.body)
        node, changes = self._session.node(request.nodeid), self._changes(fields)
        if changes == _NOTHING:
            return self.getattr(request)
        return self._session.change(
            request,
            lambda: self._overlay.requirements.set_attributes(node, changes),
            lambda _: self._session.attributes(request, node, self._overlay.set_attributes(node, changes)),
        )

    def _changes(self, fields: tuple[int, ...]) -> Changes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = fields
        return Changes(
            mode=mode & 0o7777 if valid & _MODE else None,
            uid=uid if valid & _UID else None,
            gid=gid if valid & _GID else None,
            size=size if valid & _SIZE_SET else None,
            atime_ns=_time(valid, _ATIME, _ATIME_NOW, atime, atime_ns),
            mtime_ns=_time(valid, _MTIME, _MTIME_NOW, mtime, mtime_ns),
            strip=self._kills and bool(valid & _SIZE_SET and valid & _KILL),
        )

    def ioctl(self, request: Request) -> Reply:
        """Read or change the flags of a file; ENOTTY for every other request."""
        _, _, command, _, in_size, out_size = _IOCTL.unpack_from(request.body)
        node = self._session.node(request.nodeid)
        if command not in CHANGING_REQUESTS:
            found = self._overlay.space.read_flags(node, command).ljust(min(out_size, _LARGEST_IOCTL), b"\0")
            return self._session.ok(request, _IOCTL_OUT.encode() + found[:out_size])
        value = bytes(request.body[_IOCTL.size : _IOCTL.size + in_size])

        def act(_: Requirements) -> Reply:
            self._overlay.space.change_flags(node, command, value)
            return self._session.ok(request, _IOCTL_OUT.encode())

        return self._session.change(request, lambda: self._overlay.requirements.set_flags(node), act)


def _time(valid: int, given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    if valid & now:
        return sysio.NOW
    if not valid & given:
        return None
    return seconds * _BILLION + nanoseconds
