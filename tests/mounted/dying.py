"""Daemons that are killed at a chosen moment.

Each function of the tables patches this process, so that a daemon forked from it dies at that moment.
"""

import errno
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

from overlayfs import Overlay, sysio
from overlayfs.errors import oserror
from overlayfs.mount import daemon, runtime_state, syscalls
from overlayfs.mount.control_server import ControlServer
from tests.support import serving
from tests.support.serving import MountSpec


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _dying(owner: Any, name: str) -> Callable[[], None]:
    return lambda: setattr(owner, name, _die)


def _after(owner: Any, name: str) -> Callable[[], None]:
    def put() -> None:
        act = getattr(owner, name)

        def act_and_die(*args: Any, **words: Any) -> None:
            act(*args, **words)
            _die()

        setattr(owner, name, act_and_die)

    return put


MOUNTING: dict[str, Callable[[], None]] = {
    "the upper is locked and prepared": _dying(daemon, "build_engine"),
    "the kernel has the mount, it is not served": _dying(daemon, "_serve"),
    "it answers, it is not announced": _dying(runtime_state, "write"),
    "the record is written": _after(runtime_state, "write"),
}
"""By the state at that moment. Mounting fails."""

UNMOUNTING: dict[str, Callable[[], None]] = {
    "the kernel has destroyed the mount": _dying(daemon, "_close_overlay"),
    "the upper is synced, still locked": _dying(Overlay, "close"),
    "all is closed, the record is there": _dying(runtime_state, "remove"),
}
"""By the state at that moment. Mounting succeeds, and the daemon dies while it ends."""


def serve_dying(moment: str, spec: MountSpec) -> int:
    """Mount with a daemon that dies at a moment."""
    {**MOUNTING, **UNMOUNTING}[moment]()
    return serving.serve(spec)


def serve_until_call(number: int, spec: MountSpec) -> int:
    """Mount with a daemon that dies before its changing system call of this number, which counts from 0."""
    calls = itertools.count()

    def count(_: str) -> None:
        if next(calls) == number:
            _die()

    sysio.fault_hook = count
    return serving.serve(spec)


def serve_never_writing(by_handle: bool, spec: MountSpec) -> int:
    """Mount with a daemon that, at the command sync, waits for dirty pages but serves no WRITE.

    Without `by_handle` it may not open files by their handles, as one that an unprivileged user has mounted.
    """
    mock.patch.object(ControlServer, "_sync", _wait_in_vain).start()
    if not by_handle:
        mock.patch.object(syscalls, "open_inode", _refused).start()
    return serving.serve(spec)


async def _wait_in_vain(control: ControlServer, _: object) -> object:
    await control._engine.gate.close()
    await control._write_back()
    raise AssertionError("the pages were written back")


def _refused(*_: Any) -> NoReturn:
    raise oserror(errno.EPERM)
