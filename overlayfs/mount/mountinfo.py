"""The kernel's list of mounts, /proc/self/mountinfo, decoded."""

import re
from typing import NamedTuple

TYPE = b"fuse.overlayfs"


class KernelMount(NamedTuple):
    """One line of proc_pid_mountinfo(5): `device` is major:minor, `options` those of the mount and the superblock."""

    device: bytes
    root: bytes
    mountpoint: bytes
    options: frozenset[bytes]
    type: bytes
    source: bytes


def unescape(field: bytes) -> bytes:
    r"""Return a field with the kernel's octal escapes (\040 for a space) undone."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def parse(line: bytes) -> KernelMount:
    """Return one line decoded; the number of optional fields before the dash varies."""
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
    """Return the mount that is uppermost on a path, None if nothing is mounted there."""
    found = [mount for mount in kernel_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None
