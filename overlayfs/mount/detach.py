"""Taking a mount out of the tree: umount2(2) where allowed, fusermount3 otherwise."""

import ctypes
import os
import subprocess

from overlayfs.errors import MountError

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


def detach(mountpoint: bytes, lazy: bool = False) -> None:
    """Unmount what is uppermost on `mountpoint`; `lazy` also when it is in use. MountError with the reason."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if _libc.umount2(mountpoint, flags) == 0:
        return
    code = ctypes.get_errno()
    if os.geteuid() != 0:
        _fusermount(mountpoint, lazy)
    else:
        raise MountError(f"cannot unmount {os.fsdecode(mountpoint)}: {os.strerror(code)}")


def _fusermount(mountpoint: bytes, lazy: bool) -> None:
    command = [b"fusermount3", b"-u", *([b"-z"] if lazy else []), b"--", mountpoint]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        raise MountError("fusermount3 is missing; install the package fuse3") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().removeprefix("fusermount3: ")
        raise MountError(f"cannot unmount {os.fsdecode(mountpoint)}: {reason}") from None
