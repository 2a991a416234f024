"""The loop: requests in, replies out, on the descriptor of /dev/fuse itself.

One task of the trio loop drains the descriptor without a wait between two requests, polls a little longer when it is
empty (busy_poll.py), and only then waits for it as every task waits. So handlers, tasks that answer later and the
control socket share one thread and need no locks, and a busy mount pays for the scheduler once per idle moment, not
once per request.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from overlayfs import sysio
from overlayfs.errors import MountError
from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse import request_log
from overlayfs.fuse.caching_policy import CachingPolicy
from overlayfs.fuse.engine import Engine, MountSettings
from overlayfs.fuse.kernel.busy_poll import BusyPoll
from overlayfs.fuse.kernel.connection import Attacher, Attachment, BackingFiles, Connection
from overlayfs.fuse.kernel.handlers.attributes import AttributeHandlers
from overlayfs.fuse.kernel.handlers.files import FileHandlers
from overlayfs.fuse.kernel.handlers.filesystem import FilesystemHandlers
from overlayfs.fuse.kernel.handlers.names import NameHandlers
from overlayfs.fuse.kernel.handlers.readdir import DirectoryHandlers
from overlayfs.fuse.kernel.handlers.xattrs import XattrHandlers
from overlayfs.fuse.kernel.handshake import MAX_WRITE, Agreement, TooOldError, Wishes, agree
from overlayfs.fuse.kernel.passthrough import Io, OpenFiles
from overlayfs.fuse.kernel.protocol import LAYOUTS, MAJOR, OUT_HEADER, UNANSWERED, Init, Op
from overlayfs.fuse.kernel.request import KINDS, Handler, Reply, Request
from overlayfs.fuse.kernel.request_trace import RequestTrace
from overlayfs.fuse.kernel.session import Session
from overlayfs.fuse.kernel.standby import Standby, StandbyReader

log = logging.getLogger(__name__)

_BUFFER = MAX_WRITE + 8192  # bytes of the largest request: data, header, and the room that the kernel insists on
_TURN = 64  # requests that are answered before other tasks get their turn
_AGAIN = (errno.EINTR, errno.ENOENT)  # a signal; a request that was interrupted before it was read
_GONE = (errno.ENOENT, errno.ENODEV)  # the caller, or the mount, is gone: no one waits for this reply


class KernelEngine(Engine):
    """Serves an overlay through /dev/fuse."""

    name = "kernel"

    def __init__(
        self,
        overlay: Overlay,
        policy: CachingPolicy,
        attacher: Attacher,
        io: Io = Io.AUTO,
        busy_poll: float | None = None,
    ) -> None:
        super().__init__(overlay, policy)
        self._attacher = attacher
        self._io = io
        self._busy_poll = BusyPoll(busy_poll)
        self._buffer = bytearray(_BUFFER)
        self._into = [self._buffer]
        self._view = memoryview(self._buffer)
        self._handlers: dict[int, Handler] = {}
        self._attachment: Attachment | None = None
        self._scope = trio.CancelScope()
        self._ended = False
        self._files: FileHandlers | None = None

    # --- mounting, serving, unmounting -----------------------------------------------------------------

    def attach(self, mountpoint: bytes, settings: MountSettings) -> None:
        """Mount; requests wait until `serve` reads them."""
        self._settings = settings
        self._attachment = self._attacher(mountpoint, settings)
        self._fd = self._attachment.fd
        self._connection = Connection(self._fd)
        self._handle, self._send = self._dispatch, self._write_reply
        if request_log.is_enabled():
            trace = RequestTrace(self._dispatch, self._write_reply)
            self._handle, self._send = trace.dispatch, trace.send

    async def serve(self, ready: Callable[[], None]) -> None:
        """Answer requests until the mount is gone or `stop` is called."""
        await self._shake_hands()
        ready()
        async with trio.open_nursery() as nursery:
            self._session.nursery = nursery
            with self._scope, self._with_standby():
                await self._serve()
            nursery.cancel_scope.cancel()

    @contextmanager
    def _with_standby(self) -> Iterator[None]:
        """Within this context the standby thread serves while a change hangs. A read-only mount has no changes."""
        if self.overlay.read_only:
            yield
            return
        sysio.stall_watch = standby = Standby(StandbyReader(self._fd, _BUFFER, self.overlay, self._handle))
        try:
            yield
        finally:
            sysio.stall_watch = None
            standby.close()

    def stop(self) -> None:
        """Make `serve` return."""
        self._scope.cancel()

    def detach(self) -> None:
        """Unmount if still mounted, and close the connection."""
        if self._attachment is None:
            return
        if self._ended:  # unmounted, or cut off through fusectl: then the dead mount stays visible
            self._attachment.close()
        else:
            self._attachment.detach()
        self._attachment = None

    def files_with_pages(self) -> set[int]:
        """Return the node ids of the files of which the kernel may have dirty pages."""
        return set() if self._files is None else self._files.open_to_write()

    def drop_pages(self, nodeid: int) -> None:
        """Make the kernel write back and drop the pages of a file, and return when it has; only for a thread."""
        self._connection.drop_pages(nodeid)

    def nodes_written_in_passthrough(self) -> set[Node]:
        """Return the nodes in the upper that clients may write without a request."""
        return set() if self._files is None else self._files.nodes_written_in_passthrough()

    # --- the handshake ---------------------------------------------------------------------------------

    async def _shake_hands(self) -> None:
        """Answer INIT, the first request; MountError for a kernel that is too old."""
        while not self._handlers:
            await trio.lowlevel.wait_readable(self._fd)
            length = self._receive()
            if length:
                self._answer_init(Request(self._view[:length]))

    def _answer_init(self, request: Request) -> None:
        if request.op != Op.INIT:
            self._send(OUT_HEADER.pack(OUT_HEADER.size, -errno.EIO, request.unique))
            return
        offer = LAYOUTS["init_in"].decode(bytes(request.body).ljust(LAYOUTS["init_in"].size, b"\0"))
        if offer["major"] > MAJOR:
            # The kernel sends INIT again with the version of this reply.
            self._send(_complete(request, LAYOUTS["init_out"].encode(major=MAJOR)))
            return
        try:
            agreement = agree(offer, self._wishes())
        except TooOldError as error:
            self._send(OUT_HEADER.pack(OUT_HEADER.size, -errno.EPROTO, request.unique))
            raise MountError(f"the kernel is too old for this engine ({error}); mount with engine=pyfuse3") from None
        self._build(agreement)
        self._send(_complete(request, agreement.reply))
        if self._attachment is not None:
            self._attachment.read_ahead(MAX_WRITE)

    def _wishes(self) -> Wishes:
        return Wishes(
            acl=self._settings.acl,
            writeback=self.policy.writeback,
            passthrough=self._may_pass_through(),
            trusting=self.policy.keep_cache,
            read_only=self.overlay.read_only,
        )

    def _may_pass_through(self) -> bool:
        """Return whether passthrough may be used: not where the mode of the real file is not that of the node."""
        return self._io is not Io.CACHED and self.policy.keep_cache and not self.overlay.overrides

    def _build(self, agreement: Agreement) -> None:
        passes = bool(agreement.features & Init.PASSTHROUGH)
        backing_files = BackingFiles(self._fd) if passes else None
        open_files = OpenFiles(self._connection, backing_files, self._io, self.policy.keep_cache)
        self._session = Session(self, self._connection, open_files, self._settings, agreement.features, self._send)
        session = self._session
        self._files, xattrs = FileHandlers(session), XattrHandlers(session)
        names = NameHandlers(session, (self._files.forget, xattrs.forget))
        others = (AttributeHandlers(session), DirectoryHandlers(session), FilesystemHandlers(session))
        for group in (names, self._files, xattrs, *others):
            self._handlers.update(group.handlers)
        self.protocol_minor = agreement.minor
        self.features = tuple(flag.name for flag in agreement.features if flag.name is not None)
        log.debug("FUSE 7.%d: %s", self.protocol_minor, " ".join(self.features))

    # --- the loop --------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        busy_poll, clock = self._busy_poll, self._busy_poll.clock
        while not self._ended:
            if self._drain():
                await trio.lowlevel.checkpoint()
                continue
            began = clock()
            await trio.lowlevel.wait_readable(self._fd)
            busy_poll.waited(clock() - began)

    def _drain(self) -> bool:
        """Answer what has arrived and what arrives while polling; return whether other tasks must get their turn."""
        clock = self._busy_poll.clock
        empty_since = 0.0
        answered = 0
        while answered < _TURN:
            length = self._receive()
            if length:
                self._handle(Request(self._view[:length]))
                answered += 1
                empty_since = 0.0
            elif length is None:
                if self._ended or self._session.is_busy:
                    return False
                now = clock()
                empty_since = empty_since or now
                if now - empty_since >= self._busy_poll.seconds:
                    return False
        return True

    def _receive(self) -> int | None:
        """Read a request and return its length; 0 if the read is to be repeated, None if there is none."""
        try:
            return os.readv(self._fd, self._into)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _AGAIN:
                return 0
            if error.errno == errno.ENODEV:
                self._ended = True
                return None
            raise

    def _dispatch(self, request: Request) -> None:
        """Answer one request; whatever a handler raises becomes an errno in the reply."""
        kind = KINDS.get(request.op)
        handler = self._handlers.get(request.op)
        if kind is not None:
            self.counters[kind] += 1
        if handler is None:
            self._send(self._session.error(request, errno.ENOSYS))
            return
        if self._settings.allow_root and self._is_foreign(request):
            self._send(self._session.error(request, errno.EACCES))
            return
        try:
            reply = handler(request)
        except Exception as error:
            reply = None if request.op in UNANSWERED else self._session.failed(request, error)
        self._send(reply)

    def _is_foreign(self, request: Request) -> bool:
        """Return whether `allow_root` denies the request; open files were opened by a user who is allowed in."""
        return request.uid not in (0, os.geteuid()) and request.op not in _OF_OPEN_FILES

    def _write_reply(self, reply: Reply) -> None:
        """Write a reply, if there is one. The caller of the request may have gone meanwhile. Any thread may."""
        while reply is not None:
            try:
                if isinstance(reply, bytes):
                    os.write(self._fd, reply)
                else:
                    os.writev(self._fd, reply)
                return
            except OSError as error:
                if error.errno in _GONE:
                    return
                if error.errno != errno.EINTR:
                    raise


_OF_OPEN_FILES = frozenset(
    {
        *(Op.READ, Op.WRITE, Op.FSYNC, Op.RELEASE, Op.READDIRPLUS, Op.FSYNCDIR, Op.RELEASEDIR, Op.FLUSH),
        *(*UNANSWERED, Op.DESTROY),
    }
)


def _complete(request: Request, body: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, request.unique) + body
