"""Other mounts that use an upper or work directory in a way that no lock tells.

The lock of an upper (`overlayfs.tree.workdir.lock`) is for that one directory. Nothing of it is seen where one mount's
upper lies inside another's, and the kernel's overlayfs takes no lock that others see. So each daemon writes down where
its directories lie in their file systems: bind mounts, links and other namespaces make no difference to that, and
nobody has to look at them, who might wait for a disk that hangs.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from overlayfs.errors import MountError
from overlayfs.fs.config import StackConfig
from overlayfs.mount import records
from overlayfs.mount.mountinfo import KernelMount, kernel_mounts, unescape
from overlayfs.mount.records import Written

_KERNELS = b"overlay"
_DIRECTORIES = {b"upperdir": "upper", b"workdir": "work directory"}


class _Used(NamedTuple):
    """What a mount writes to, and which mount; `locked`: it carries our lock, which says whether it is in use still."""

    written: Written
    holder: str
    locked: bool


def check(stack: StackConfig) -> None:
    """Refuse an upper or work directory that lies inside one in use, or holds one, or is the kernel's. MountError."""
    mounts = kernel_mounts()
    own = _written(stack, mounts)
    if not own:
        return
    for used in (*_ours(), *_of_the_kernel(mounts)):
        for each in own:
            how = _relation(each, used)
            if how:
                where = f"{used.written.path}, the {used.written.what} of {used.holder}"
                raise MountError(f"{each.what} {each.path} {how} {where}; unmount that first")


def written(stack: StackConfig) -> tuple[Written, ...]:
    """Return what a mount of this stack writes to, for its record."""
    return _written(stack, kernel_mounts())


def _written(stack: StackConfig, mounts: Sequence[KernelMount]) -> tuple[Written, ...]:
    named = (("upper", stack.upper), ("work directory", stack.work))
    return tuple(_place(what, path, mounts) for what, path in named if path is not None)


def _relation(own: Written, used: _Used) -> str:
    theirs = used.written
    if own.device != theirs.device:
        return ""
    if _is_below(own.place, theirs.place):
        return "lies inside"
    if _is_below(theirs.place, own.place):
        return "holds"
    return "is" if own.place == theirs.place and not used.locked else ""


def _is_below(path: str, above: str) -> bool:
    return path != above and path.startswith(above.rstrip("/") + "/")


def _place(what: str, path: bytes, mounts: Sequence[KernelMount]) -> Written:
    """Return a directory with its file system, as major:minor, and the path that it has there."""
    real = os.path.realpath(path)
    around = [each for each in mounts if os.path.commonpath((real, each.mountpoint)) == each.mountpoint]
    mount = max(reversed(around), key=lambda each: len(each.mountpoint))  # the newest of those on one point
    place = os.path.normpath(os.path.join(mount.root, os.path.relpath(real, mount.mountpoint)))
    return Written(what, os.fsdecode(path), mount.device.decode(), os.fsdecode(place))


def _ours() -> Iterator[_Used]:
    for record in records.read_all():
        holder = f"the mount at {record.mountpoint} (pid {record.pid})"
        yield from (_Used(each, holder, locked=True) for each in record.written)


def _of_the_kernel(mounts: Sequence[KernelMount]) -> Iterator[_Used]:
    for mount in mounts:
        if mount.type != _KERNELS:
            continue
        for option in mount.options:
            name, _, value = option.partition(b"=")
            if name in _DIRECTORIES and value.startswith(b"/"):
                place = _place(_DIRECTORIES[name], unescape(value), mounts)
                yield _Used(place, f"the kernel's overlayfs at {os.fsdecode(mount.mountpoint)}", locked=False)
