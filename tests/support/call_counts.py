"""How many Python functions of the project one request enters, by kind of request.

The requests go through the handlers of the kernel engine, over a socket instead of /dev/fuse: no mount is made, no
privilege is needed, and nothing is timed. The 'call' events of sys.setprofile are counted for code of the package, in
the loop and in the threads that it uses: a number that is exact and the same on every machine.
"""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import trio

import overlayfs
from overlayfs import Overlay, StackConfig
from overlayfs.fuse.caching_policy import caching
from overlayfs.fuse.engine import MountSettings
from overlayfs.fuse.kernel.engine import KernelEngine
from overlayfs.fuse.kernel.passthrough import Io
from overlayfs.fuse.kernel.protocol import IN_HEADER, LAYOUTS, OUT_HEADER, Init, Op
from overlayfs.fuse.kernel.request import Request

_PACKAGE = os.path.dirname(overlayfs.__file__) + os.sep
_OFFERED = int(~Init(0) & ~Init.PASSTHROUGH)
_ENTRY, _OPENED = LAYOUTS["entry_out"], LAYOUTS["open_out"]
_LARGEST = 1 << 21


class _Socket:
    """Both ends of a connection: the engine uses one as /dev/fuse, the test acts as the kernel on the other."""

    def __init__(self) -> None:
        engine, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (engine, self.kernel):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
        engine.setblocking(False)
        self.fd = engine.detach()

    def read_ahead(self, size: int) -> None:
        """There is no page cache."""

    def detach(self) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)
        self.kernel.close()


class Counter:
    """Counts the functions of the package that are entered while `counting`, in any thread."""

    def __init__(self) -> None:
        self.by_function: dict[str, int] = {}
        self.active = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.active and event == "call":
            code = frame.f_code
            if code.co_filename.startswith(_PACKAGE):
                name = f"{code.co_filename.removeprefix(_PACKAGE)}:{code.co_qualname}"
                self.by_function[name] = self.by_function.get(name, 0) + 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Threads that are started in this context are watched too."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


class Kernel:
    """Sends requests to an engine one by one and reads its replies."""

    def __init__(self, overlay: Overlay, counter: Counter) -> None:
        self._socket = _Socket()
        self._engine = KernelEngine(overlay, caching(), lambda *_: self._socket, Io.CACHED, 0.0)
        self._engine.attach(b"/nowhere", MountSettings())
        self._counter = counter
        self._unique = 0
        self.counts: dict[str, dict[str, int]] = {}

    def shake_hands(self, nursery: trio.Nursery) -> None:
        """Complete the handshake (INIT)."""
        offer = LAYOUTS["init_in"].pack(7, 45, 131072, _OFFERED & 0xFFFF_FFFF, _OFFERED >> 32 & 0xFFFF_FFFF)
        self._put(Op.INIT, 0, offer)
        length = self._engine._receive()
        assert length
        self._engine._answer_init(Request(self._engine._view[:length]))
        self._engine._session.nursery = nursery
        assert OUT_HEADER.unpack_from(self._socket.kernel.recv(_LARGEST))[1] == 0

    def close(self) -> None:
        """Close both ends of the connection."""
        self._engine.detach()

    def _put(self, op: Op, nodeid: int, body: bytes) -> None:
        self._unique += 2
        length = IN_HEADER.size + len(body)
        self._socket.kernel.send(IN_HEADER.pack(length, op, self._unique, nodeid, 0, 0, 4711, 0, 0) + body)

    async def request(self, op: Op, nodeid: int, body: bytes = b"", label: str = "") -> bytes:
        """Send one request and return the body of its reply; with a label, count its calls."""
        self._put(op, nodeid, body)
        engine, counter = self._engine, self._counter
        counter.by_function = {}
        counter.active = bool(label)
        length = engine._receive()
        assert length
        engine._handle(Request(engine._view[:length]))
        while engine._session.waiting:
            await trio.lowlevel.checkpoint()
        reply = await self._reply()
        counter.active = False
        if label:
            self.counts[label] = counter.by_function
        error = OUT_HEADER.unpack_from(reply)[1]
        if error:
            raise OSError(-error, os.strerror(-error))
        return reply[OUT_HEADER.size :]

    async def _reply(self) -> bytes:
        """Return the answer; notifications of the engine have no number and are skipped."""
        while True:
            reply = self._socket.kernel.recv(_LARGEST)
            if OUT_HEADER.unpack_from(reply)[2]:
                return reply

    async def lookup(self, parent: int, name: bytes, label: str = "") -> int:
        """Return the number of the node under a name."""
        return int(_ENTRY.unpack_from(await self.request(Op.LOOKUP, parent, name + b"\0", label))[0])

    async def open(self, node: int, flags: int, label: str = "") -> int:
        """Return the handle of a file that is opened."""
        reply = await self.request(Op.OPEN, node, LAYOUTS["open_in"].pack(flags, 0), label)
        return int(_OPENED.unpack_from(reply)[0])


def _make_layers(place: Path) -> StackConfig:
    """Two layers whose directory `a/b/merged` is merged, and an empty upper."""
    for layer in ("top", "base"):
        for directory in ("a/b/merged", "plain"):
            (place / layer / directory).mkdir(parents=True)
        (place / layer / "a/b/merged" / layer).write_bytes(b"x" * 100)
        for name in ("one", "two", "three"):
            (place / layer / "plain" / f"{layer}-{name}").write_bytes(b"x" * 5000)
    for name in ("upper", "work"):
        (place / name).mkdir()
    lower = tuple(os.fsencode(place / layer) for layer in ("top", "base"))
    return StackConfig(lower=lower, upper=os.fsencode(place / "upper"), work=os.fsencode(place / "work"))


async def _requests(kernel: Kernel) -> None:
    """Every kind of request that is counted; the directories involved are known before."""
    root = 1
    plain = await kernel.lookup(root, b"plain")
    await kernel.lookup(plain, b"base-two")
    file = await kernel.lookup(plain, b"base-one", "LOOKUP of a file of a layer")
    await kernel.request(Op.GETATTR, file, LAYOUTS["getattr_in"].pack(0, 0, 0), "GETATTR")
    handle = await kernel.open(file, os.O_RDWR, "OPEN for writing, with copy-up")
    data = LAYOUTS["write_in"].pack(handle, 0, 4096, 0, 0, os.O_RDWR, 0) + b"y" * 4096
    await kernel.request(Op.WRITE, file, data)
    await kernel.request(Op.WRITE, file, data, "WRITE")
    reading = LAYOUTS["read_in"].pack(handle, 0, 4096, 0, 0, os.O_RDWR, 0)
    await kernel.request(Op.READ, file, reading, "READ")
    await kernel.request(Op.RELEASE, file, LAYOUTS["release_in"].pack(handle, 0, 0, 0), "RELEASE")
    made = LAYOUTS["create_in"].pack(os.O_RDWR | os.O_CREAT, 0o100644, 0o22, 0)
    await kernel.request(Op.CREATE, plain, made + b"made\0", "CREATE")
    await kernel.request(Op.UNLINK, plain, b"made\0", "UNLINK of a file of the upper")
    await kernel.request(Op.UNLINK, plain, b"base-two\0", "UNLINK of a file of a layer")
    await kernel.request(Op.MKDIR, plain, LAYOUTS["mkdir_in"].pack(0o755, 0o22) + b"dir\0", "MKDIR")
    await _renames(kernel, root)


async def _renames(kernel: Kernel, root: int) -> None:
    parent = root
    for name in (b"a", b"b"):
        parent = await kernel.lookup(parent, name)
    moved = await kernel.lookup(parent, b"merged")
    await kernel.lookup(moved, b"base")
    for label, old, new in (
        ("RENAME of a merged directory, the first time", b"merged", b"moved"),
        ("RENAME, all in the upper", b"moved", b"again"),
    ):
        await kernel.lookup(parent, new)  # as the kernel does before it renames
        names = LAYOUTS["rename2_in"].pack(parent, 0, 0) + old + b"\0" + new + b"\0"
        await kernel.request(Op.RENAME2, parent, names, label)


def count_calls(place: Path) -> dict[str, dict[str, int]]:
    """Return how often each function is entered by each request, on a new stack below the empty directory `place`."""
    counter = Counter()
    with ExitStack() as end:
        overlay = Overlay(_make_layers(place))
        end.callback(overlay.close)
        kernel = Kernel(overlay, counter)
        end.callback(kernel.close)

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                kernel.shake_hands(nursery)
                await _requests(kernel)

        end.enter_context(counter.installed())
        trio.run(run)
    return kernel.counts
