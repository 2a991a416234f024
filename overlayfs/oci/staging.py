"""Files of the store for blobs that are being downloaded or uploaded.

    STORE/staging/{blob-HEX,push-ID}/{lock,data}

The holder of the lock owns the directory. The store's garbage collection removes directories whose lock is free.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Self

from overlayfs import sysio
from overlayfs.store import layout, locks
from overlayfs.store.store_directory import StoreDirectory

DATA = b"data"
POLL = 0.2  # seconds between two attempts to lock a file that another process works on

Wait = Callable[[float], object]
"""`wait(seconds)` sleeps while another process has the file; it may raise to give up."""


class StagedBlob:
    """The file for one blob, locked exclusively until `close`; `fd` is open for reading and writing."""

    def __init__(self, directory: StoreDirectory, name: bytes, wait: Wait) -> None:
        self._store = directory
        self._name = name
        self._held = self._lock(wait)
        staged = directory.open(layout.STAGING + b"/" + self._name)
        try:
            self.fd = sysio.open_child(staged, DATA, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            self._held.release()
            raise
        finally:
            sysio.close(staged)

    def _lock(self, wait: Wait) -> locks.HeldLock:
        while True:
            self._make()
            with contextlib.suppress(FileNotFoundError):  # removed by gc or by another pull: make it again
                hold = locks.try_hold(self._store.root, layout.STAGING + b"/" + self._name, shared=False)
                if hold is not None:
                    return hold
                wait(POLL)

    def _make(self) -> None:
        """Create the directory and its lock file under the store's lock: gc removes a directory without one at once."""
        with self._store.lock_shared():
            staging = self._store.subdirectories[layout.STAGING]
            with contextlib.suppress(FileExistsError):
                sysio.mkdir_at(staging, self._name, 0o700)
            directory = sysio.open_child(staging, self._name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                sysio.close(sysio.open_child(directory, layout.LOCK, os.O_RDONLY | os.O_CREAT, 0o600))
            finally:
                sysio.close(directory)

    def discard(self) -> None:
        """Delete the file: it is not needed any more."""
        with self._store.lock_shared():
            self._store.move_to_trash(layout.STAGING, self._name)
        self._store.empty_trash()

    def close(self) -> None:
        """Release the lock; a file that was not discarded stays for the next pull."""
        sysio.close(self.fd)
        self._held.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def incoming(directory: StoreDirectory, digest: str, wait: Wait) -> StagedBlob:
    """Lock and return the file for a blob that is downloaded, by its digest."""
    return StagedBlob(directory, b"blob-" + digest.removeprefix("sha256:").encode(), wait)


def outgoing(directory: StoreDirectory, layer_id: str, wait: Wait) -> StagedBlob:
    """Lock and return the file for the blob that a layer is compressed to."""
    return StagedBlob(directory, b"push-" + layer_id.encode(), wait)
