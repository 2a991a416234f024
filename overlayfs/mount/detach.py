"""Taking a mount out of the tree: umount2(2) where allowed, fusermount3 otherwise."""

import os
import subprocess
from collections.abc import Sequence
from typing import Any

from overlayfs.errors import MountError
from overlayfs.mount.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, umount

FUSERMOUNT = "fusermount3"


def detach(mountpoint: bytes, lazy: bool = False) -> None:
    """Unmount what is uppermost on `mountpoint`; `lazy` also when it is in use. MountError with the reason."""
    try:
        umount(mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except OSError as error:
        if os.geteuid() == 0:
            raise MountError(f"cannot unmount {os.fsdecode(mountpoint)}: {error.strerror}") from None
        _fusermount(mountpoint, lazy)


def _fusermount(mountpoint: bytes, lazy: bool) -> None:
    words = [b"-u", *([b"-z"] if lazy else []), b"--", mountpoint]
    try:
        run_fusermount(words)
    except ValueError as reason:
        raise MountError(f"cannot unmount {os.fsdecode(mountpoint)}: {reason}") from None


def run_fusermount(words: Sequence[bytes], **more: Any) -> None:
    """Run fusermount3, which may do what we may not. ValueError with the reason when it fails, MountError for none."""
    try:
        done = subprocess.run([FUSERMOUNT, *words], check=False, capture_output=True, **more)
    except FileNotFoundError:
        raise MountError(f"{FUSERMOUNT} is missing; install the package fuse3") from None
    if done.returncode != 0:
        told = done.stderr.decode(errors="replace").strip().removeprefix(f"{FUSERMOUNT}: ")
        raise ValueError(told or f"{FUSERMOUNT} was ended by signal {-done.returncode}")
