"""What is mounted: /proc/self/mountinfo, decoded, and joined with the records of the daemons."""

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from overlayfs.errors import InUseError, MountError, UserError
from overlayfs.mount import runtime_state
from overlayfs.mount.runtime_state import Record

if TYPE_CHECKING:
    from overlayfs.store.workspaces import WorkspaceInUseError

TYPE = b"fuse.overlayfs"


class KernelMount(NamedTuple):
    """One line of proc_pid_mountinfo(5). device: major:minor. options: those of the mount and of its superblock."""

    device: bytes
    root: bytes
    mountpoint: bytes
    options: frozenset[bytes]
    type: bytes
    source: bytes


def unescape(field: bytes) -> bytes:
    r"""Return a field with the kernel's octal escapes (\040 for a space) decoded."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def parse(line: bytes) -> KernelMount:
    """Return one line decoded. The number of optional fields before the dash varies."""
    before, _, after = line.partition(b" - ")
    _, _, device, root, mountpoint, options, *_ = before.split(b" ")
    kind, source, super_options = after.split(b" ")[:3]
    chosen = frozenset(options.split(b",")) | frozenset(super_options.split(b","))
    return KernelMount(device, unescape(root), unescape(mountpoint), chosen, kind, unescape(source))


def kernel_mounts() -> list[KernelMount]:
    """Return all mounts of this process's namespace, oldest first."""
    with open("/proc/self/mountinfo", "rb") as stream:
        return [parse(line) for line in stream.read().splitlines() if line]


def mounted_on(mountpoint: bytes) -> KernelMount | None:
    """Return the uppermost mount on a path, None if nothing is mounted there."""
    found = [mount for mount in kernel_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


@dataclass(frozen=True)
class Mount:
    """One of our mounts. Without a record (another user's, or its daemon is gone) the optional fields are empty."""

    mountpoint: bytes
    source: bytes
    device: bytes
    read_only: bool
    lower: tuple[bytes, ...] = ()
    upper: bytes | None = None
    work: bytes | None = None
    pid: int | None = None
    engine: str | None = None
    notices: tuple[str, ...] = ()
    image: str | None = None
    workspace: str | None = None
    store: bytes | None = None


def list_mounts() -> list[Mount]:
    """Return our mounts in this mount namespace, oldest first, without bind mounts of them."""
    known = runtime_state.read_all()
    found = [mount for mount in kernel_mounts() if mount.type == TYPE and mount.root == b"/"]
    return [_joined(mount, _record_of(mount, known)) for mount in found]


def _record_of(mount: KernelMount, known: list[Record]) -> Record | None:
    """Return the record of the daemon of a mount.

    While a daemon ends after its mount is gone, the kernel may give the device to the next mount already.
    """
    same = (record for record in known if record.device == mount.device.decode())
    own = mount.mountpoint
    return max(same, key=lambda record: (os.fsencode(record.mountpoint) == own, record.started), default=None)


def find(mountpoint: bytes) -> Mount:
    """Return the uppermost mount on a path. UserError if it is not one of ours."""
    path = resolved(mountpoint)
    found = [mount for mount in list_mounts() if mount.mountpoint == path]
    if not found:
        raise UserError(f"{os.fsdecode(mountpoint)} is not a mount of overlayfs; see `overlayfs mounts`")
    return found[-1]


def name_holder(error: InUseError) -> MountError:
    """Return the error for a locked directory, with the mount point of the daemon that holds it if that is known."""
    for mount in list_mounts():
        if mount.pid is not None and mount.pid == error.pid:
            where = os.fsdecode(mount.mountpoint)
            return MountError(
                f"{error.what} {os.fsdecode(error.path)} is in use by the mount at {where} (pid {error.pid}); "
                "unmount it first"
            )
    return error


def name_workspace_holder(error: "WorkspaceInUseError") -> UserError:
    """Return the error for a locked workspace, with the mount point of its mount if that is known."""
    for mount in list_mounts():
        if mount.upper is not None and os.path.dirname(mount.upper) == error.path:
            where = os.fsdecode(mount.mountpoint)
            return UserError(
                f"workspace {error.name} is in use by the mount at {where} (pid {mount.pid}); unmount it first"
            )
    return error


def resolved(mountpoint: bytes) -> bytes:
    """Return a mount point as the kernel names it, without a request to its daemon, which may be dead or hang.

    Only the parent is resolved: stat and lstat of the last component are requests to the mount itself. For readlink of
    a mount point the kernel itself answers that it is not a symbolic link.
    """
    path = os.path.abspath(mountpoint)
    head, tail = os.path.split(path)
    if not tail:
        return path
    try:
        os.readlink(path)
    except OSError:
        return os.path.join(os.path.realpath(head), tail)
    return os.path.realpath(path)


def _joined(mount: KernelMount, record: Record | None) -> Mount:
    basic = Mount(mount.mountpoint, mount.source, mount.device, b"ro" in mount.options)
    if record is None:
        return basic
    return Mount(
        basic.mountpoint,
        basic.source,
        basic.device,
        basic.read_only,
        lower=tuple(map(os.fsencode, record.lower)),
        upper=None if record.upper is None else os.fsencode(record.upper),
        work=None if record.work is None else os.fsencode(record.work),
        pid=record.pid,
        engine=record.engine,
        notices=record.notices,
        image=record.image,
        workspace=record.workspace,
        store=None if record.store is None else os.fsencode(record.store),
    )
