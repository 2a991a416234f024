"""How each file is open: through the page cache of the mount, or in passthrough, where the kernel reads and writes the
real file by itself.

The kernel allows one of the two at a time for an inode, and one backing file: a cached open beside a passthrough open
is EIO, and so are two backing files (fs/fuse/iomode.c). So the first open of an inode decides and later ones follow.
Two promises are kept here: no writer ever gets a lower file as its backing file, and a reader that opened the file
before copy-up sees what is written after it.
"""

import logging
import stat
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.fuse.kernel.connection import BackingFiles, Connection
from overlayfs.fuse.kernel.protocol import Open

log = logging.getLogger(__name__)

_PASSTHROUGH, KEEP_CACHE = int(Open.PASSTHROUGH), int(Open.KEEP_CACHE)

LARGE = 256 << 10  # bytes; from this size on reading in passthrough is worth a backing file
STORED = 128 << 10  # bytes; up to this size the content is stored in the page cache with the open


class Io(Enum):
    """The mount option `io`."""

    AUTO = "auto"  # passthrough where it cannot be noticed: files of the upper that are not open otherwise
    PASSTHROUGH = "passthrough"  # large lower files too: readers from before copy-up keep the old data
    CACHED = "cached"  # never passthrough


@dataclass(slots=True)
class IoMode:
    """How one inode is open now: its opens of each mode, and the backing file of those in passthrough.

    backing_id: 0 for none. lower: the backing file is in a lower layer. maps: it is open in passthrough for reading and
    writing, so it may be written through shared memory.
    """

    cached: int = 0
    passthrough: int = 0
    backing_id: int = 0
    lower: bool = False
    maps: bool = False


class Target(NamedTuple):
    """What is to be opened: its node id, an open descriptor of the real file, and what is known of it.

    in_upper: the data is in the upper. size, mode: of the real file, in bytes and as st_mode. direct: O_DIRECT.
    maps: a shared writable mapping is possible, which takes an open for reading and writing.
    """

    nodeid: int
    fd: int
    in_upper: bool
    writes: bool
    size: int
    mode: int
    direct: bool = False
    maps: bool = False


class OpenFiles:
    """The modes of all open files of one mount, by node id."""

    def __init__(self, connection: Connection, backing_files: BackingFiles | None, io: Io, keep_cache: bool) -> None:
        self._connection = connection
        self._backing_files = backing_files
        self._may_pass = backing_files is not None and io is not Io.CACHED
        self._io = io
        self._keep_cache = keep_cache
        self.modes: dict[int, IoMode] = {}  # a node id is present while it is open
        self._complete: set[int] = set()  # node ids of which the kernel has all pages, and they are current
        self._outdated: set[int] = set()  # node ids of which it may have pages from before a write in passthrough

    # --- opening and closing ---------------------------------------------------------------------------

    def open(self, target: Target) -> tuple[int, int]:
        """Count an open; return the flags (FOPEN_*) and the backing id of the reply, 0 for a cached open.

        The target must not be stale: see `is_stale`.
        """
        mode = self.modes.get(target.nodeid)
        backing_id = self._backing_id(mode, target)
        if backing_id:
            self._count_passthrough(target, mode, backing_id)
            return _PASSTHROUGH, backing_id
        flags = self._cache_flags(target, mode)
        if mode is None:
            mode = self.modes[target.nodeid] = IoMode()
        mode.cached += 1
        return flags, 0

    def open_complete(self, nodeid: int) -> bool:
        """Count a cached open for reading if the kernel has all pages of the file, else return False."""
        if nodeid not in self._complete:
            return False
        mode = self.modes.get(nodeid)
        if mode is None:
            mode = self.modes[nodeid] = IoMode()
        elif mode.passthrough:
            return False
        mode.cached += 1
        return True

    def close(self, nodeid: int, passthrough: bool) -> None:
        """Take back one open."""
        mode = self.modes[nodeid]
        if passthrough:
            mode.passthrough -= 1
        else:
            mode.cached -= 1
        if not mode.passthrough and mode.backing_id and self._backing_files is not None:
            self._backing_files.close(mode.backing_id)
            mode.backing_id = 0
        if not mode.passthrough and not mode.cached:
            del self.modes[nodeid]
            if mode.maps:
                self._connection.forget_attributes(nodeid)

    def changes_unseen(self, nodeid: int, mode: int, size: int) -> bool:
        """Return whether attributes may change without a request.

        Stores to shared memory change times and blocks of a backing file, unless it is empty; any write in passthrough
        clears its set-id bits, which the kernel must see before it runs the file.
        """
        io_mode = self.modes.get(nodeid)
        if io_mode is None or not io_mode.passthrough or io_mode.lower:
            return False
        return (io_mode.maps and size > 0) or _has_set_id(mode)

    def is_stale(self, nodeid: int, in_upper: bool) -> bool:
        """Return whether a file needs a new node id before it can be opened: this one reads a file of a lower layer in
        passthrough, and the data is in the upper now.
        """
        mode = self.modes.get(nodeid)
        return mode is not None and mode.lower and in_upper

    def forget(self, nodeid: int) -> None:
        """Note that the kernel has forgotten a node id, and its pages with it."""
        self._complete.discard(nodeid)
        self._outdated.discard(nodeid)

    # --- passthrough -----------------------------------------------------------------------------------

    def _backing_id(self, mode: IoMode | None, target: Target) -> int:
        """Return the backing id for an open, 0 if it is to be cached."""
        if mode is not None and mode.backing_id:
            return mode.backing_id
        if self._backing_files is None or mode is not None or not self._is_worth_it(target):
            return 0
        try:
            return self._backing_files.open(target.fd)
        except OSError as error:
            # The layers are on a file system where the kernel cannot do it (an overlay), or it is not permitted.
            log.info("no passthrough: %s", error)
            self._may_pass = False
            return 0

    def _is_worth_it(self, target: Target) -> bool:
        if not self._may_pass or _has_set_id(target.mode):
            return False
        if target.writes:
            return target.in_upper
        return target.size >= LARGE and (target.in_upper or self._io is Io.PASSTHROUGH)

    def _count_passthrough(self, target: Target, mode: IoMode | None, backing_id: int) -> None:
        if mode is None:
            mode = self.modes[target.nodeid] = IoMode(lower=not target.in_upper)
        mode.backing_id = backing_id
        mode.passthrough += 1
        if target.maps and not mode.maps:
            mode.maps = True
            if target.size:
                self._connection.forget_attributes(target.nodeid)
        if target.writes:
            self._complete.discard(target.nodeid)
            self._outdated.add(target.nodeid)

    # --- the page cache --------------------------------------------------------------------------------

    def _cache_flags(self, target: Target, mode: IoMode | None) -> int:
        """Return KEEP_CACHE where the pages that the kernel has are current; store those of a small file first."""
        if not self._keep_cache:
            return 0
        if target.nodeid in self._complete:
            return KEEP_CACHE
        if mode is None and not target.writes and not target.direct and self._store(target):
            self._complete.add(target.nodeid)
            self._outdated.discard(target.nodeid)
            return KEEP_CACHE
        if mode is None and target.nodeid in self._outdated:
            self._outdated.discard(target.nodeid)
            return 0
        return KEEP_CACHE

    def _store(self, target: Target) -> bool:
        """Give the kernel the content of a small file, so that it need not ask; not if that would wait for a disk."""
        if not 0 < target.size <= STORED:
            return False
        try:
            data = sysio.read_at(target.fd, 0, target.size, nowait=True)
        except OSError:
            return False
        if len(data) != target.size:
            return False
        self._connection.store(target.nodeid, data)
        return True


def _has_set_id(mode: int) -> bool:
    """Return whether a file has set-id bits: some writers keep them, but writes in passthrough always clear them."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID))
