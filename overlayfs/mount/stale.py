"""Mount points that are not free: a dead daemon's mount is taken away, a living one's refused."""

import errno
import os
import stat
import threading

from overlayfs.errors import MountError
from overlayfs.mount import table
from overlayfs.mount.detach import detach
from overlayfs.mount.mountinfo import TYPE, mounted_on
from overlayfs.mount.unmount import cut_off_dying

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
PATIENCE = 5.0  # seconds that a mount may take to answer
STACKED = 64  # dead mounts on one point that are taken away before giving up


def prepare(mountpoint: bytes) -> None:
    """Return when `mountpoint` (as the kernel names it) is a directory to mount on. MountError otherwise."""
    for _ in range(STACKED):
        _cut_off_dying(mountpoint)
        code = _problem_in_time(mountpoint)
        if code not in DEAD:
            break
        _take_away(mountpoint)
    if code:
        raise MountError(f"cannot mount on {os.fsdecode(mountpoint)}: {os.strerror(code)}")
    _refuse_living(mountpoint, "unmount it first")


def is_dead(mountpoint: bytes) -> bool:
    """Return whether a mount of ours without a daemon is uppermost here."""
    mount = mounted_on(mountpoint)
    return mount is not None and mount.type == TYPE and _problem(mountpoint) in DEAD


def _cut_off_dying(mountpoint: bytes) -> None:
    """See to it that a mount whose daemon was killed and cannot end is a dead one."""
    for mount in table.mounts():
        if mount.mountpoint == mountpoint:
            cut_off_dying(mount)


def _problem_in_time(mountpoint: bytes) -> int:
    """Return the same as `_problem`, asked for in a thread of its own: a mount whose daemon hangs never answers."""
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(_problem(mountpoint)), daemon=True)
    worker.start()
    worker.join(PATIENCE)
    if not found:
        _refuse_living(mountpoint, f"it has not answered for {PATIENCE:g} s; unmount it first")
        raise MountError(f"{os.fsdecode(mountpoint)} has not answered for {PATIENCE:g} s; unmount what is there first")
    return found[0]


def _problem(mountpoint: bytes) -> int:
    """Return the errno that stands against mounting here, 0 for none.

    The kernel may answer stat(2) for a daemon that is dead, from attributes it remembers; statfs(2) it never does.
    """
    try:
        found = os.stat(mountpoint)
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if stat.S_ISDIR(found.st_mode) else errno.ENOTDIR


def _take_away(mountpoint: bytes) -> None:
    mount = mounted_on(mountpoint)
    if mount is None or mount.type != TYPE:
        kind = os.fsdecode(mount.type) if mount else "unknown"
        raise MountError(f"{os.fsdecode(mountpoint)} holds a dead mount of type {kind}; unmount it first")
    detach(mountpoint, lazy=True)


def _refuse_living(mountpoint: bytes, advice: str) -> None:
    mount = mounted_on(mountpoint)
    if mount is None or mount.type != TYPE:
        return
    pids = [known.pid for known in table.mounts() if known.device == mount.device and known.pid]
    holder = f" (pid {pids[0]})" if pids else ""
    raise MountError(f"{os.fsdecode(mountpoint)} is already a mount of overlayfs{holder}; {advice}")
