"""A bounded cache of directory descriptors.

Every access to a layer starts at the descriptor of a directory. Opening one costs an openat2 of the whole path;
keeping all of them open costs descriptors (containers/fuse-overlayfs#210). So the most recently used stay open.
A returned descriptor is borrowed: it is valid until `SPARE` others have been requested.
"""

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable

from overlayfs import sysio
from overlayfs.errors import oserror

SPARE = 32

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)
_Key = tuple[int, bytes]  # (the layer's root descriptor, path below it)


def default_capacity() -> int:
    """Return how many directory descriptors may stay open: a quarter of RLIMIT_NOFILE, 4096 at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(SPARE, min(soft // 4 if soft != resource.RLIM_INFINITY else 4096, 4096))


class DirFds:
    """The open directories of all layers of one overlay, least recently used first.

    mounted: the errno for a path on which something is mounted, or that leads across a mount. In a layer of an overlay
    it must not be EXDEV, with which a rename asks its caller to copy.
    """

    def __init__(self, capacity: int, mounted: int = errno.EREMOTE) -> None:
        self._capacity = capacity
        self._mounted = mounted
        self._open: OrderedDict[_Key, int] = OrderedDict()
        self._kept = False

    def get(self, root: int, path: bytes) -> int:
        """Return a borrowed O_PATH descriptor of the directory `path` below `root`; OSError as open_beneath,
        but `mounted` for EXDEV.
        """
        if not path:
            return root
        key = (root, path)
        fd = self._open.get(key)
        if fd is None:
            try:
                fd = self._open_directory(root, path)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise oserror(self._mounted, path) from error
                if error.errno not in _EXHAUSTED:
                    raise
                fd = self.retry(lambda: self._open_directory(root, path))
            self._open[key] = fd
            if len(self._open) > self._capacity:
                self._shrink()
        else:
            self._open.move_to_end(key)
        return fd

    def open_child(self, dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
        """Return what `sysio.open_child` returns; when descriptors have run out, close half of the cache and retry."""
        try:
            return sysio.open_child(dirfd, name, flags, mode)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
        return self.retry(lambda: sysio.open_child(dirfd, name, flags, mode))

    def retry(self, opener: Callable[[], int]) -> int:
        """Return the result of `opener`; if descriptors have run out, close half of the cache and call it again."""
        try:
            return opener()
        except OSError as error:
            if error.errno not in _EXHAUSTED or len(self._open) <= SPARE or self._kept:
                raise
        for _ in range(len(self._open) // 2):
            self._close_oldest()
        return opener()

    def keep_open(self, kept: bool) -> None:
        """While `kept`, close nothing: descriptors may be borrowed for a long time."""
        self._kept = kept
        self._shrink()

    def _shrink(self) -> None:
        while len(self._open) > self._capacity and not self._kept:
            self._close_oldest()

    def forget(self, root: int, path: bytes) -> None:
        """Close one directory if it is open."""
        fd = self._open.pop((root, path), None)
        if fd is not None:
            sysio.close(fd)

    def forget_below(self, root: int, path: bytes) -> None:
        """Close the directories at or below `path`, which has moved or is removed."""
        below = path + b"/"
        for key in [key for key in self._open if key[0] == root and (key[1] == path or key[1].startswith(below))]:
            sysio.close(self._open.pop(key))

    def forget_root(self, root: int) -> None:
        """Close all directories of one layer."""
        for key in [key for key in self._open if key[0] == root]:
            sysio.close(self._open.pop(key))

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._close_oldest()

    def _open_directory(self, root: int, path: bytes) -> int:
        """Open a directory from its parent if that is open; opening by path would cost the depth at every step."""
        above, _, name = path.rpartition(b"/")
        known = self._open.get((root, above)) if above else root
        if known is None:
            return sysio.open_beneath(root, path, _DIRECTORY)
        return sysio.open_child(known, name, _DIRECTORY)

    def _close_oldest(self) -> None:
        sysio.close(self._open.popitem(last=False)[1])
