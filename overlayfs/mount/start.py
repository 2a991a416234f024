"""Starting a mount: the process that the user waits for, and the daemon that stays.

The first process forks before it imports anything heavy. The daemon opens the stack, mounts, gives up the terminal,
and reports through a pipe that the mount answers, or why there is none.
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

    `notify(notice)` is called with one sentence for each feature that is off and why. MountError if there is no mount,
    or if a mount in the foreground ended by an error.
    """
    _open_standard_streams()
    point = mounts.resolved(mountpoint)
    preflight.prepare_mountpoint(point)
    preflight.check_mountpoint(point, options.stack)
    preflight.check_uppers(options.stack)
    if options.foreground or options.debug:
        _run_in_foreground(options, point, notify)
    else:
        _run_in_background(options, point, notify)


def _run_in_foreground(options: MountOptions, mountpoint: bytes, notify: Notify) -> None:
    from overlayfs.mount import daemon

    def on_ready(notices: tuple[str, ...]) -> None:
        for notice in notices:
            notify(notice)
        sd_notify("READY=1")

    daemon.run(options, mountpoint, on_ready)


def _run_in_background(options: MountOptions, mountpoint: bytes, notify: Notify) -> None:
    """Fork the daemon and wait for its report. MountError with the reason if it does not mount."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _become_daemon(options, mountpoint, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        report = _wait_for_report(child, pipe.read)
    if not report:
        raise MountError(f"the daemon for {os.fsdecode(mountpoint)} ended before the mount was ready; see its log")
    message = json.loads(report)
    if "error" in message:
        raise MountError(message["error"])
    for notice in message["notices"]:
        notify(notice)


def _wait_for_report(child: int, read: Callable[[], bytes]) -> bytes:
    """Return the report of the daemon; if the wait is interrupted, the daemon ends too."""
    try:
        return read()
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise


def _become_daemon(options: MountOptions, mountpoint: bytes, pipe: int) -> NoReturn:
    """Run the daemon in the forked process, and exit without returning into the caller's code."""
    code = 1
    gc.freeze()  # collecting the caller's objects would close descriptors whose numbers are the daemon's by then
    gc.disable()  # until the mount is ready: a collection would examine all imported modules, and free nothing
    try:
        os.setsid()
        code = _run_daemon(options, mountpoint, pipe)
    finally:
        logging.shutdown()
        os._exit(code)


def _run_daemon(options: MountOptions, mountpoint: bytes, pipe: int) -> int:
    """Mount and serve; report through the pipe. Return the exit code."""
    report = _Report(pipe)
    inherited = _inherited_descriptors(pipe)

    def on_ready(notices: tuple[str, ...]) -> None:
        _give_up_terminal()
        _close_all(inherited)
        report.send({"notices": notices})

    try:
        from overlayfs.mount import daemon

        daemon.run(options, mountpoint, on_ready)
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
    """The pipe to the process that waits. It carries one message; later ones, and one that is not read, are dropped."""

    def __init__(self, pipe: int) -> None:
        self._pipe: int | None = pipe

    def send(self, message: dict[str, object]) -> None:
        """Send the message and close the pipe. Its number is forgotten, since other files get it from now on."""
        if self._pipe is None:
            return
        pipe, self._pipe = self._pipe, None
        with contextlib.suppress(OSError), open(pipe, "wb") as stream:
            stream.write(json.dumps(message).encode())


def _open_standard_streams() -> None:
    """Open /dev/null as each of the descriptors 0, 1 and 2 that is closed, so that no other file gets its number."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _inherited_descriptors(pipe: int) -> dict[int, tuple[int, int]]:
    """Return the open descriptors but the standard streams and `pipe`, each with (st_dev, st_ino) of its file."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            found[int(name)] = status.st_dev, status.st_ino
    return {descriptor: identity for descriptor, identity in found.items() if descriptor not in (0, 1, 2, pipe)}


def _close_all(descriptors: dict[int, tuple[int, int]]) -> None:
    """Close what was inherited: pipes that a reader waits for to end, files that carry locks of the caller.

    This waits until the mount answers, since a layer may be named as /proc/self/fd/N. A number that stands for another
    file by now is the daemon's own.
    """
    for descriptor, identity in descriptors.items():
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) == identity:
                os.close(descriptor)


def _give_up_terminal() -> None:
    """Redirect the standard streams to /dev/null; a caller may read standard error until it is closed."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)


def sd_notify(state: str) -> None:
    """Send a state such as READY=1 to the service manager, if there is one, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sender.sendall(state.encode())
