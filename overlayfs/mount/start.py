"""Starting a mount: the process that the user waits for, and the one that stays.

The first one forks before anything else. The second one opens the stack, mounts, gives up the terminal, and
says through a pipe that the mount answers, or why there is none. Nothing heavy is loaded before the fork.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable
from typing import NoReturn

from overlayfs.errors import MountError, UserError
from overlayfs.mount import mounts, preflight
from overlayfs.mount.options import MountOptions

Notify = Callable[[str], None]


def mount(options: MountOptions, mountpoint: bytes, notify: Notify = lambda notice: None) -> None:
    """Mount. In the background, return when the mount answers; in the foreground, when it has ended.

    `notify` gets one sentence for each feature that is off and why. MountError if there is no mount, or if
    a mount in the foreground ended by an error.
    """
    _open_standard_streams()
    point = mounts.resolved(mountpoint)
    preflight.prepare_mountpoint(point)
    preflight.check_mountpoint(point, options.stack)
    preflight.check_uppers(options.stack)
    if options.foreground or options.debug:
        _stay(options, point, notify)
    else:
        _send_off(options, point, notify)


def _stay(options: MountOptions, mountpoint: bytes, notify: Notify) -> None:
    from overlayfs.mount import daemon

    def tell(notices: tuple[str, ...]) -> None:
        for notice in notices:
            notify(notice)
        sd_notify("READY=1")

    daemon.run(options, mountpoint, tell)


def _send_off(options: MountOptions, mountpoint: bytes, notify: Notify) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _become_daemon(options, mountpoint, writing)
    os.close(writing)
    with open(reading, "rb") as report:
        _heed(_await_report(child, report.read), mountpoint, notify)


def _await_report(child: int, read: Callable[[], bytes]) -> bytes:
    """Return what the daemon says at last; an interrupted wait takes the daemon along."""
    try:
        return read()
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise


def _heed(report: bytes, mountpoint: bytes, notify: Notify) -> None:
    if not report:
        raise MountError(f"the daemon for {os.fsdecode(mountpoint)} ended before the mount was ready; see its log")
    message = json.loads(report)
    if "error" in message:
        raise MountError(message["error"])
    for notice in message["notices"]:
        notify(notice)


def _become_daemon(options: MountOptions, mountpoint: bytes, report: int) -> NoReturn:
    """Live as the daemon and leave without passing through the code of the process we were forked from."""
    code = 1
    gc.freeze()  # objects of the caller must not be collected here: they would close descriptors that are ours by then
    gc.disable()  # until the mount is ready: it would look at every module that is loaded, and free nothing
    try:
        os.setsid()
        code = _live(options, mountpoint, report)
    finally:
        logging.shutdown()
        os._exit(code)


def _live(options: MountOptions, mountpoint: bytes, pipe: int) -> int:
    report = _Report(pipe)
    inherited = _open_descriptors(pipe)

    def tell(notices: tuple[str, ...]) -> None:
        _give_up_terminal()
        _close_all(inherited)
        report.send({"notices": notices})

    try:
        from overlayfs.mount import daemon

        daemon.run(options, mountpoint, tell)
    except UserError as error:
        report.send({"error": str(error)})
        return error.exit_code
    except BaseException as error:
        logging.critical("the mount ended by a defect", exc_info=error)
        reason = traceback.format_exception_only(error)[-1].strip()
        report.send({"error": f"cannot mount on {os.fsdecode(mountpoint)}: {reason}"})
        return 1
    return 0


class _Report:
    """The pipe to the process that waits. It carries one message; a second one, or one to nobody, is dropped."""

    def __init__(self, pipe: int) -> None:
        self._pipe: int | None = pipe

    def send(self, message: dict[str, object]) -> None:
        """Send the message and close the pipe; the number must not be used again, others get it."""
        if self._pipe is None:
            return
        pipe, self._pipe = self._pipe, None
        with contextlib.suppress(OSError), open(pipe, "wb") as stream:
            stream.write(json.dumps(message).encode())


def _open_standard_streams() -> None:
    """Open /dev/null as those of the descriptors 0, 1 and 2 that are closed: no file of ours shall land there."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _open_descriptors(pipe: int) -> dict[int, tuple[int, int]]:
    """Return what is open apart from the standard streams and `pipe`: device and inode by descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            found[int(name)] = status.st_dev, status.st_ino
    return {descriptor: identity for descriptor, identity in found.items() if descriptor not in (0, 1, 2, pipe)}


def _close_all(descriptors: dict[int, tuple[int, int]]) -> None:
    """Close what the caller left open for us: pipes that somebody reads to the end, files that carry his locks.

    Only when the mount answers, since a layer may have been named as /proc/self/fd/N; and only what still is
    the same file, since the number may be ours by now.
    """
    for descriptor, identity in descriptors.items():
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) == identity:
                os.close(descriptor)


def _give_up_terminal() -> None:
    """Point the standard streams to /dev/null, standard error too: callers read it until we close it."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)


def sd_notify(state: str) -> None:
    """Send a state such as READY=1 to the socket that the manager named; nothing if there is no manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sender.sendall(state.encode())
