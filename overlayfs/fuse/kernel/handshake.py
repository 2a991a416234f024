"""The handshake (FUSE_INIT): which of the features that the kernel offers are used. Pure.

docs/engine.md has a table of the requests that each feature saves. Two rules are the kernel's: the writeback cache and
passthrough exclude each other, and a feature that is not offered must not be asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from overlayfs.fuse.kernel.protocol import LAYOUTS, MAJOR, MINOR, OLDEST_MINOR, Init, split_flags

MAX_WRITE = 1 << 20  # bytes of data in one request; the kernel's default limit for max_pages is the same megabyte
PAGES = 256
BACKGROUND = 64  # asynchronous requests at once: read-ahead and direct I/O
CONGESTED = 48
STACK_DEPTH = 1  # layers may be on any file system but an overlay, and the mount may be a layer of a kernel overlayfs

_ALWAYS = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.BIG_WRITES
    | Init.DO_READDIRPLUS
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.NO_OPENDIR_SUPPORT
    | Init.HANDLE_KILLPRIV_V2
    | Init.SETXATTR_EXT
    | Init.INIT_EXT
)


class TooOldError(Exception):
    """The kernel offers an older version of the protocol than this engine supports."""


@dataclass(frozen=True)
class Wishes:
    """What the mount asks for, as far as the kernel offers it.

    trusting: the layers do not change from outside, so cached pages stay valid. read_only: nothing changes at all.
    """

    acl: bool = True
    writeback: bool = False
    passthrough: bool = False
    trusting: bool = True
    read_only: bool = False


@dataclass(frozen=True)
class Agreement:
    """The result: version, features, and the body of the reply to INIT."""

    minor: int
    features: Init
    reply: bytes


def agree(offer: Mapping[str, int], wishes: Wishes) -> Agreement:
    """Return the agreement for an INIT request; TooOldError for a kernel before 5.4."""
    if offer["major"] != MAJOR or offer["minor"] < OLDEST_MINOR:
        raise TooOldError(f"FUSE {offer['major']}.{offer['minor']}")
    offered = Init(offer["flags"])
    if offered & Init.INIT_EXT:
        offered |= Init(offer["flags2"] << 32)
    features = _wanted(wishes) & offered
    minor = min(offer["minor"], MINOR)
    return Agreement(minor, features, _reply(minor, offer["max_readahead"], features))


def _wanted(wishes: Wishes) -> Init:
    wanted = _ALWAYS
    if wishes.acl:
        wanted |= Init.POSIX_ACL | Init.DONT_MASK
    if not wishes.trusting:
        wanted |= Init.AUTO_INVAL_DATA
    if wishes.read_only:
        return wanted | Init.NO_OPEN_SUPPORT
    if wishes.writeback:
        return wanted | Init.WRITEBACK_CACHE
    return wanted | Init.PASSTHROUGH if wishes.passthrough else wanted


def _reply(minor: int, max_readahead: int, features: Init) -> bytes:
    flags, flags2 = split_flags(features)
    return LAYOUTS["init_out"].encode(
        major=MAJOR,
        minor=minor,
        max_readahead=min(max_readahead, MAX_WRITE),
        flags=flags,
        flags2=flags2,
        max_background=BACKGROUND,
        congestion_threshold=CONGESTED,
        max_write=MAX_WRITE,
        time_gran=1,
        max_pages=PAGES,
        max_stack_depth=STACK_DEPTH if features & Init.PASSTHROUGH else 0,
    )
