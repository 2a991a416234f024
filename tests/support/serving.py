"""Daemons for tests, forked from the calling process: in the foreground, with their own log, optionally with a bug.

The calling process is best that of a fork server (`fork_server`), which is small and has loaded the program already.
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


class MountSpec(NamedTuple):
    """A mount for `serve`: an option string, or an image of a store with further options, and the path of its log.

    lock_wait: seconds to wait for a lock. own_namespace: in a mount namespace of its own. mutant: a planted bug.
    """

    point: bytes
    log: bytes
    options: bytes = b""
    store: bytes = b""
    image: str = ""
    workspace: str | None = None
    lock_wait: float = 5.0
    own_namespace: bool = False
    mutant: str | None = None


def serve(spec: MountSpec) -> int:
    """Mount and return the pid of the daemon when the mount is ready.

    If it fails, raise UserError with its sentence, or MountError if the exit code is that of a failed mount.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(b"\0ofs-%d" % os.getpid())
        address = manager.getsockname().decode()
        manager.setblocking(False)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _run_child(spec, address.replace("\0", "@", 1), writing)
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


def _run_child(spec: MountSpec, address: str, writing: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.environ["NOTIFY_SOCKET"] = address
        log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        with seeded(spec.mutant) if spec.mutant is not None else contextlib.nullcontext():
            _mount(spec)
        code = 0
    except UserError as error:
        code = error.exit_code
        os.write(writing, str(error).encode(errors="backslashreplace"))
    finally:
        os._exit(code)


def _mount(spec: MountSpec) -> None:
    from overlayfs.mount import start  # imported after the bug is planted

    if spec.own_namespace:
        syscalls.own_mounts()
    with contextlib.ExitStack() as stack:
        start.mount(_options(spec, stack), spec.point)


def _options(spec: MountSpec, stack: contextlib.ExitStack) -> MountOptions:
    draft = Draft(mount={"foreground": True, "allow_other": True})
    draft.read(spec.options)
    if not spec.image:
        return _built(draft, spec)
    lease = image_mount.lease_workspace(spec.store, spec.image, spec.workspace, ephemeral=False, create=False)
    found = stack.enter_context(lease)
    draft.lower, draft.upper, draft.work = list(found.lower), found.upper, found.work
    return dataclasses.replace(_built(draft, spec), image_mount=found.image_mount)


def _built(draft: Draft, spec: MountSpec) -> MountOptions:
    draft.stack["lock_wait"] = spec.lock_wait
    return draft.build()
