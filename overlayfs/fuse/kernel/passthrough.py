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
from overlayfs.fuse.kernel.connection import BackingFiles, Connection
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
class IoMode:
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


class OpenFiles:
    """All open files of one mount, by the number that the kernel knows."""

    def __init__(self, connection: Connection, backing_files: BackingFiles | None, io: Io, keep_cache: bool) -> None:
        self._connection = connection
        self._backing_files = backing_files
        self._passes = backing_files is not None and io is not Io.CACHED
        self._io = io
        self._keep_cache = keep_cache
        self._modes: dict[int, IoMode] = {}
        self._complete: set[int] = set()  # the kernel holds all pages of these, and they are true
        self._outdated: set[int] = set()  # the kernel may hold pages of these from before a write past it

    # --- opening and closing ---------------------------------------------------------------------------

    def open(self, target: Target) -> tuple[bool, int, int]:
        """Count an open; return whether it goes past us, and flags and backing id for the reply.

        ReplacedError when the kernel must look the name up again, to find a new number; nothing is counted then.
        """
        if self.is_replaced(target.nodeid, target.in_upper):
            raise ReplacedError
        mode_of_io = self._modes.get(target.nodeid)
        number = self._backing(mode_of_io, target)
        if number:
            return self._passthrough(target, mode_of_io, number)
        flags = self._cache_flags(target, mode_of_io)
        if mode_of_io is None:
            mode_of_io = self._modes[target.nodeid] = IoMode()
        mode_of_io.cached += 1
        return False, flags, 0

    def open_complete(self, nodeid: int) -> bool:
        """Count an open for reading of a file that the kernel holds all of; False, and nothing is done, for others."""
        if nodeid not in self._complete:
            return False
        mode_of_io = self._modes.get(nodeid)
        if mode_of_io is None:
            mode_of_io = self._modes[nodeid] = IoMode()
        elif mode_of_io.through:
            return False
        mode_of_io.cached += 1
        return True

    def close(self, nodeid: int, through: bool) -> None:
        """Take back one open."""
        mode_of_io = self._modes[nodeid]
        if through:
            mode_of_io.through -= 1
        else:
            mode_of_io.cached -= 1
        if not mode_of_io.through and mode_of_io.backing and self._backing_files is not None:
            self._backing_files.close(mode_of_io.backing)
            mode_of_io.backing = 0
        if not mode_of_io.through and not mode_of_io.cached:
            del self._modes[nodeid]
            if mode_of_io.mapped:
                self._connection.forget_attributes(nodeid)

    def changes_unseen(self, nodeid: int, mode: int, size: int) -> bool:
        """Return whether attributes may change without the kernel's or our taking note.

        Stores to shared memory past us move times and blocks of the file behind, unless there is nothing to map; any
        write past us clears set-id bits there, which the kernel must see before it runs the file.
        """
        mode_of_io = self._modes.get(nodeid)
        if mode_of_io is None or not mode_of_io.through or mode_of_io.lower:
            return False
        return (mode_of_io.mapped and size > 0) or _keeps_set_id(mode)

    def is_replaced(self, nodeid: int, in_upper: bool) -> bool:
        """Return whether the kernel must know a file by a new number before it can be opened: see ReplacedError."""
        mode_of_io = self._modes.get(nodeid)
        return mode_of_io is not None and mode_of_io.lower and in_upper

    def forget(self, nodeid: int) -> None:
        """The kernel has forgotten a number, and its pages with it."""
        self._complete.discard(nodeid)
        self._outdated.discard(nodeid)

    def is_open(self, nodeid: int) -> bool:
        """Return whether anybody has it open."""
        return nodeid in self._modes

    # --- past us ---------------------------------------------------------------------------------------

    def _backing(self, mode_of_io: IoMode | None, target: Target) -> int:
        """Return the backing id for an open, 0 for none."""
        if mode_of_io is not None and mode_of_io.backing:
            return mode_of_io.backing
        if self._backing_files is None or mode_of_io is not None or not self._is_worth_it(target):
            return 0
        try:
            return self._backing_files.open(target.fd)
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

    def _passthrough(self, target: Target, mode_of_io: IoMode | None, number: int) -> tuple[bool, int, int]:
        if mode_of_io is None:
            mode_of_io = self._modes[target.nodeid] = IoMode(lower=not target.in_upper)
        mode_of_io.backing = number
        mode_of_io.through += 1
        if target.maps and not mode_of_io.mapped:
            mode_of_io.mapped = True
            if target.size:
                self._connection.forget_attributes(target.nodeid)
        if target.writes:
            self._complete.discard(target.nodeid)
            self._outdated.add(target.nodeid)
        return True, _PASSTHROUGH, number

    # --- through the page cache ------------------------------------------------------------------------

    def _cache_flags(self, target: Target, mode_of_io: IoMode | None) -> int:
        """Return KEEP_CACHE where the pages that the kernel holds are true; those of a small file are handed over."""
        if not self._keep_cache:
            return 0
        if target.nodeid in self._complete:
            return KEEP_CACHE
        if mode_of_io is None and not target.writes and not target.direct and self._store(target):
            self._complete.add(target.nodeid)
            self._outdated.discard(target.nodeid)
            return KEEP_CACHE
        if mode_of_io is None and target.nodeid in self._outdated:
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
