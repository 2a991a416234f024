"""Checks before a mount: the mount point is free and outside the layers, and no other mount writes to the upper.

The lock of an upper (`overlayfs.tree.workdir.lock`) covers that one directory. It does not show that the upper of one
mount is inside the upper of another, and the kernel's overlayfs takes no lock that other programs see. Each daemon
therefore records where its directories are within their file systems. Bind mounts, symbolic links and mount namespaces
do not change that, and to compare it never waits for a disk that hangs.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import MountError
from overlayfs.fs.config import StackConfig
from overlayfs.mount import runtime_state
from overlayfs.mount.fusermount import detach
from overlayfs.mount.mounts import TYPE, KernelMount, kernel_mounts, list_mounts, mounted_on, unescape
from overlayfs.mount.runtime_state import WrittenDirectory
from overlayfs.mount.unmount import abort_dying

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
ANSWER_LIMIT = 5.0  # seconds that a mount may take to answer
STACKED_LIMIT = 64  # dead mounts on one mount point that are unmounted before giving up
_KERNEL_TYPE = b"overlay"
_KERNEL_OPTIONS = {b"upperdir": "upper", b"workdir": "work directory"}

# --- the mount point is free ------------------------------------------------------------


def prepare_mountpoint(mountpoint: bytes) -> None:
    """Make sure that `mountpoint`, as the kernel names it, is a directory that is free: dead mounts are unmounted.

    MountError otherwise.
    """
    for _ in range(STACKED_LIMIT):
        _abort_dying(mountpoint)
        code = _probe_in_time(mountpoint)
        if code not in DEAD:
            break
        _detach_dead(mountpoint)
    if code:
        raise MountError(f"cannot mount on {os.fsdecode(mountpoint)}: {os.strerror(code)}")
    _refuse_mounted(mountpoint, "unmount it first")


def is_dead(mountpoint: bytes) -> bool:
    """Return whether a mount of ours without a daemon is uppermost on a path."""
    mount = mounted_on(mountpoint)
    return mount is not None and mount.type == TYPE and _probe(mountpoint) in DEAD


def _abort_dying(mountpoint: bytes) -> None:
    """Abort the mounts here whose daemon was killed and cannot end, which makes them dead."""
    for mount in list_mounts():
        if mount.mountpoint == mountpoint:
            abort_dying(mount)


def _probe_in_time(mountpoint: bytes) -> int:
    """Probe in a thread of its own, since a mount whose daemon hangs never answers. MountError if it does not."""
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(_probe(mountpoint)), daemon=True)
    worker.start()
    worker.join(ANSWER_LIMIT)
    if not found:
        _refuse_mounted(mountpoint, f"it has not answered for {ANSWER_LIMIT:g} s; unmount it first")
        raise MountError(
            f"{os.fsdecode(mountpoint)} has not answered for {ANSWER_LIMIT:g} s; unmount what is there first"
        )
    return found[0]


def _probe(mountpoint: bytes) -> int:
    """Return the errno that prevents mounting here, 0 for none.

    The kernel may answer stat(2) from cached attributes although the daemon is dead; statfs(2) is always a request.
    """
    try:
        found = os.stat(mountpoint)
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if stat.S_ISDIR(found.st_mode) else errno.ENOTDIR


def _detach_dead(mountpoint: bytes) -> None:
    mount = mounted_on(mountpoint)
    if mount is None or mount.type != TYPE:
        kind = os.fsdecode(mount.type) if mount else "unknown"
        raise MountError(f"{os.fsdecode(mountpoint)} holds a dead mount of type {kind}; unmount it first")
    detach(mountpoint, lazy=True)


def _refuse_mounted(mountpoint: bytes, advice: str) -> None:
    mount = mounted_on(mountpoint)
    if mount is None or mount.type != TYPE:
        return
    pids = [known.pid for known in list_mounts() if known.device == mount.device and known.pid]
    holder = f" (pid {pids[0]})" if pids else ""
    raise MountError(f"{os.fsdecode(mountpoint)} is already a mount of overlayfs{holder}; {advice}")


# --- the mount point is outside the layers ------------------------------------------------------------


def check_mountpoint(mountpoint: bytes, stack: StackConfig) -> None:
    """Refuse a mount point strictly inside the upper, the work directory, or a layer that shows mounts. MountError.

    A daemon that reads such a directory would find its own mount there and wait for itself. A layer does not show
    mounts if it can be opened through a private clone of its mount. Directories are compared by (st_dev, st_ino), so
    other paths and bind mounts of the same tree are found. A mount point that *is* a layer is fine: the layer is
    opened before the mount covers it.
    """
    layers = _identities(stack)
    for above in _ancestors(mountpoint):
        path = layers.get(above)
        if path is not None:
            raise MountError(
                f"{os.fsdecode(mountpoint)} is inside {os.fsdecode(path)}, which is part of the stack; "
                "choose a mount point outside"
            )


def _identities(stack: StackConfig) -> dict[tuple[int, int], bytes]:
    found = {}
    shown = [path for path in stack.lower if not _hides_mounts(path)]
    for path in (*shown, stack.upper, stack.work):
        if path is not None and (identity := _identity(path)):
            found[identity] = path
    return found


def _hides_mounts(path: bytes) -> bool:
    """Return whether a layer can be opened without the mounts in it."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        clone = sysio.clone_mount(fd)
    finally:
        os.close(fd)
    if clone is not None:
        os.close(clone)
    return clone is not None


def _ancestors(path: bytes) -> list[tuple[int, int]]:
    found = []
    while path != b"/":
        path = os.path.dirname(path)
        if identity := _identity(path):
            found.append(identity)
    return found


def _identity(path: bytes) -> tuple[int, int] | None:
    """Return (st_dev, st_ino) of a directory, None if it is not accessible: opening the stack reports why."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# --- no other mount writes to the upper or work directory ------------------------------------------------------------


class _Used(NamedTuple):
    """A directory that a mount writes to; `locked`: our lock on it shows whether it is still in use."""

    written: WrittenDirectory
    holder: str
    locked: bool


def check_uppers(stack: StackConfig) -> None:
    """Refuse an upper or work directory that is inside one in use, contains one, or is the kernel's. MountError."""
    mounts = kernel_mounts()
    own = _written(stack, mounts)
    if not own:
        return
    for used in (*_of_daemons(), *_of_the_kernel(mounts)):
        for each in own:
            how = _relation(each, used)
            if how:
                where = f"{used.written.path}, the {used.written.what} of {used.holder}"
                raise MountError(f"{each.what} {each.path} {how} {where}; unmount that first")


def written_directories(stack: StackConfig) -> tuple[WrittenDirectory, ...]:
    """Return the directories that a mount of this stack writes to, for its record."""
    return _written(stack, kernel_mounts())


def _written(stack: StackConfig, mounts: Sequence[KernelMount]) -> tuple[WrittenDirectory, ...]:
    named = (("upper", stack.upper), ("work directory", stack.work))
    return tuple(_located(what, path, mounts) for what, path in named if path is not None)


def _relation(own: WrittenDirectory, used: _Used) -> str:
    theirs = used.written
    if own.device != theirs.device:
        return ""
    if _is_below(own.place, theirs.place):
        return "is inside"
    if _is_below(theirs.place, own.place):
        return "contains"
    return "is" if own.place == theirs.place and not used.locked else ""


def _is_below(path: str, above: str) -> bool:
    return path != above and path.startswith(above.rstrip("/") + "/")


def _located(what: str, path: bytes, mounts: Sequence[KernelMount]) -> WrittenDirectory:
    """Return where a directory is within its file system: paths differ between bind mounts, this does not."""
    real = os.path.realpath(path)
    around = [each for each in mounts if os.path.commonpath((real, each.mountpoint)) == each.mountpoint]
    if not around:  # after chroot(2) into a directory that is no mount point, mountinfo has no entry for the root
        device, _ = _identity(real) or (0, 0)
        return WrittenDirectory(what, os.fsdecode(path), f"{os.major(device)}:{os.minor(device)}", os.fsdecode(real))
    mount = max(reversed(around), key=lambda each: len(each.mountpoint))  # of several on one mount point, the newest
    place = os.path.normpath(os.path.join(mount.root, os.path.relpath(real, mount.mountpoint)))
    return WrittenDirectory(what, os.fsdecode(path), mount.device.decode(), os.fsdecode(place))


def _of_daemons() -> Iterator[_Used]:
    for record in runtime_state.read_all():
        holder = f"the mount at {record.mountpoint} (pid {record.pid})"
        yield from (_Used(each, holder, locked=True) for each in record.written)


def _of_the_kernel(mounts: Sequence[KernelMount]) -> Iterator[_Used]:
    for mount in mounts:
        if mount.type != _KERNEL_TYPE:
            continue
        for option in mount.options:
            name, _, value = option.partition(b"=")
            if name in _KERNEL_OPTIONS and value.startswith(b"/"):
                place = _located(_KERNEL_OPTIONS[name], unescape(value), mounts)
                yield _Used(place, f"the kernel's overlayfs at {os.fsdecode(mount.mountpoint)}", locked=False)
