"""What both engines have in common.

An engine owns the connection to the kernel of one mount. It turns each request into a few calls of an `Overlay` and the
result into a reply, and counts requests by kind. No request ends it, whatever the request does wrong.
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
"""The inode number of an entry that cannot be looked up (FUSE_UNKNOWN_INO of libfuse); 0 would hide the name."""


@dataclass(frozen=True)
class MountSettings:
    """The mount options that the kernel applies.

    `source` is the first column of /proc/mounts, `subtype` what follows "fuse." in the third; `context` are SELinux
    options as `name=value`. Without `acl` the mount has no POSIX ACLs, without `xattrs` no extended attributes
    (EOPNOTSUPP).
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
    """Serves one overlay at one mount point. Its methods run on the event loop, unless they say otherwise."""

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
        """Mount, before the loop runs; MountError with the reason."""

    @abstractmethod
    async def serve(self, ready: Callable[[], None]) -> None:
        """Answer requests until the mount is gone or `stop` is called; `ready` is called after the handshake.

        Raises whatever else ended the connection; the mount is then still there, and its requests are not answered.
        """

    @abstractmethod
    def files_with_pages(self) -> set[int]:
        """Return the node ids of the files of which the kernel may have dirty pages.

        Those are the files open for writing: closing writes pages back, and a mapped file counts as open.
        """

    @abstractmethod
    def drop_pages(self, nodeid: int) -> None:
        """Make the kernel write back and drop the pages of a file, and return when it has; OSError for an unknown file.

        Only for a thread: the call waits for READ and WRITE requests that the loop answers, and until then nothing, not
        even SIGKILL, ends the process.
        """

    def nodes_written_in_passthrough(self) -> set[Node]:
        """Return the nodes in the upper that clients may write in passthrough; with any, a live commit refuses."""
        return set()

    @abstractmethod
    def stop(self) -> None:
        """Make `serve` return once the requests in progress are answered."""

    @abstractmethod
    def detach(self) -> None:
        """Unmount if still mounted and close the connection, after the loop."""


def reply_errno(error: Exception, kind: str) -> int:
    """Return the errno for the reply to a request of `kind` that raised `error`.

    Never ENOSYS: the kernel would not send that kind of request again for the life of the mount. An exception that is
    not an OSError with an errno is a defect: it is logged with its traceback, and the mount continues.
    """
    if isinstance(error, OSError) and error.errno:
        return errno.EOPNOTSUPP if error.errno == errno.ENOSYS else error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    log.error("request %s failed by a defect", kind, exc_info=error)
    return errno.EIO
