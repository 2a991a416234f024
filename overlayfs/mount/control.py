"""The client's side of the control socket: one line of JSON out, one line back.

Paths travel as text in the surrogateescape form of `os.fsdecode`. An answer has either `result` or
`error`, a sentence, with the exit code that belongs to it.
"""

import json
import os
import socket
from typing import Any

from overlayfs.errors import MountError, UsageError, UserError
from overlayfs.mount import mounts, runtime_state

_ERRORS = {kind.exit_code: kind for kind in (UserError, UsageError, MountError)}


def request(mountpoint: bytes, command: str, **arguments: Any) -> Any:
    """Return what the daemon of a mount answers to `command`; blocks. UserError with its sentence otherwise.

    `status`, `stats` and `sync` take no arguments, `diff` none, `why` a `path` within the mount, `commit` a
    `destination` (absolute), `commit-image` what `mount.commits` says, `hashing` a `layer` that it has returned.
    """
    pid = mounts.find(mountpoint).pid
    shown = os.fsdecode(mountpoint)
    if pid is None:
        raise UserError(f"no daemon of this user answers for {shown}; unmount it or ask as its owner")
    try:
        answer = _exchange(pid, {"command": command, **arguments})
    except (OSError, ValueError) as error:
        raise UserError(f"the daemon of {shown} (pid {pid}) does not answer: {error}") from None
    if "error" in answer:
        raise _ERRORS.get(answer.get("exit_code", 1), UserError)(answer["error"])
    return answer["result"]


def _exchange(pid: int, message: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(os.fsencode(runtime_state.socket_path(pid)))
        connection.sendall(json.dumps(message).encode() + b"\n")
        with connection.makefile("rb") as stream:
            line = stream.readline()
    if not line:
        raise ConnectionError("the connection was closed")
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("the answer is not an object")
    return answer
