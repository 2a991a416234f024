"""Files of the store for blobs on their way in and out.

    STORE/staging/{blob-HEX,push-ID}/{lock,data}

The directory is ours as long as we hold its lock; the store's gc takes one that nobody holds.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Self

from overlayfs import sysio
from overlayfs.store import layout, locks
from overlayfs.store.store_directory import StoreDirectory

DATA = b"data"
POLL = 0.2  # seconds between two looks at a file that another process works on

Wait = Callable[[float], object]
"""Called with the seconds of each pause while somebody else has the file; may raise to give up."""


class StagedBlob:
    """A blob's file in the store, ours alone until `close`; `fd` is open for reading and writing."""

    def __init__(self, place: StoreDirectory, name: bytes, wait: Wait) -> None:
        self._place = place
        self._name = name
        self._hold = self._held(wait)
        directory = place.open(layout.STAGING + b"/" + self._name)
        try:
            self.fd = sysio.open_child(directory, DATA, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            self._hold.release()
            raise
        finally:
            sysio.close(directory)

    def _held(self, wait: Wait) -> locks.HeldLock:
        while True:
            self._make()
            with contextlib.suppress(FileNotFoundError):  # gc or another pull took it away: make it again
                hold = locks.try_hold(self._place.root, layout.STAGING + b"/" + self._name, shared=False)
                if hold is not None:
                    return hold
                wait(POLL)

    def _make(self) -> None:
        """Directory and lock file, under the store's lock: gc takes a directory without a lock at once."""
        with self._place.lock_shared():
            staging = self._place.subdirectories[layout.STAGING]
            with contextlib.suppress(FileExistsError):
                sysio.mkdir_at(staging, self._name, 0o700)
            directory = sysio.open_child(staging, self._name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                sysio.close(sysio.open_child(directory, layout.LOCK, os.O_RDONLY | os.O_CREAT, 0o600))
            finally:
                sysio.close(directory)

    def discard(self) -> None:
        """Delete what is here; nobody needs it any more."""
        with self._place.lock_shared():
            self._place.move_to_trash(layout.STAGING, self._name)
        self._place.empty_trash()

    def close(self) -> None:
        """Let go of it; what is here stays for the next pull."""
        sysio.close(self.fd)
        self._hold.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def incoming(place: StoreDirectory, digest: str, wait: Wait) -> StagedBlob:
    """Hold the file for a blob that comes from a registry."""
    return StagedBlob(place, b"blob-" + digest.removeprefix("sha256:").encode(), wait)


def outgoing(place: StoreDirectory, layer_id: str, wait: Wait) -> StagedBlob:
    """Hold the file for the blob that a layer becomes."""
    return StagedBlob(place, b"push-" + layer_id.encode(), wait)
