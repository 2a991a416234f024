"""What an engine is.

An engine owns the connection to the kernel for one mount. It turns each request into at most a few calls
of an `Overlay` and the result into a reply, counts requests by kind, and never lets a request end it.
Everything here is shared by engines; what speaks a particular protocol is in a file of its own.
"""

import errno
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.caching_policy import CachingPolicy
from overlayfs.fuse.copyup import CopyUpRunner
from overlayfs.fuse.gate import Gate
from overlayfs.fuse.locks import KeyedLocks
from overlayfs.fuse.threads import Threads

log = logging.getLogger(__name__)


UNKNOWN_NUMBER = 0xFFFF_FFFF
"""The inode number in a listing of what cannot be looked at, as FUSE_UNKNOWN_INO of libfuse; 0 would hide the name."""


@dataclass(frozen=True)
class MountSettings:
    """How the mount shall look to the kernel.

    `source` is the first column of /proc/mounts, `subtype` what follows "fuse." in the third; `context` are SELinux
    options as `name=value`. Without `acl` the kernel knows no POSIX ACLs here; without `xattrs` every request
    about extended attributes is answered EOPNOTSUPP.
    """

    source: bytes = b"overlayfs"
    subtype: bytes = b"overlayfs"
    allow_other: bool = False
    allow_root: bool = False
    suid: bool = False
    dev: bool = False
    exec: bool = True
    read_only: bool = False
    atime: bool = True
    diratime: bool = True
    sync: bool = False
    dirsync: bool = False
    context: tuple[bytes, ...] = ()
    acl: bool = True
    xattrs: bool = True


class Engine(ABC):
    """Serves one overlay at one mount point. Its methods run on the loop, unless they say otherwise."""

    name: ClassVar[str]
    protocol_minor: int | None = None  # N of the FUSE protocol 7.N that was negotiated; None where libfuse keeps it
    features: tuple[str, ...] = ()  # the flags of FUSE_INIT that are in effect, as far as they are known

    def __init__(self, overlay: Overlay, policy: CachingPolicy) -> None:
        self.overlay = overlay
        self.policy = policy
        self.counters: Counter[str] = Counter()
        self.gate = Gate()
        self.locks = KeyedLocks()
        self.threads = Threads()
        self.copyup_runner = CopyUpRunner(overlay, self.locks, self.threads, self.gate)

    @abstractmethod
    def attach(self, mountpoint: bytes, settings: MountSettings) -> None:
        """Mount; before the loop runs. Raises MountError with the reason."""

    @abstractmethod
    async def serve(self, ready: Callable[[], None]) -> None:
        """Answer requests until the mount is gone or `stop` is called; `ready` is called at the handshake.

        Raises what ended the connection otherwise; the mount is then still there, without answers.
        """

    @abstractmethod
    def files_with_pages(self) -> set[int]:
        """Return the numbers, as the kernel has them, of the files of which it may hold dirty pages.

        Those are open for writing: closing writes out, and what is mapped counts as open.
        """

    @abstractmethod
    def drop_pages(self, number: int) -> None:
        """Have the kernel write out and drop the pages of a file, and return when it has; OSError if it knows none.

        For a thread, since it waits for pages that the loop is to fill or to take. Until then nothing ends the process.
        """

    def nodes_written_in_passthrough(self) -> set[Node]:
        """Return the nodes whose files in the upper clients may write without our seeing it: a commit refuses then."""
        return set()

    @abstractmethod
    def stop(self) -> None:
        """Make `serve` return once the running requests are answered."""

    @abstractmethod
    def detach(self) -> None:
        """Unmount if still mounted and free the connection; after the loop."""


def reply_errno(error: Exception, kind: str) -> int:
    """Return the errno that answers a request of `kind` which ended with `error`.

    ENOSYS never leaves here: the kernel would not send that kind of request again for the life of the
    mount. An error that is none of ours to expect is a defect: it is logged, and the mount lives on.
    """
    if isinstance(error, OSError) and error.errno:
        return errno.EOPNOTSUPP if error.errno == errno.ENOSYS else error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    log.error("request %s failed by a defect", kind, exc_info=error)
    return errno.EIO
