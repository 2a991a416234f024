"""The client of the control socket."""

import os
import socket
from typing import TypeVar

from overlayfs.errors import UserError
from overlayfs.mount import control_protocol, mounts, runtime_state
from overlayfs.mount.mounts import Mount
from overlayfs.mount.runtime_state import Record

R = TypeVar("R")


class Client:
    """Sends commands to the daemon of one mount.

    The mount is looked up once; each command is one exchange on a connection of its own, and blocks. UserError with a
    sentence when the daemon does not answer, and with the daemon's own sentence when it refuses.
    """

    def __init__(self, mount: Mount) -> None:
        self.mount = mount

    @classmethod
    def at(cls, mountpoint: bytes) -> "Client":
        """Return a client for the mount that is uppermost on a path. UserError if it is none of ours."""
        return cls(mounts.find(mountpoint))

    def status(self) -> Record:
        """Return the record of the mount."""
        return self._ask(control_protocol.Status(), Record)

    def stats(self) -> control_protocol.StatsReply:
        """Return the counters of the engine."""
        return self._ask(control_protocol.Stats(), control_protocol.StatsReply)

    def sync(self) -> None:
        """Make what was written through the mount durable, dirty pages of memory maps included."""
        self._ask(control_protocol.Sync(), control_protocol.SyncReply)

    def diff(self) -> list[tuple[str, bytes]]:
        """Return the changes of the upper: a kind (A, C or D) and a path from the root of the mount, each."""
        found = self._ask(control_protocol.Diff(), control_protocol.DiffReply).changes
        return [(kind, os.fsencode(path)) for kind, path in found]

    def why(self, path: bytes) -> list[control_protocol.LayerEntry]:
        """Return what each layer holds at a path that counts from the root of the mount, top first."""
        return self._ask(control_protocol.Why(path=os.fsdecode(path)), control_protocol.WhyReply).layers

    def commit(self, destination: bytes) -> control_protocol.CommitReply:
        """Copy the upper to a directory, which must not exist yet; returns when it is durable."""
        absolute = os.path.join(os.getcwdb(), destination)
        return self._ask(control_protocol.Commit(destination=os.fsdecode(absolute)), control_protocol.CommitReply)

    def commit_image(self, request: control_protocol.CommitImage) -> control_protocol.CommitImageReply:
        """Commit a mounted image; returns as soon as the layer can be used, before it is hashed."""
        return self._ask(request, control_protocol.CommitImageReply)

    def hashing(self, layer: str) -> control_protocol.HashingReply:
        """Return how far the hashing of a layer is that `commit_image` has returned."""
        return self._ask(control_protocol.Hashing(layer=layer), control_protocol.HashingReply)

    def report(self) -> control_protocol.ReportReply:
        """Return the facts that help to find a defect, without names or contents of files."""
        return self._ask(control_protocol.Report(), control_protocol.ReportReply)

    def _ask(self, request: control_protocol.Request, reply: type[R]) -> R:
        shown, pid = os.fsdecode(self.mount.mountpoint), self.mount.pid
        if pid is None:
            raise UserError(f"no daemon of this user answers for {shown}; unmount it or ask as its owner")
        try:
            return control_protocol.decode_reply(_exchange(pid, control_protocol.encode_request(request)), reply)
        except (OSError, ValueError) as error:
            mounts.find(self.mount.mountpoint)  # UserError with a better reason, if the mount has ended
            raise UserError(f"the daemon of {shown} (pid {pid}) does not answer: {error}") from None


def _exchange(pid: int, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(os.fsencode(runtime_state.socket_path(pid)))
        connection.sendall(line)
        with connection.makefile("rb") as stream:
            answer = stream.readline()
    if not answer:
        raise ConnectionError("the connection was closed")
    return answer
