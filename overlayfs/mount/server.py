"""The daemon's side of the control socket."""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from overlayfs.errors import UserError
from overlayfs.fuse.engine import Engine
from overlayfs.mount import flush, runtime_state
from overlayfs.mount.flush import prepare_flush
from overlayfs.mount.runtime_state import Record
from overlayfs.store.copy_upper import commit_mounted, refuse_inside

if TYPE_CHECKING:
    from overlayfs.mount.live_commit import LiveCommits  # a mount of plain directories does without the store

log = logging.getLogger(__name__)

LONGEST = 1 << 20  # bytes of one request: a path and some text
PIECE = 64  # entries of a listing that are worked out before other requests have their turn
CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid

Answer = dict[str, Any]


class Control:
    """Answers commands about one mount, for root and for the user who runs the daemon."""

    def __init__(self, engine: Engine, mountpoint: bytes, record: Record, commits: "LiveCommits | None") -> None:
        self._engine = engine
        self._overlay = engine.overlay
        self._mountpoint = mountpoint
        self._record = record
        self._commits = commits  # None for a mount of plain directories
        self._began = time.monotonic()
        self._using_mount = trio.CapacityLimiter(1)
        self._commands: dict[str, Callable[[Answer], Awaitable[Any]]] = {
            "status": self._tell_status,
            "stats": self._tell_stats,
            "sync": self._sync,
            "diff": self._diff,
            "why": self._why,
            "commit": self._commit,
            "commit-image": self._commit_image,
            "hashing": self._tell_hashing,
        }

    async def serve(
        self, path: Path, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen at `path` until cancelled."""
        listener = _listen(path)
        try:
            await trio.serve_listeners(self._converse, [listener], task_status=task_status)
        finally:
            _remove(path)

    async def _converse(self, stream: trio.SocketStream) -> None:
        """Answer one request; a client that goes away, or talks nonsense, harms nobody."""
        try:
            async with stream:
                answer = await self._answer(stream)
                await stream.send_all(json.dumps(answer).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            log.debug("a control client went away: %s", error)
        except Exception:
            log.exception("the control socket failed by a defect")

    async def _answer(self, stream: trio.SocketStream) -> Answer:
        try:
            line = await _read_line(stream)
            _check_peer(stream)
            return {"result": await self._obey(_decoded(line))}
        except UserError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except OSError as error:
            return {"error": _sentence(error), "exit_code": 1}
        except Exception as error:
            log.exception("a control command failed by a defect")
            return {"error": f"the daemon failed by a defect ({error!r}); its log has the trace", "exit_code": 1}

    async def _obey(self, message: Answer) -> Any:
        command = self._commands.get(str(message.pop("command", "")))
        if command is None:
            raise UserError("the daemon does not know this command; is it of another version?")
        return await command(message)

    async def _tell_status(self, message: Answer) -> Answer:
        return dataclasses.asdict(self._record)

    async def _tell_stats(self, message: Answer) -> Answer:
        return {
            "engine": self._engine.name,
            "uptime": time.monotonic() - self._began,
            "requests": dict(sorted(self._engine.counters.items())),
        }

    async def _sync(self, message: Answer) -> Answer:
        await self._write_out()
        await self._engine.threads.run(self._overlay.sync)
        return {}

    async def _diff(self, message: Answer) -> Answer:
        """List the changes of one moment: new ones wait, requests that only look go on between two pieces."""
        found = []
        async with self._held():
            for count, (kind, path) in enumerate(self._overlay.changes()):
                found.append([kind.decode(), os.fsdecode(path)])
                if count % PIECE == 0:
                    await trio.lowlevel.checkpoint()
        return {"changes": found}

    async def _why(self, message: Answer) -> Answer:
        found = self._overlay.explain(_path(message, "path"))
        return {"layers": [{"layer": os.fsdecode(at.layer), "kind": at.kind, "role": at.role} for at in found]}

    async def _commit(self, message: Answer) -> Answer:
        """Commit while mounted: mapped pages first, while requests still pass; then nothing changes until the end."""
        destination = _path(message, "destination")
        await self._use_mount(lambda: flush.run_unshared(lambda: refuse_inside(destination, self._mountpoint)))
        await self._write_out()
        async with self._held():
            made = await self._engine.threads.run(commit_mounted, self._overlay, destination)
        return {"layer": os.fsdecode(made.destination), "entries": made.entries, "size": made.size}

    async def _commit_image(self, message: Answer) -> Answer:
        """Commit into the store; the answer comes as soon as the layer is usable."""
        if self._commits is None:
            raise UserError("this is a mount of plain directories: its layers are in no store; commit it with --to DIR")
        from overlayfs.store.commit import CommitRequest
        from overlayfs.store.records import printable

        image = message.get("image")
        wanted = CommitRequest(
            image=None if image is None else str(image),
            message=printable(str(message.get("message", ""))),
            author=printable(str(message.get("author", ""))),
            allow_empty=bool(message.get("allow_empty", False)),
        )
        await self._write_out()
        made = await self._commits.commit(wanted)
        self._note_layers(made.image)
        return {"layer": made.layer, "image": made.image, "held": made.held}

    def _note_layers(self, image: str | None) -> None:
        """Let the record of the mount tell of the new layer."""
        lower = tuple(map(os.fsdecode, self._overlay.config.lower))
        self._record = dataclasses.replace(self._record, lower=lower, image=image or self._record.image)
        with contextlib.suppress(OSError):  # it only describes
            runtime_state.write(self._record)

    async def _tell_hashing(self, message: Answer) -> Answer:
        if self._commits is None:
            raise UserError("this is a mount of plain directories: it has nothing in a store")
        found = self._commits.hashed(str(message.get("layer", "")))
        return {"state": found.state, "entries": found.entries, "size": found.size, "told": found.told}

    async def _write_out(self) -> None:
        """Return when the kernel has handed over what was written through the mount."""
        await self._use_mount(prepare_flush(self._engine, self._mountpoint))

    async def _use_mount(self, call: Callable[[], None]) -> None:
        """Make a call that waits for requests, in a thread that no request needs.

        It is left alone when the mount ends, with which the wait ends.
        """
        await trio.to_thread.run_sync(call, limiter=self._using_mount, abandon_on_cancel=True)

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        """Hold changes within the context, which begins when none is running."""
        await self._engine.gate.close()
        try:
            yield
        finally:
            self._engine.gate.open()


def _listen(path: Path) -> trio.SocketListener:
    _remove(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listening.bind(os.fsencode(path))
    path.chmod(0o600)
    listening.listen(16)
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


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


def _decoded(line: bytes) -> Answer:
    try:
        message = json.loads(line)
    except ValueError:
        raise UserError("the request is not JSON") from None
    if not isinstance(message, dict):
        raise UserError("the request is not an object")
    return message


def _path(message: Answer, name: str) -> bytes:
    value = message.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(f"the request lacks {name}")
    return os.fsencode(value)


def _sentence(error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.filename is None:
        return reason
    name = error.filename
    return f"{os.fsdecode(name) if isinstance(name, bytes | str) else name}: {reason}"
