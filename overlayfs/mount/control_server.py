"""The daemon's side of the control socket.

Loaded when the mount is ready: what it needs takes as long to import as a mount takes to start.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from overlayfs.errors import UserError
from overlayfs.fuse.engine import Engine
from overlayfs.mount import control_protocol, report, runtime_state
from overlayfs.mount.control_protocol import Request
from overlayfs.mount.flush import prepare_flush, run_unshared
from overlayfs.mount.options import MountOptions
from overlayfs.mount.runtime_state import Record
from overlayfs.store.copy_upper import commit_mounted, refuse_inside

if TYPE_CHECKING:
    from overlayfs.mount.live_commit import LiveCommits  # a mount of plain directories does without the store

log = logging.getLogger(__name__)

LONGEST = 1 << 20  # bytes of one request: a path and some text
PIECE = 64  # entries of a listing between two checkpoints, so that the loop serves requests of the kernel meanwhile
CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


class ControlServer:
    """Carries out commands for one mount, for root and for the user who runs the daemon.

    `commits` is None for a mount of plain directories. The times of `stats` and `report` count from now.
    """

    def __init__(
        self, engine: Engine, mountpoint: bytes, options: MountOptions, record: Record, commits: "LiveCommits | None"
    ) -> None:
        self._engine = engine
        self._overlay = engine.overlay
        self._mountpoint = mountpoint
        self._options = options
        self._record = record
        self._commits = commits
        self._began = time.monotonic()
        self._using_mount = trio.CapacityLimiter(1)
        self._commands: dict[type[Request], Callable[[Any], Awaitable[Any]]] = {
            control_protocol.Status: self._status,
            control_protocol.Stats: self._stats,
            control_protocol.Sync: self._sync,
            control_protocol.Diff: self._diff,
            control_protocol.Why: self._why,
            control_protocol.Commit: self._commit,
            control_protocol.CommitImage: self._commit_image,
            control_protocol.Hashing: self._hashing,
            control_protocol.Report: self._report,
        }

    async def serve(self, listening: socket.socket) -> None:
        """Serve the clients of a listening socket until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        await trio.serve_listeners(self._converse, [listener])

    async def _converse(self, stream: trio.SocketStream) -> None:
        """Serve one client, which may go away or send anything."""
        try:
            async with stream:
                await stream.send_all(await self._answer(stream))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            log.debug("a control client disconnected: %s", error)
        except Exception:
            log.exception("the control socket failed by a defect")

    async def _answer(self, stream: trio.SocketStream) -> bytes:
        """Return the line that answers the request of a client, an error included."""
        try:
            line = await _read_line(stream)
            _check_peer(stream)
            request = control_protocol.decode_request(line)
            return control_protocol.encode_result(await self._commands[type(request)](request))
        except UserError as error:
            return control_protocol.encode_error(error)
        except OSError as error:
            return control_protocol.encode_error(UserError(_sentence(error)))
        except Exception as error:
            log.exception("a control command failed by a defect")
            return control_protocol.encode_error(
                UserError(f"the daemon failed by a defect ({error!r}); its log has the trace")
            )

    async def _status(self, _: control_protocol.Status) -> Record:
        return self._record

    async def _stats(self, _: control_protocol.Stats) -> control_protocol.StatsReply:
        requests = dict(sorted(self._engine.counters.items()))
        return control_protocol.StatsReply(engine=self._engine.name, uptime=self._uptime(), requests=requests)

    async def _report(self, _: control_protocol.Report) -> control_protocol.ReportReply:
        return report.report(self._engine, self._options, self._uptime())

    def _uptime(self) -> float:
        return time.monotonic() - self._began

    async def _sync(self, _: control_protocol.Sync) -> control_protocol.SyncReply:
        await self._write_back()
        await self._engine.threads.run(self._overlay.sync)
        return control_protocol.SyncReply()

    async def _diff(self, _: control_protocol.Diff) -> control_protocol.DiffReply:
        """List the changes of one moment: writes wait meanwhile, reads are served between two pieces."""
        changes = []
        async with self._changes_paused():
            for count, (kind, path) in enumerate(self._overlay.changes()):
                changes.append((kind.decode(), os.fsdecode(path)))
                if count % PIECE == 0:
                    await trio.lowlevel.checkpoint()
        return control_protocol.DiffReply(changes=changes)

    async def _why(self, request: control_protocol.Why) -> control_protocol.WhyReply:
        found = self._overlay.explain(_path(request.path))
        entries = [control_protocol.LayerEntry(os.fsdecode(each.layer), each.kind, each.role) for each in found]
        return control_protocol.WhyReply(layers=entries)

    async def _commit(self, request: control_protocol.Commit) -> control_protocol.CommitReply:
        """Copy the upper: dirty pages are written back first, while writes are still served; then writes wait."""
        destination = _path(request.destination)
        await self._use_mount(lambda: run_unshared(lambda: refuse_inside(destination, self._mountpoint)))
        await self._write_back()
        async with self._changes_paused():
            made = await self._engine.threads.run(commit_mounted, self._overlay, destination)
        return control_protocol.CommitReply(layer=os.fsdecode(made.destination), entries=made.entries, size=made.size)

    async def _commit_image(self, request: control_protocol.CommitImage) -> control_protocol.CommitImageReply:
        """Commit into the store; the reply is sent as soon as the layer is usable."""
        if self._commits is None:
            raise UserError("this is a mount of plain directories: its layers are in no store; commit it with --to DIR")
        await self._write_back()
        made = await self._commits.commit(request)
        self._record_layers(made.image)
        return made

    def _record_layers(self, image: str | None) -> None:
        """Update the record of the mount after a commit."""
        lower = tuple(map(os.fsdecode, self._overlay.config.lower))
        self._record = dataclasses.replace(self._record, lower=lower, image=image or self._record.image)
        with contextlib.suppress(OSError):  # it only describes
            runtime_state.write(self._record)

    async def _hashing(self, request: control_protocol.Hashing) -> control_protocol.HashingReply:
        if self._commits is None:
            raise UserError("this is a mount of plain directories: it has nothing in a store")
        return self._commits.hashed(request.layer)

    async def _write_back(self) -> None:
        """Return when the kernel has handed over what was written through the mount."""
        await self._use_mount(prepare_flush(self._engine, self._mountpoint))

    async def _use_mount(self, call: Callable[[], None]) -> None:
        """Make a call that waits for requests of the kernel, in a thread that serves none of them.

        It is abandoned when the mount ends, which ends the wait too.
        """
        await trio.to_thread.run_sync(call, limiter=self._using_mount, abandon_on_cancel=True)

    @contextlib.asynccontextmanager
    async def _changes_paused(self) -> AsyncIterator[None]:
        """Hold back changes within the context, which is entered when none is running."""
        await self._engine.gate.close()
        try:
            yield
        finally:
            self._engine.gate.open()


def _check_peer(stream: trio.SocketStream) -> None:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, uid, _ = CREDENTIALS.unpack(raw)
    if uid not in (0, os.geteuid()):
        raise UserError("only root and the user who mounted may control a mount")


async def _read_line(stream: trio.SocketStream) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        part = await stream.receive_some()
        if not part or len(received) + len(part) > LONGEST:
            raise UserError("the request is not one line")
        received += part
    return bytes(received)


def _path(text: str) -> bytes:
    """Return a path of a request. UserError for what no system call takes."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        path = b""
    if not path or b"\0" in path:
        raise UserError("the request has a path that cannot be")
    return path


def _sentence(error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.filename is None:
        return reason
    name = error.filename
    return f"{os.fsdecode(name) if isinstance(name, bytes | str) else name}: {reason}"
