"""Mounting and unmounting a FUSE file system without libfuse: mount(2) and umount2(2) as root, else fusermount3."""

import array
import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlayfs.errors import MountError
from overlayfs.mount import syscalls
from overlayfs.mount.mounts import mounted_on
from overlayfs.mount.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, umount

if TYPE_CHECKING:
    from overlayfs.fuse.engine import MountSettings  # imports the engine: nothing heavy is loaded before the fork

FUSERMOUNT = "fusermount3"
_DEVICE = "/dev/fuse"
_COMMFD = "_FUSE_COMMFD"  # names the socket to which fusermount3 sends the descriptor

# mount(2)
_RDONLY = 1
_NOSUID = 2
_NODEV = 4
_NOEXEC = 8
_SYNCHRONOUS = 16
_DIRSYNC = 128
_NOATIME = 1024
_NODIRATIME = 2048


class FuseMount:
    """A mount that this process serves, with its non-blocking descriptor of /dev/fuse."""

    def __init__(self, fd: int, mountpoint: bytes, device: bytes | None) -> None:
        self.fd = fd
        self._mountpoint = mountpoint
        self._device = device

    def read_ahead(self, size: int) -> None:
        """Let the kernel read up to `size` bytes ahead; its default is an eighth of what one request can carry.

        Needs root, and takes effect only after the handshake. Without it, reading takes more requests.
        """
        if self._device is not None:
            with contextlib.suppress(OSError):
                Path(f"/sys/class/bdi/{self._device.decode()}/read_ahead_kb").write_text(str(size >> 10))

    def detach(self) -> None:
        """Unmount if our mount is still there, and close the connection."""
        try:
            self._unmount()
        except OSError:  # no descriptor is left to read mountinfo; closing the connection frees one
            self.close()
            self._unmount()
        else:
            self.close()

    def _unmount(self) -> None:
        found = mounted_on(self._mountpoint)
        if found is not None and found.device == self._device:
            with contextlib.suppress(MountError):  # closing the connection ends the mount as well
                detach(self._mountpoint, lazy=True)

    def close(self) -> None:
        """Close the connection; if the mount still exists, it is dead from now on."""
        # The number stays in use: a thread that still waits for a disk must not write its reply to another file.
        try:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # no descriptor is left, so no other file can get the number either
            os.close(self.fd)
            return
        os.dup2(null, self.fd, inheritable=False)
        os.close(null)


def attach(mountpoint: bytes, settings: "MountSettings") -> FuseMount:
    """Mount on a directory. MountError with the reason."""
    fd = _mount(mountpoint, settings) if os.geteuid() == 0 else _mount_with_fusermount(mountpoint, settings)
    try:
        found = mounted_on(mountpoint)
    except OSError as error:  # no descriptor is left, so no request could be served
        os.close(fd)
        detach(mountpoint, lazy=True)
        raise MountError(f"cannot mount on {os.fsdecode(mountpoint)}: {error.strerror}") from None
    os.set_blocking(fd, False)
    return FuseMount(fd, mountpoint, None if found is None else found.device)


def _mount(mountpoint: bytes, settings: "MountSettings") -> int:
    fd = _open_device()
    data = b",".join(
        (
            b"fd=%d,rootmode=%o,user_id=%d,group_id=%d" % (fd, stat.S_IFDIR, os.geteuid(), os.getegid()),
            b"default_permissions",
            *([b"allow_other"] if settings.allow_other or settings.allow_root else []),
            *settings.context,
        )
    )
    kind = b"fuse." + settings.subtype
    try:
        syscalls.mount(settings.source, mountpoint, kind, _flags(settings), data)
    except OSError as error:
        os.close(fd)
        raise MountError(f"cannot mount on {os.fsdecode(mountpoint)}: {error.strerror}") from None
    return fd


def _open_device() -> int:
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"cannot open {_DEVICE}: {error.strerror}; is the module fuse loaded?") from None


def _flags(settings: "MountSettings") -> int:
    chosen = (
        (settings.read_only, _RDONLY),
        (not settings.suid, _NOSUID),
        (not settings.dev, _NODEV),
        (not settings.exec, _NOEXEC),
        (settings.sync, _SYNCHRONOUS),
        (settings.dirsync, _DIRSYNC),
        (not settings.atime, _NOATIME),
        (not settings.diratime, _NODIRATIME),
    )
    return sum(flag for wanted, flag in chosen if wanted)


def _mount_with_fusermount(mountpoint: bytes, settings: "MountSettings") -> int:
    """Mount with fusermount3, which is set-uid root; it sends the descriptor over a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = (b"-o", b",".join(_words(settings)), b"--", mountpoint)
        environment = {**os.environ, _COMMFD: str(theirs.fileno())}
        try:
            run_fusermount(words, env=environment, pass_fds=[theirs.fileno()])
        except ValueError as reason:
            raise MountError(f"cannot mount on {os.fsdecode(mountpoint)}: {reason}") from None
        return _received(ours)


def _words(settings: "MountSettings") -> list[bytes]:
    chosen = (
        (settings.read_only, b"ro"),
        (not settings.exec, b"noexec"),
        (settings.sync, b"sync"),
        (settings.dirsync, b"dirsync"),
        (not settings.atime, b"noatime"),
        (settings.allow_other or settings.allow_root, b"allow_other"),
        (True, b"nosuid"),
        (True, b"nodev"),
        (True, b"default_permissions"),
    )
    named = (b"fsname=" + _escaped(settings.source), b"subtype=" + _escaped(settings.subtype))
    return [word for wanted, word in chosen if wanted] + [*named, *map(_escaped, settings.context)]


def _escaped(text: bytes) -> bytes:
    return text.replace(b"\\", b"\\\\").replace(b",", b"\\,")


def _received(ours: socket.socket) -> int:
    descriptors = array.array("i")
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(descriptors.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: descriptors.itemsize])
            os.set_inheritable(descriptors[0], False)
            return descriptors[0]
    raise MountError(f"{FUSERMOUNT} sent no descriptor")


def detach(mountpoint: bytes, lazy: bool = False) -> None:
    """Unmount what is uppermost on `mountpoint`, with `lazy` even if it is in use. MountError with the reason."""
    try:
        umount(mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except OSError as error:
        if os.geteuid() == 0:
            raise MountError(f"cannot unmount {os.fsdecode(mountpoint)}: {error.strerror}") from None
        _unmount_with_fusermount(mountpoint, lazy)


def _unmount_with_fusermount(mountpoint: bytes, lazy: bool) -> None:
    words = [b"-u", *([b"-z"] if lazy else []), b"--", mountpoint]
    try:
        run_fusermount(words)
    except ValueError as reason:
        raise MountError(f"cannot unmount {os.fsdecode(mountpoint)}: {reason}") from None


def run_fusermount(words: Sequence[bytes], **more: Any) -> None:
    """Run fusermount3. ValueError with the reason if it fails, MountError if it is not installed."""
    try:
        done = subprocess.run([FUSERMOUNT, *words], check=False, capture_output=True, **more)
    except FileNotFoundError:
        raise MountError(f"{FUSERMOUNT} is missing; install the package fuse3") from None
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().removeprefix(f"{FUSERMOUNT}: ")
        raise ValueError(reason or f"{FUSERMOUNT} was ended by signal {-done.returncode}")
