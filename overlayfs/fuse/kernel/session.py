"""What all handlers of requests need: nodes by the kernel's numbers, replies, and a way to answer later.

A handler is called on the loop and returns its reply, complete with header, or None when there is none or when it
comes later. What may wait (a closed gate, a copy-up, a disk) becomes a task; until then a handler is atomic.
"""

import errno
import logging
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias, TypeVar

import trio

from overlayfs.fs.copyup import Requirement
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

log = logging.getLogger(__name__)

R = TypeVar("R")
Wanted: TypeAlias = Callable[[], Iterable[tuple[Node, Requirement]]]

_OUT = LAYOUTS["out_header"]
_ENTRY = LAYOUTS["entry_reply"]
_ATTR = LAYOUTS["attr_reply"]
_BILLION = 1_000_000_000


class Session:
    """Shared by the handlers of one mount. `features` are what the handshake agreed on."""

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
        self.threads = engine.threads
        # Files without capabilities, as far as is known: the kernel asks before the first write and before each chown.
        self.no_caps: set[int] = set()
        self.sent_back: dict[int, int] = {}  # by thread, the number that it was just told to look up again
        self.waiting: dict[int, trio.CancelScope] = {}  # by the unique number of a request that is answered later
        self.nursery: trio.Nursery | None = None  # set while serving
        self._send = send
        self._workers = Workers()
        self._masks = bool(features & Init.DONT_MASK)
        self._gate = engine.gate
        self._copy_up_all = engine.copyup_runner.copy_up_all
        self._entry_time = _split(engine.policy.entry)
        self._attr_time = _split(engine.policy.attributes)
        self._absent = _absent_entry(engine.policy.negative)

    @property
    def is_busy(self) -> bool:
        """Whether a task or a thread that answers later wants the processor: a loop that looks around keeps the GIL."""
        return bool(self.waiting) or self._workers.busy > 0

    # --- nodes -----------------------------------------------------------------------------------------

    def node(self, nodeid: int) -> Node:
        """Return the node that the kernel knows by a number; ESTALE for none."""
        return self.node_ids.node(nodeid)

    def masked(self, parent: Node, mode: int, umask: int) -> int:
        """Return the mode of an object to be made, where the umask is ours to apply."""
        return self.overlay.masked(parent, mode, umask) if self._masks else mode

    # --- replies ---------------------------------------------------------------------------------------

    def done(self, request: Request, body: bytes = b"") -> bytes:
        """Return a reply with this body."""
        return _OUT.pack(_OUT.size + len(body), 0, request.unique) + body

    def entry(self, request: Request, node: Node) -> bytes:
        """Return the reply that makes the kernel know a node: from now on it holds one look-up more."""
        found = self.overlay.attributes(node)
        number = self.node_ids.remember(node)
        return _ENTRY.pack(_ENTRY.size, 0, request.unique, *self.entry_fields(number, node, found))

    def entry_fields(self, number: int, node: Node, found: Attributes) -> tuple[int, ...]:
        """Return the fields of an entry_out."""
        entry_s, entry_ns = self._entry_time
        attr_s, attr_ns = self._valid(number, node, found)
        return (number, 0, entry_s, attr_s, entry_ns, attr_ns, *attr_fields(found))

    def absent(self, request: Request) -> bytes:
        """Return the reply that makes the kernel remember that a name does not exist."""
        return self.done(request, self._absent)

    def attributes(self, request: Request, node: Node, found: Attributes) -> bytes:
        """Return the reply that carries attributes."""
        seconds, nanoseconds = self._valid(request.nodeid, node, found)
        return _ATTR.pack(_ATTR.size, 0, request.unique, seconds, nanoseconds, 0, *attr_fields(found))

    def _valid(self, number: int, node: Node, found: Attributes) -> tuple[int, int]:
        """Return how long attributes may be remembered: not at all where they change and the kernel does not see it."""
        if self.open_files.changes_unseen(number, found.mode, found.size) or self.node_ids.is_renewed(node):
            return 0, 0
        return self._attr_time

    def error(self, request: Request, error: Exception) -> bytes:
        """Return the reply to a request that failed; one that is cut short or holds absurd numbers is invalid."""
        if isinstance(error, (struct.error, OverflowError)):
            return self.refused(request, errno.EINVAL)
        code = reply_errno(error, KINDS.get(request.op, str(request.op)))
        return _OUT.pack(_OUT.size, -code, request.unique)

    def refused(self, request: Request, code: int) -> bytes:
        """Return the reply with an errno that is meant as it stands, ENOSYS too."""
        return _OUT.pack(_OUT.size, -code, request.unique)

    # --- now or later ----------------------------------------------------------------------------------

    def is_ready(self, node: Node, requirement: Requirement) -> bool:
        """Return whether a change of one node can be made at once."""
        return not self._gate.closed and self.overlay.next_copy_up(node, requirement) is None

    def change(self, request: Request, wanted: Wanted, act: Callable[[], Reply]) -> Reply:
        """Return what `act` returns once every node is where it is wanted: now if it can be, else later.

        `act` runs on the loop without a wait and must not use the request's body.
        """
        if not self._gate.closed and self._copied_up_now(wanted):
            return act()
        self.later(request, lambda: self._change_later(wanted, act))
        return None

    def _copied_up_now(self, wanted: Wanted) -> bool:
        """Lift what takes no data along; return whether nothing is missing any more."""
        complete = False
        while not complete:
            complete = True
            for node, requirement in wanted():
                step = self.overlay.next_copy_up(node, requirement)
                if step is None:
                    continue
                if step.heavy or step.node.copying_up:
                    return False
                step.run()
                complete = False
                break
        return True

    async def _change_later(self, wanted: Wanted, act: Callable[[], Reply]) -> Reply:
        async with self._gate.change():
            await self._copy_up_all(wanted)
            return act()

    def later(self, request: Request, answer: Callable[[], Awaitable[Reply]]) -> None:
        """Let a task find the answer; the kernel may interrupt it while it waits. Returns the reply for now: none."""
        assert self.nursery is not None
        scope = self.waiting[request.unique] = trio.CancelScope()
        self.nursery.start_soon(self._answer, request, answer, scope)

    async def _answer(self, request: Request, answer: Callable[[], Awaitable[Reply]], scope: trio.CancelScope) -> None:
        reply: Reply = self.refused(request, errno.EINTR)
        try:
            with scope:
                reply = await answer()
        except Exception as error:
            reply = self.error(request, error)
        finally:
            del self.waiting[request.unique]
        self._send(reply)

    def in_thread(self, request: Request, call: Callable[[], R], reply: Callable[[R], Reply]) -> None:
        """Let a thread find the answer: `reply`, made of what `call` returns, is made and sent there too."""

        def job() -> None:
            try:
                self._send(reply(call()))
            except Exception as error:
                self._send(self.error(request, error))

        self._workers.run(job)

    def synced(self, request: Request, call: Callable[[], None]) -> Reply:
        """Return the reply for when `call`, an fsync, has been made: now where no disk is waited for, else later."""
        if self.overlay.syncs_at_once:
            call()
            return self.done(request)
        self.in_thread(request, call, lambda _: self.done(request))
        return None

    def change_in_thread(
        self, request: Request, wanted: Wanted, prepare: Callable[[], Callable[[], R]], reply: Callable[[R], Reply]
    ) -> None:
        """Let a thread make the call that is prepared once every node is where it is wanted. Returns no reply yet."""

        async def answer() -> Reply:
            async with self._gate.change():
                while True:
                    await self._copy_up_all(wanted)
                    async with self._gate.heavy() as stepped_out:
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
        mode, nlink, uid, gid, encode_device(rdev), blksize, 0,
    )  # fmt: skip


def _split(seconds: float) -> tuple[int, int]:
    return divmod(int(seconds * _BILLION), _BILLION)


def _absent_entry(seconds: float) -> bytes:
    whole, part = _split(seconds)
    return LAYOUTS["entry_out"].encode(entry_valid=whole, entry_valid_nsec=part)
