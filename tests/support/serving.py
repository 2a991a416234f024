"""Daemons for tests, forked where they are asked for: in the foreground, with a log of their own, and with a bug if
one is wanted. What forks them is best an act of `apart`, which is small and has loaded the program already.
"""

import contextlib
import dataclasses
import os
import select
import socket
from typing import NamedTuple, NoReturn

from overlayfs.errors import MountError, UserError
from overlayfs.mount import image_mount
from overlayfs.mount.options import Draft, MountOptions
from tests.support import syscalls
from tests.support.mutants import seeded

LIMIT = 20.0  # seconds


class Wish(NamedTuple):
    """A mount that is wanted: an option string, or an image of a store with further options; and where its log goes.

    patience: seconds to wait for a lock. alone: in a mount namespace of its own. mutant: with this bug.
    """

    point: bytes
    log: bytes
    options: bytes = b""
    store: bytes = b""
    image: str = ""
    workspace: str | None = None
    patience: float = 5.0
    alone: bool = False
    mutant: str | None = None


def serve(wish: Wish) -> int:
    """Mount and return the pid of the daemon when the mount answers.

    UserError with its sentence if there is none, MountError where that is the exit code of a failed mount.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(b"\0ofs-%d" % os.getpid())
        address = manager.getsockname().decode()
        manager.setblocking(False)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _live(wish, address.replace("\0", "@", 1), writing)
        os.close(writing)
        with open(reading, "rb") as complaint:
            ready, _, _ = select.select([manager.fileno(), reading], [], [], LIMIT)
            if manager.fileno() in ready:
                return child
            assert ready, f"neither a mount nor a refusal within {LIMIT:g} s"
            _, status = os.waitpid(child, 0)
            sentence = complaint.read().decode()
    code = os.waitstatus_to_exitcode(status)
    kind = MountError if code == MountError.exit_code else UserError
    raise kind(sentence or f"the daemon ended with {code}")


def _live(wish: Wish, address: str, writing: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.environ["NOTIFY_SOCKET"] = address
        log = os.open(wish.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        with seeded(wish.mutant) if wish.mutant is not None else contextlib.nullcontext():
            _mount(wish)
        code = 0
    except UserError as error:
        code = error.exit_code
        os.write(writing, str(error).encode(errors="backslashreplace"))
    finally:
        os._exit(code)


def _mount(wish: Wish) -> None:
    from overlayfs.mount import start  # not before the bug is in place

    if wish.alone:
        syscalls.own_mounts()
    with contextlib.ExitStack() as stack:
        start.mount(_options(wish, stack), wish.point)


def _options(wish: Wish, stack: contextlib.ExitStack) -> MountOptions:
    draft = Draft(mount={"foreground": True, "allow_other": True})
    draft.read(wish.options)
    if not wish.image:
        return _patient(draft, wish)
    lease = image_mount.lease_workspace(wish.store, wish.image, wish.workspace, ephemeral=False, create=False)
    found = stack.enter_context(lease)
    draft.lower, draft.upper, draft.work = list(found.lower), found.upper, found.work
    return dataclasses.replace(_patient(draft, wish), image_mount=found.image_mount)


def _patient(draft: Draft, wish: Wish) -> MountOptions:
    draft.stack["lock_wait"] = wish.patience
    return draft.build()
