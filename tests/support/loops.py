"""Loop devices and mounts of disk images made by system calls, because a campaign makes thousands of them."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import syscalls
from tests.support.polling import until

# linux/loop.h: struct loop_config is fd, block size, struct loop_info64, eight reserved words.
_CONTROL = "/dev/loop-control"
_GET_FREE, _CONFIGURE, _CLEAR = 0x4C82, 0x4C0A, 0x4C01
_CONFIG = struct.Struct("=II5Q4I64s64s32s2Q64x")
_AUTOCLEAR, _DIRECT_IO = 4, 16

_BTRFS_CONTROL = "/dev/btrfs-control"
_FORGET_DEVICE = 0x5000_9405  # BTRFS_IOC_FORGET_DEV with struct btrfs_ioctl_vol_args: fd, path
_VOLUME = struct.Struct("=q4088s")


@contextmanager
def attached(image: Path, direct: bool = False) -> Iterator[str]:
    """A loop device over `image` until the end of the block, and of every mount of it that was made within.

    direct: requests go to the image as they are, past the page cache.
    """
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        path, device = _configured(backing, str(image), _AUTOCLEAR | (_DIRECT_IO if direct else 0))
    finally:
        os.close(backing)
    try:
        yield path
    finally:
        os.close(device)


def _configured(backing: int, shown: str, flags: int) -> tuple[str, int]:
    config = _CONFIG.pack(backing, 0, 0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(shown)[-63:], b"", b"", 0, 0)
    while True:
        path = _free()
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _CONFIGURE, config)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # another process was faster
                raise
        else:
            return path, device


def _free() -> str:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
    finally:
        os.close(control)


@contextmanager
def mounted(kind: str, image: Path, point: Path, options: str = "", direct: bool = False) -> Iterator[str]:
    """Mount the file system of an image at `point` until the end of the block; yields its loop device."""
    with attached(image, direct) as device:
        _mount(kind, device, point, options)
    try:
        yield device
    finally:
        unmount(kind, point, device)


def _mount(kind: str, device: str, point: Path, options: str) -> None:
    """Mount, and wait if an older copy of the same file system is still in use.

    A process that makes a mount namespace, as other tests do in parallel, copies every mount and keeps it for a while.
    """
    words = ",".join(filter(None, (options, "nouuid" if kind == "xfs" else "")))

    def is_mounted() -> bool:
        try:
            syscalls.mount(device.encode(), os.fsencode(point), kind.encode(), 0, words.encode())
        except FileExistsError:  # btrfs has the copy under another device
            return False
        return True

    until(is_mounted)


def unmount(kind: str, point: Path, device: str) -> None:
    """Unmount, and make btrfs forget the device: it would refuse an older copy of the same file system."""
    syscalls.umount(os.fsencode(point))
    if kind == "btrfs":
        control = os.open(_BTRFS_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            with suppress(OSError):
                fcntl.ioctl(control, _FORGET_DEVICE, bytearray(_VOLUME.pack(0, device.encode())))
        finally:
            os.close(control)
