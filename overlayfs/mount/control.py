"""The client of the control socket."""

import os
import socket
from typing import TypeVar

from overlayfs.errors import UserError
from overlayfs.mount import mounts, protocol, runtime_state
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
        return self._ask(protocol.Status(), Record)

    def stats(self) -> protocol.StatsReply:
        """Return the counters of the engine."""
        return self._ask(protocol.Stats(), protocol.StatsReply)

    def sync(self) -> None:
        """Make what was written through the mount durable, dirty pages of memory maps included."""
        self._ask(protocol.Sync(), protocol.SyncReply)

    def diff(self) -> list[tuple[str, bytes]]:
        """Return the changes of the upper: a kind (A, C or D) and a path from the root of the mount, each."""
        found = self._ask(protocol.Diff(), protocol.DiffReply).changes
        return [(kind, os.fsencode(path)) for kind, path in found]

    def why(self, path: bytes) -> list[protocol.LayerEntry]:
        """Return what each layer holds at a path that counts from the root of the mount, top first."""
        return self._ask(protocol.Why(path=os.fsdecode(path)), protocol.WhyReply).layers

    def commit(self, destination: bytes) -> protocol.CommitReply:
        """Copy the upper to a directory, which must not exist yet; returns when it is durable."""
        absolute = os.path.join(os.getcwdb(), destination)
        return self._ask(protocol.Commit(destination=os.fsdecode(absolute)), protocol.CommitReply)

    def commit_image(self, request: protocol.CommitImage) -> protocol.CommitImageReply:
        """Commit a mounted image; returns as soon as the layer can be used, before it is hashed."""
        return self._ask(request, protocol.CommitImageReply)

    def hashing(self, layer: str) -> protocol.HashingReply:
        """Return how far the hashing of a layer is that `commit_image` has returned."""
        return self._ask(protocol.Hashing(layer=layer), protocol.HashingReply)

    def report(self) -> protocol.ReportReply:
        """Return the facts that help to find a defect, without names or contents of files."""
        return self._ask(protocol.Report(), protocol.ReportReply)

    def _ask(self, request: protocol.Request, reply: type[R]) -> R:
        shown, pid = os.fsdecode(self.mount.mountpoint), self.mount.pid
        if pid is None:
            raise UserError(f"no daemon of this user answers for {shown}; unmount it or ask as its owner")
        try:
            return protocol.decode_reply(_exchange(pid, protocol.encode_request(request)), reply)
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
