"""How each file is open: through the page cache of the mount, or past us to the file behind (passthrough).

The kernel allows one way at a time for an inode, and one backing file: a cached open beside a passthrough one is
EIO, and so are two backing files (engine notes, measured; fs/fuse/iomode.c). So whoever opens first decides, and
those who come later follow. Two promises are kept here: no writer ever gets a lower file as backing, and a reader
that was there before copy-up sees what is written after it.
"""

import logging
import stat
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.fuse.kernel.connection import Backings, Connection
from overlayfs.fuse.kernel.protocol import Open

log = logging.getLogger(__name__)

_PASSTHROUGH, KEEP_CACHE = int(Open.PASSTHROUGH), int(Open.KEEP_CACHE)

LARGE = 256 << 10  # bytes from which reading through is worth a backing file
STORED = 128 << 10  # bytes up to which content is handed over with the open


class Io(Enum):
    """The mount option `io`."""

    AUTO = "auto"  # past us where it cannot be seen: files of the upper that nobody has open otherwise
    PASSTHROUGH = "passthrough"  # large lower files too: readers that were there before copy-up keep the old data
    CACHED = "cached"  # never


class ReplacedError(Exception):
    """A lower file is open past us and its data is in the upper now: it needs a new number before it can be opened."""


@dataclass(slots=True)
class Way:
    """How one inode is open now: counts of opens, and the backing file with whether it lies in a lower layer.

    mapped: somebody has it open past us for reading and writing, so may write through shared memory.
    """

    cached: int = 0
    through: int = 0
    backing: int = 0
    lower: bool = False
    mapped: bool = False


class Target(NamedTuple):
    """What is to be opened: the number that the kernel knows, an open descriptor of the file, what is known of it.

    maps: it can be mapped shared and writable, which takes an open for reading and writing.
    """

    nodeid: int
    fd: int
    in_upper: bool
    writes: bool
    size: int
    mode: int
    direct: bool = False
    maps: bool = False


class Openings:
    """All open files of one mount, by the number that the kernel knows."""

    def __init__(self, connection: Connection, backings: Backings | None, io: Io, keep_cache: bool) -> None:
        self._connection = connection
        self._backings = backings
        self._passes = backings is not None and io is not Io.CACHED
        self._io = io
        self._keep_cache = keep_cache
        self._ways: dict[int, Way] = {}
        self._complete: set[int] = set()  # the kernel holds all pages of these, and they are true
        self._outdated: set[int] = set()  # the kernel may hold pages of these from before a write past it

    # --- opening and closing ---------------------------------------------------------------------------

    def open(self, target: Target) -> tuple[bool, int, int]:
        """Count an open; return whether it goes past us, and flags and backing id for the reply.

        ReplacedError when the kernel must look the name up again, to find a new number; nothing is counted then.
        """
        if self.is_replaced(target.nodeid, target.in_upper):
            raise ReplacedError
        way = self._ways.get(target.nodeid)
        number = self._backing(way, target)
        if number:
            return self._past_us(target, way, number)
        flags = self._cache_flags(target, way)
        if way is None:
            way = self._ways[target.nodeid] = Way()
        way.cached += 1
        return False, flags, 0

    def open_complete(self, nodeid: int) -> bool:
        """Count an open for reading of a file that the kernel holds all of; False, and nothing is done, for others."""
        if nodeid not in self._complete:
            return False
        way = self._ways.get(nodeid)
        if way is None:
            way = self._ways[nodeid] = Way()
        elif way.through:
            return False
        way.cached += 1
        return True

    def close(self, nodeid: int, through: bool) -> None:
        """Take back one open."""
        way = self._ways[nodeid]
        if through:
            way.through -= 1
        else:
            way.cached -= 1
        if not way.through and way.backing and self._backings is not None:
            self._backings.close(way.backing)
            way.backing = 0
        if not way.through and not way.cached:
            del self._ways[nodeid]
            if way.mapped:
                self._connection.forget_attributes(nodeid)

    def changes_unseen(self, nodeid: int, mode: int, size: int) -> bool:
        """Return whether attributes may change without the kernel's or our taking note.

        Stores to shared memory past us move times and blocks of the file behind, unless there is nothing to map; any
        write past us clears set-id bits there, which the kernel must see before it runs the file.
        """
        way = self._ways.get(nodeid)
        if way is None or not way.through or way.lower:
            return False
        return (way.mapped and size > 0) or _keeps_set_id(mode)

    def is_replaced(self, nodeid: int, in_upper: bool) -> bool:
        """Return whether the kernel must know a file by a new number before it can be opened: see ReplacedError."""
        way = self._ways.get(nodeid)
        return way is not None and way.lower and in_upper

    def forget(self, nodeid: int) -> None:
        """The kernel has forgotten a number, and its pages with it."""
        self._complete.discard(nodeid)
        self._outdated.discard(nodeid)

    def is_open(self, nodeid: int) -> bool:
        """Return whether anybody has it open."""
        return nodeid in self._ways

    # --- past us ---------------------------------------------------------------------------------------

    def _backing(self, way: Way | None, target: Target) -> int:
        """Return the backing id for an open, 0 for none."""
        if way is not None and way.backing:
            return way.backing
        if self._backings is None or way is not None or not self._is_worth_it(target):
            return 0
        try:
            return self._backings.open(target.fd)
        except OSError as error:
            # The layers lie where the kernel cannot do it (on an overlay), or we may not: so it will be for all.
            log.info("files are not passed through: %s", error)
            self._passes = False
            return 0

    def _is_worth_it(self, target: Target) -> bool:
        if not self._passes or _keeps_set_id(target.mode):
            return False
        if target.writes:
            return target.in_upper
        return target.size >= LARGE and (target.in_upper or self._io is Io.PASSTHROUGH)

    def _past_us(self, target: Target, way: Way | None, number: int) -> tuple[bool, int, int]:
        if way is None:
            way = self._ways[target.nodeid] = Way(lower=not target.in_upper)
        way.backing = number
        way.through += 1
        if target.maps and not way.mapped:
            way.mapped = True
            if target.size:
                self._connection.forget_attributes(target.nodeid)
        if target.writes:
            self._complete.discard(target.nodeid)
            self._outdated.add(target.nodeid)
        return True, _PASSTHROUGH, number

    # --- through the page cache ------------------------------------------------------------------------

    def _cache_flags(self, target: Target, way: Way | None) -> int:
        """Return KEEP_CACHE where the pages that the kernel holds are true; those of a small file are handed over."""
        if not self._keep_cache:
            return 0
        if target.nodeid in self._complete:
            return KEEP_CACHE
        if way is None and not target.writes and not target.direct and self._store(target):
            self._complete.add(target.nodeid)
            self._outdated.discard(target.nodeid)
            return KEEP_CACHE
        if way is None and target.nodeid in self._outdated:
            self._outdated.discard(target.nodeid)
            return 0
        return KEEP_CACHE

    def _store(self, target: Target) -> bool:
        """Give the kernel the content of a small file with the open, so that it need not ask; not if a disk must."""
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


def _keeps_set_id(mode: int) -> bool:
    """Return whether the file has bits that some writers keep, and that writes past us would drop for all."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID))
