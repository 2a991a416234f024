"""Requests that no kernel sends, passed to the kernel engine: random, truncated, with wrong numbers everywhere.

Each must be answered once, or not at all where the protocol says so, and no handler may end with a defect (EIO).
Run `python -m tests.unit.fuse_fuzz DIRECTORY COUNT [SEED]` for a longer campaign.
"""

import errno
import logging
import os
import resource
import sys
from collections import Counter
from pathlib import Path
from random import Random

import trio

from overlayfs import Overlay, StackConfig
from overlayfs.fuse.caching_policy import caching
from overlayfs.fuse.engine import MountSettings
from overlayfs.fuse.kernel.engine import KernelEngine
from overlayfs.fuse.kernel.passthrough import Io
from overlayfs.fuse.kernel.protocol import IN_HEADER, LAYOUTS, OUT_HEADER, Op
from overlayfs.fuse.kernel.request import Reply, Request

UNANSWERED = {Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT}
OFFERED = 0x5FD_73FF_FFFB  # what Linux 6.18 offers

# What follows the header of each kind of request: a structure, then so many names
_BODIES: dict[Op, tuple[str | None, int]] = {
    Op.LOOKUP: (None, 1), Op.FORGET: ("forget_in", 0), Op.GETATTR: ("getattr_in", 0), Op.SETATTR: ("setattr_in", 0),
    Op.SYMLINK: (None, 2), Op.MKNOD: ("mknod_in", 1), Op.MKDIR: ("mkdir_in", 1), Op.UNLINK: (None, 1),
    Op.RMDIR: (None, 1), Op.RENAME: ("rename_in", 2), Op.LINK: ("link_in", 1), Op.OPEN: ("open_in", 0),
    Op.READ: ("read_in", 0), Op.WRITE: ("write_in", 1), Op.RELEASE: ("release_in", 0), Op.FSYNC: ("fsync_in", 0),
    Op.SETXATTR: ("setxattr_in", 2), Op.GETXATTR: ("getxattr_in", 1), Op.LISTXATTR: ("getxattr_in", 0),
    Op.REMOVEXATTR: (None, 1), Op.OPENDIR: ("open_in", 0), Op.READDIRPLUS: ("read_in", 0),
    Op.FSYNCDIR: ("fsync_in", 0), Op.CREATE: ("create_in", 1), Op.INTERRUPT: ("interrupt_in", 0),
    Op.BATCH_FORGET: ("batch_forget_in", 1), Op.FALLOCATE: ("fallocate_in", 0), Op.RENAME2: ("rename2_in", 2),
    Op.LSEEK: ("lseek_in", 0), Op.COPY_FILE_RANGE: ("copy_file_range_in", 0), Op.TMPFILE: ("create_in", 1),
    Op.COPY_FILE_RANGE_64: ("copy_file_range_in", 0), Op.STATX: ("statx_in", 0), Op.IOCTL: ("ioctl_in", 1),
}  # fmt: skip
# Requests that forget ids are rare: otherwise none would be left for other requests
_OFTEN = [op for op in _BODIES for _ in range(1 if op in (Op.FORGET, Op.BATCH_FORGET, Op.RELEASE) else 5)]
_NAMES = [b"a", b"b", b"d", b"f", b"new", b".", b"..", b"", b".wh.f", b"x" * 255, b"y" * 256, b"\xff", b"a/b",
          b"user.k", b"trusted.overlay.opaque", b"system.posix_acl_access", b"security.capability"]  # fmt: skip
_NUMBERS = [0, 1, 2, 3, 4, 7, 0o777, 4096, 0x8000, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1,
            1 << 63, (1 << 64) - 1, 0o100644, 0o40755, 0o20000, 0o102, 0o2102, 0x8008_6601, 0x4008_6602]  # fmt: skip


class _NoMount:
    """A descriptor that notifications are written to."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR)

    def read_ahead(self, size: int) -> None:
        """There is no page cache."""

    def detach(self) -> None:
        os.close(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class Recorder(KernelEngine):
    """The engine, which keeps replies instead of sending them."""

    def __init__(self, overlay: Overlay, io: Io, timeout: float | None) -> None:
        super().__init__(overlay, caching(timeout), lambda *_: _NoMount(), io, 0.0)
        self.attach(b"/nowhere", MountSettings(xattrs=True))
        self.replies: list[bytes] = []

    def _write_reply(self, reply: Reply) -> None:
        if reply is not None:
            self.replies.append(reply if isinstance(reply, bytes) else b"".join(reply))

    def put(self, op: int, unique: int, nodeid: int, body: bytes, uid: int = 0) -> None:
        """Handle one request as if it had been read."""
        length = IN_HEADER.size + len(body)
        self._buffer[: IN_HEADER.size] = IN_HEADER.pack(length, op, unique, nodeid, uid, uid, 4711, 0, 0)
        self._buffer[IN_HEADER.size : length] = body
        request = Request(self._view[:length])
        if self._handlers:
            self._handle(request)
        else:
            self._answer_init(request)


class Campaign(logging.Handler):
    """Random requests from one seed, and what is wrong with the answers."""

    def __init__(self, engine: Recorder, seed: int) -> None:
        super().__init__(logging.ERROR)
        self.engine = engine
        self.random = Random(seed)
        self.wrong: list[str] = []
        self.answers: Counter[str] = Counter()
        self._nodes = [1]
        self._handles = [0]
        self._what = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Note a defect of a handler, which the engine logs."""
        self.wrong.append(f"{self._what}: {record.exc_info[1]!r}" if record.exc_info else f"{self._what}: {record.msg}")

    async def run(self, count: int) -> None:
        """Send `count` requests; each is answered before the next one is sent."""
        logger = logging.getLogger("overlayfs")
        logger.addHandler(self)
        propagates, logger.propagate = logger.propagate, False
        try:
            self._shake_hands()
            async with trio.open_nursery() as nursery:
                self.engine._session.nursery = nursery
                for unique in range(2, 2 * count + 2, 2):
                    await self._one(unique)
        finally:
            logger.propagate = propagates
            logger.removeHandler(self)

    def _shake_hands(self) -> None:
        low, high = OFFERED & 0xFFFF_FFFF, OFFERED >> 32
        self.engine.put(Op.INIT, 1, 0, LAYOUTS["init_in"].pack(7, 45, 131072, low, high))
        self.engine.replies.clear()

    async def _one(self, unique: int) -> None:
        op, body = self._make()
        nodeid = self.random.choice((1, self.random.choice(self._nodes)))
        if self.random.random() < 0.05:
            nodeid = self._number(64)
        self._what = f"{op} on {nodeid} with {body[:80]!r}"
        try:
            self.engine.put(op, unique, nodeid, body, self.random.choice((0, 0, 1000)))
        except Exception as error:
            self.wrong.append(f"{self._what}: raised {error!r}")
        with trio.move_on_after(20) as limit:
            while self.engine._session.waiting or not (self.engine.replies or op in UNANSWERED):
                await trio.lowlevel.checkpoint()
        if limit.cancelled_caught:
            self.wrong.append(f"{self._what}: no answer")
        self._check(op, unique)

    def _check(self, op: int, unique: int) -> None:
        replies, self.engine.replies = self.engine.replies, []
        if len(replies) != (0 if op in UNANSWERED else 1):
            self.wrong.append(f"{self._what}: {len(replies)} replies")
            return
        for reply in replies:
            length, error, answered = OUT_HEADER.unpack_from(reply)
            well_formed = length == len(reply) and answered == unique and -512 < error <= 0  # fuse_dev_do_write()
            if not well_formed or (error and len(reply) != OUT_HEADER.size):
                self.wrong.append(f"{self._what}: answered {reply[:40]!r}")
            self.answers[errno.errorcode.get(-error, "success")] += 1
            if not error:
                self._learn(op, reply[OUT_HEADER.size :])

    def _learn(self, op: int, body: bytes) -> None:
        """Use the ids of the reply in later requests."""
        if op in (Op.LOOKUP, Op.MKDIR, Op.MKNOD, Op.SYMLINK, Op.LINK, Op.CREATE, Op.TMPFILE):
            self._nodes = [1, *self._nodes[-20:], LAYOUTS["entry_out"].decode(body)["nodeid"]]
        if op in (Op.CREATE, Op.TMPFILE):
            self._handles = [*self._handles[-10:], LAYOUTS["create_out"].decode(body)["fh"]]
        if op == Op.OPEN:
            self._handles = [*self._handles[-10:], LAYOUTS["open_out"].decode(body)["fh"]]

    # --- making requests -------------------------------------------------------------------------------

    def _make(self) -> tuple[int, bytes]:
        if self.random.random() < 0.02:
            return self.random.randrange(0, 5000), self.random.randbytes(self.random.randrange(100))
        op = self.random.choice(_OFTEN)
        layout, names = _BODIES[op]
        body = b"" if layout is None else self._structure(layout)
        body += b"".join(self._some_name() + b"\0" for _ in range(names))
        return op, self._spoilt(body) if self.random.random() < 0.2 else body

    def _structure(self, name: str) -> bytes:
        layout = LAYOUTS[name]
        codes = layout.format.removeprefix("<")
        values = (self._field(field, code) for field, code in zip(layout.fields, codes, strict=True))
        return layout.pack(*values)

    def _field(self, field: str, code: str) -> int:
        if field in ("fh", "fh_in", "fh_out") and self.random.random() < 0.95:
            return self.random.choice(self._handles)
        if field in ("newdir", "oldnodeid", "nodeid_out") and self.random.random() < 0.9:
            return self.random.choice(self._nodes)
        width = {"I": 32, "i": 31, "Q": 64, "q": 63, "H": 16}[code]
        return self._number(width)

    def _number(self, bits: int) -> int:
        if self.random.random() < 0.8:
            return self.random.choice(_NUMBERS) % (1 << bits)
        return self.random.getrandbits(bits)

    def _some_name(self) -> bytes:
        return self.random.choice(_NAMES) if self.random.random() < 0.9 else self.random.randbytes(20)

    def _spoilt(self, body: bytes) -> bytes:
        way = self.random.randrange(3)
        if way == 0:
            return body[: self.random.randrange(len(body) + 1)]
        if way == 1:
            return body + self.random.randbytes(self.random.randrange(60))
        changed = bytearray(body or b"x")
        changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)


def campaign(place: Path, count: int, seed: int, io: Io = Io.PASSTHROUGH, timeout: float | None = None) -> Campaign:
    """Run a campaign over a small stack in `place`, a small file system, and return what it found."""
    for name in ("low", "u", "w"):
        (place / name).mkdir()
    (place / "low" / "d").mkdir()
    (place / "low" / "d" / "f").write_bytes(b"x" * 300_000)
    (place / "low" / "f").write_bytes(b"content")
    (place / "low" / "b").symlink_to("f")
    layers = [os.fsencode(place / name) for name in ("low", "u", "w")]
    overlay = Overlay(StackConfig(lower=(layers[0],), upper=layers[1], work=layers[2]))
    engine = Recorder(overlay, io, timeout)
    found = Campaign(engine, seed)
    umask = os.umask(0)
    try:
        trio.run(found.run, count)
    finally:
        os.umask(umask)
        engine.detach()
        overlay.close()
    return found


def main(directory: str, count: str, seed: str = "0") -> int:
    """Print the findings and how much memory the process took."""
    found = campaign(Path(directory), int(count), int(seed))
    print(dict(found.answers), f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    print("\n".join(found.wrong) or "nothing wrong")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
