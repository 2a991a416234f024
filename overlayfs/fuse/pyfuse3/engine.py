"""The engine on pyfuse3 and libfuse: runs wherever libfuse3 does, without privilege too.

What libfuse 3.14 and Linux 6.18 send, and what they hold back, is written in docs/deviations.md.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator

import pyfuse3

from overlayfs.errors import MountError
from overlayfs.fuse.engine import Engine, MountSettings
from overlayfs.fuse.pyfuse3.handlers import Handlers

TASKS = 400  # requests in progress at once: one that waits at the gate or for a slow disk occupies one task


class Pyfuse3Engine(Engine):
    """Serves an overlay through libfuse. pyfuse3 has one session per process, so there is one such engine."""

    name = "pyfuse3"

    def attach(self, mountpoint: bytes, settings: MountSettings) -> None:
        """Mount; MountError with the reason that libfuse or fusermount3 has written to standard error."""
        self._handlers = Handlers(self, settings)
        asked_for = {"POSIX_ACL": settings.acl, "WRITEBACK_CACHE": self.policy.writeback}
        self.features = tuple(name for name, wanted in asked_for.items() if wanted)
        logging.getLogger("pyfuse3").addFilter(_is_worth_logging)
        with _captured_stderr() as written:
            try:
                pyfuse3.init(self._handlers, os.fsdecode(mountpoint), _libfuse_options(settings))
            except RuntimeError as error:
                reason = _reason(written()) or str(error)
                raise MountError(f"cannot mount on {os.fsdecode(mountpoint)}: {reason}") from None

    async def serve(self, ready: Callable[[], None]) -> None:
        """Answer requests until unmounted or stopped."""
        self._handlers.ready = ready
        await pyfuse3.main(max_tasks=TASKS)

    def files_with_pages(self) -> set[int]:
        """Return the node ids of the files of which the kernel may have dirty pages."""
        return self._handlers.open_to_write()

    def drop_pages(self, nodeid: int) -> None:
        """Make the kernel write back and drop the pages of a file, and return when it has; only for a thread."""
        pyfuse3.invalidate_inode(nodeid)

    def stop(self) -> None:
        """Make `serve` return."""
        pyfuse3.terminate()

    def detach(self) -> None:
        """Unmount if still mounted (lazily, as libfuse does) and free the session."""
        pyfuse3.close(unmount=True)


def _libfuse_options(settings: MountSettings) -> set[str]:
    """Return the settings as options of libfuse, which adds nosuid and nodev unless it gets suid and dev."""
    chosen = {
        "default_permissions": True,
        "allow_other": settings.allow_other and not settings.allow_root,
        "allow_root": settings.allow_root,
        "suid": settings.suid,
        "dev": settings.dev,
        "noexec": not settings.exec,
        "ro": settings.read_only,
        "noatime": not settings.atime,
        "nodiratime": not settings.diratime,
        "sync": settings.sync,
        "dirsync": settings.dirsync,
    }
    valued = (b"fsname=" + settings.source, b"subtype=" + settings.subtype, *settings.context)
    return {name for name, wanted in chosen.items() if wanted} | {_escaped(option) for option in valued}


def _escaped(option: bytes) -> str:
    """Return an option with each byte that is special to libfuse, or not ASCII, as an octal escape for it to undo."""
    plain = set(range(0x21, 0x7F)) - set(b",\\")
    return "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in option)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Return whether to log a message of pyfuse3: not that a reply could not be sent because the mount is gone."""
    endings = tuple(f"fuse_reply_* failed with {os.strerror(code)}" for code in (errno.ENOENT, errno.ENODEV))
    return not record.getMessage().endswith(endings)


def _reason(written: bytes) -> str:
    """Return the last line that libfuse wrote, without its name in front."""
    lines = [line.strip() for line in written.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("fuse: ").removeprefix("fusermount3: ") if lines else ""


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], bytes]]:
    """Redirect descriptor 2 to memory within the context, which yields a function that returns what was written so far.

    Programs started meanwhile inherit it. Not for a process with other threads that write to descriptor 2.
    """
    memory = os.memfd_create("stderr")
    saved = os.dup(2)
    try:
        os.dup2(memory, 2)
        yield lambda: os.pread(memory, 1 << 16, 0)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(memory)
