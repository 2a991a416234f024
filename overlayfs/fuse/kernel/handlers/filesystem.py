"""Requests about the file system and the connection as a whole: STATFS, SYNCFS, INTERRUPT and DESTROY."""

from overlayfs.fuse.kernel.protocol import LAYOUTS, Op
from overlayfs.fuse.kernel.request import Handler, Reply, Request
from overlayfs.fuse.kernel.session import Session

_INTERRUPT = LAYOUTS["interrupt_in"]


class FilesystemHandlers:
    """Handles requests that concern no single node."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._overlay = session.overlay
        self.handlers: dict[int, Handler] = {
            Op.STATFS: self.statfs,
            Op.SYNCFS: self.syncfs,
            Op.INTERRUPT: self.interrupt,
            Op.DESTROY: self.destroy,
        }

    def statfs(self, request: Request) -> Reply:
        """Answer with the capacity of the file system of the upper, or of the top layer."""
        found = self._overlay.metadata.statfs()
        body = LAYOUTS["statfs_out"].encode(
            blocks=found.f_blocks,
            bfree=found.f_bfree,
            bavail=found.f_bavail,
            files=found.f_files,
            ffree=found.f_ffree,
            bsize=found.f_bsize,
            namelen=min(found.f_namemax, self._overlay.metadata.longest_name),
            frsize=found.f_frsize,
        )
        return self._session.ok(request, body)

    def syncfs(self, request: Request) -> Reply:
        """Answer when the upper is durable."""
        self._session.in_thread(request, self._overlay.sync, lambda _: self._session.ok(request))
        return None

    def interrupt(self, request: Request) -> Reply:
        """Make a request that waits end with EINTR; one in progress ends as usual."""
        (unique,) = _INTERRUPT.unpack_from(request.body)
        scope = self._session.waiting.get(unique)
        if scope is not None:
            scope.cancel()
        return None

    def destroy(self, request: Request) -> Reply:
        """Answer only: the mount is gone."""
        return self._session.ok(request)
