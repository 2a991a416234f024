"""What all handlers of requests share: nodes by node id, replies, and ways to answer later.

A handler runs on the loop and returns its reply, complete with header, or None when there is none or when it comes
later. What may have to wait (a closed gate, a copy-up, a disk) becomes a task or a job of a thread; until then a
handler is atomic.
"""

import errno
import logging
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from overlayfs.fs.copyup import Requirements
from overlayfs.fs.files import FileHandle
from overlayfs.fs.metadata import Attributes
from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.engine import Engine, MountSettings, reply_errno
from overlayfs.fuse.kernel.connection import Connection
from overlayfs.fuse.kernel.node_ids import NodeIds
from overlayfs.fuse.kernel.passthrough import OpenFiles
from overlayfs.fuse.kernel.protocol import LAYOUTS, Init, encode_device
from overlayfs.fuse.kernel.request import KINDS, Reply, Request
from overlayfs.fuse.threads import Workers
from overlayfs.tree.stats import AnyStat

log = logging.getLogger(__name__)

R = TypeVar("R")
Required = TypeVar("Required", bound=Requirements)

_OUT = LAYOUTS["out_header"]
_ENTRY = LAYOUTS["entry_reply"]
_ATTR = LAYOUTS["attr_reply"]
_BILLION = 1_000_000_000


class Session:
    """Shared by the handlers of one mount. `features` are those agreed on in the handshake."""

    def __init__(
        self,
        engine: Engine,
        connection: Connection,
        open_files: OpenFiles,
        settings: MountSettings,
        features: Init,
        send: Callable[[Reply], None],
    ) -> None:
        self.overlay: Overlay = engine.overlay
        self.policy = engine.policy
        self.connection = connection
        self.open_files = open_files
        self.settings = settings
        self.features = features
        self.counters: Counter[str] = engine.counters
        self.node_ids = NodeIds(engine.overlay.nodes)
        self.node = self.node_ids.node
        self._renewed = self.node_ids.renewed
        self._io_modes = open_files.modes
        self.gate = engine.gate
        self.threads = engine.threads
        self.handles: dict[int, FileHandle] = {}  # open files by the number (`fh`) that the kernel knows
        # Node ids of files known to have no capabilities: the kernel asks before the first write and before each chown.
        self.no_caps: set[int] = set()
        self.sent_back: dict[int, int] = {}  # thread id -> the node id that it was just answered ESTALE for
        self.waiting: dict[int, trio.CancelScope] = {}  # by the unique number of a request that a task answers
        self.nursery: trio.Nursery | None = None  # set while serving
        self._send = send
        self._workers = Workers()
        self._applies_umask = bool(features & Init.DONT_MASK)
        self._copy_up_all = engine.copyup_runner.copy_up_all
        (entry_s, entry_ns), (attr_s, attr_ns) = _split(engine.policy.entry), _split(engine.policy.attributes)
        self._times = entry_s, attr_s, entry_ns, attr_ns  # in the order of fuse_entry_out
        self._absent = _absent_entry(engine.policy.negative)

    @property
    def is_busy(self) -> bool:
        """Whether a task or a thread is at work on an answer: a loop that polls would keep the GIL from it."""
        return bool(self.waiting) or self._workers.busy > 0

    def masked(self, parent: Node, mode: int, umask: int) -> int:
        """Return the mode of an object to be made, without the bits of the umask if the kernel leaves that to us."""
        return self.overlay.names.masked(parent, mode, umask) if self._applies_umask else mode

    # --- replies ---------------------------------------------------------------------------------------

    def ok(self, request: Request, body: bytes = b"") -> bytes:
        """Return a reply of success with this body."""
        return _OUT.pack(_OUT.size + len(body), 0, request.unique) + body

    def error(self, request: Request, code: int) -> bytes:
        """Return a reply with this errno as it is, even ENOSYS, after which the kernel stops sending the kind."""
        return _OUT.pack(_OUT.size, -code, request.unique)

    def failed(self, request: Request, error: Exception) -> bytes:
        """Return the reply to a request that raised; one that is truncated or has absurd numbers is EINVAL."""
        if isinstance(error, (struct.error, OverflowError)):
            return self.error(request, errno.EINVAL)
        return self.error(request, reply_errno(error, KINDS.get(request.op, str(request.op))))

    def entry(self, request: Request, node: Node, stat: AnyStat | None) -> bytes:
        """Return the reply that makes the kernel know a node, and count the lookup. `stat`: if there is a new one."""
        found = self.overlay.metadata.attributes(node, stat)
        nodeid = self.node_ids.remember(node)
        times = self._times_of(nodeid, node, found) if self._renewed or nodeid in self._io_modes else self._times
        return _ENTRY.pack(_ENTRY.size, 0, request.unique, nodeid, 0, *times, *attr_fields(found))

    def entry_fields(self, nodeid: int, node: Node, found: Attributes) -> tuple[int, ...]:
        """Return the fields of an entry_out."""
        return (nodeid, 0, *self._times_of(nodeid, node, found), *attr_fields(found))

    def absent(self, request: Request) -> bytes:
        """Return the reply that makes the kernel cache the absence of a name."""
        return self.ok(request, self._absent)

    def attributes(self, request: Request, node: Node, found: Attributes) -> bytes:
        """Return the reply that carries attributes."""
        nodeid = request.nodeid
        times = self._times_of(nodeid, node, found) if self._renewed or nodeid in self._io_modes else self._times
        return _ATTR.pack(_ATTR.size, 0, request.unique, times[1], times[3], 0, *attr_fields(found))

    def _times_of(self, nodeid: int, node: Node, found: Attributes) -> tuple[int, int, int, int]:
        """Return how long the kernel may cache the entry and the attributes of a node, as in `_times`.

        No attributes where they change without its noticing: a renewed node has several inodes in the kernel, and each
        request updates the attributes of only one.
        """
        if node.number in self._renewed or self.open_files.changes_unseen(nodeid, found.mode, found.size):
            return self._times[0], 0, self._times[2], 0
        return self._times

    # --- now or later ----------------------------------------------------------------------------------

    def change(self, request: Request, requirements: Callable[[], Required], act: Callable[[Required], Reply]) -> Reply:
        """Return what `act` returns once its requirements are met: now if no data must be copied up, else later.

        `act` gets the requirements, runs on the loop without a wait and must not use the request's body.
        """
        if not self.gate.closed:
            required = requirements()
            if self.overlay.copyup.copy_up_at_once(required):
                return act(required)
        self.later(request, partial(self._change_later, requirements, act))
        return None

    async def _change_later(self, requirements: Callable[[], Required], act: Callable[[Required], Reply]) -> Reply:
        async with self.gate.change():
            return act(await self._copy_up_all(requirements))

    def later(self, request: Request, answer: Callable[[], Awaitable[Reply]]) -> None:
        """Let a task answer; the kernel may interrupt it while it waits."""
        assert self.nursery is not None
        scope = self.waiting[request.unique] = trio.CancelScope()
        self.nursery.start_soon(self._answer, request, answer, scope)

    async def _answer(self, request: Request, answer: Callable[[], Awaitable[Reply]], scope: trio.CancelScope) -> None:
        reply: Reply = self.error(request, errno.EINTR)
        try:
            with scope:
                reply = await answer()
        except Exception as error:
            reply = self.failed(request, error)
        finally:
            del self.waiting[request.unique]
        self._send(reply)

    def in_thread(self, request: Request, call: Callable[[], R], reply: Callable[[R], Reply]) -> None:
        """Let a thread answer: `reply`, called with the result of `call`, runs there too."""

        def job() -> None:
            try:
                self._send(reply(call()))
            except Exception as error:
                self._send(self.failed(request, error))

        self._workers.run(job)

    def sync(self, request: Request, call: Callable[[], None]) -> Reply:
        """Make the call of an fsync: now where it waits for no disk, else in a thread, which answers."""
        if self.overlay.syncs_at_once:
            call()
            return self.ok(request)
        self.in_thread(request, call, lambda _: self.ok(request))
        return None

    def change_in_thread(
        self,
        request: Request,
        requirements: Callable[[], Requirements],
        prepare: Callable[[], Callable[[], R]],
        reply: Callable[[R], Reply],
    ) -> None:
        """Let a thread make the call that `prepare` returns once every node is in the upper as required."""

        async def answer() -> Reply:
            async with self.gate.change():
                while True:
                    await self._copy_up_all(requirements)
                    async with self.gate.heavy() as stepped_out:
                        if not stepped_out:
                            return reply(await self.threads.run(prepare()))

        self.later(request, answer)


def attr_fields(found: Attributes) -> tuple[int, ...]:
    """Return the fields of an attr."""
    ino, mode, nlink, uid, gid, rdev, size, blksize, blocks, atime, mtime, ctime = found
    return (
        ino, size, blocks,
        atime // _BILLION, mtime // _BILLION, ctime // _BILLION,
        atime % _BILLION, mtime % _BILLION, ctime % _BILLION,
        mode, nlink, uid, gid, encode_device(rdev) if rdev else 0, blksize, 0,
    )  # fmt: skip


def _split(seconds: float) -> tuple[int, int]:
    return divmod(int(seconds * _BILLION), _BILLION)


def _absent_entry(seconds: float) -> bytes:
    whole, part = _split(seconds)
    return LAYOUTS["entry_out"].encode(entry_valid=whole, entry_valid_nsec=part)
