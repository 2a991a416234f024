"""A mount in the foreground whose engine has one planted fault: the checks for it must fail.

Run as `python -m tests.mounted.wrong FAULT OPTIONS MOUNTPOINT`.
"""

import contextlib
import errno
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.fs.files import Files
from overlayfs.fs.metadata import Metadata
from overlayfs.fs.names import Names
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.kernel import passthrough
from overlayfs.fuse.kernel.connection import Connection
from overlayfs.fuse.kernel.handlers import files
from overlayfs.fuse.kernel.protocol import LAYOUTS, Notify
from tests.support import foreground

_FileHandlers, _OpenFiles = files.FileHandlers, passthrough.OpenFiles


def _backing_file_is_kept_across_copy_up() -> None:
    """Readers of layers read in passthrough, and opens after copy-up join them."""
    worth = _OpenFiles._is_worth_it

    def is_worth_it(self: passthrough.OpenFiles, target: passthrough.Target) -> bool:
        return worth(self, target._replace(in_upper=True))

    _replace(_OpenFiles, "_is_worth_it", is_worth_it)
    _joins_readers_of_layers()


def _joins_readers_of_layers() -> None:
    _replace(_OpenFiles, "is_stale", lambda *_: False)
    _replace(_FileHandlers, "_is_stale", lambda *_: False)


def _cached_and_passthrough_at_once() -> None:
    """Each open is decided separately."""
    backing_id = _OpenFiles._backing_id

    def decide(self: passthrough.OpenFiles, mode: passthrough.IoMode | None, target: passthrough.Target) -> int:
        return backing_id(self, mode if mode is not None and mode.backing_id else None, target)

    _replace(_OpenFiles, "_backing_id", decide)


def _a_backing_file_for_each_open() -> None:
    backing_id = _OpenFiles._backing_id
    _replace(_OpenFiles, "_backing_id", lambda self, mode, target: backing_id(self, None, target))


def _pages_survive_writes_in_passthrough() -> None:
    opens = _OpenFiles.open

    def keep(self: passthrough.OpenFiles, target: passthrough.Target) -> tuple[int, int]:
        complete = target.nodeid in self._complete
        flags, backing_id = opens(self, target)
        if backing_id:
            if complete:
                self._complete.add(target.nodeid)
            self._outdated.discard(target.nodeid)
            flags |= passthrough.KEEP_CACHE
        return flags, backing_id

    _replace(_OpenFiles, "open", keep)


def _set_id_bits_stay() -> None:
    """They are never cleared, though the handshake promised it."""
    _replace(Metadata, "strip_set_id", lambda *_: None)
    change = Overlay.set_attributes
    _replace(
        Overlay,
        "set_attributes",
        lambda self, node, changes: change(self, node, changes._replace(strip=False)),
    )
    opens = Files.open
    _replace(Files, "open", lambda self, node, flags, strip=False: opens(self, node, flags))


def _the_capability_is_kept() -> None:
    _replace(sysio, "WithoutCapability", lambda _: contextlib.nullcontext())


def _attributes_are_cached() -> None:
    """Also those that change without a request."""
    _replace(_OpenFiles, "changes_unseen", lambda *_: False)


def _stale_every_time() -> None:
    _replace(_FileHandlers, "_stale_error", lambda *_: oserror(errno.ESTALE))


def _entries_are_dropped_from_the_loop() -> None:
    """The loop notifies the kernel of each removed name, and must also answer the request that holds its lock."""
    unlink = Names.unlink

    def unlink_and_notify(self: Names, parent: Any, name: bytes) -> None:
        unlink(self, parent, name)
        header = LAYOUTS["inval_entry"].pack(parent.number, len(name), 0)
        CONNECTIONS[0]._notify(Notify.INVAL_ENTRY, header, name + b"\0")

    _replace(Names, "unlink", unlink_and_notify)
    begin = Connection.__init__

    def note(self: Connection, fd: int) -> None:
        begin(self, fd)
        CONNECTIONS.append(self)

    _replace(Connection, "__init__", note)


CONNECTIONS: list[Connection] = []

FAULTS: dict[str, Callable[[], None]] = {
    name.removeprefix("_"): act
    for name, act in list(globals().items())
    if callable(act) and name[0] == "_" and getattr(act, "__module__", "") == __name__
}


def _replace(owner: type | ModuleType, name: str, value: Any) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: this fault has no effect any more"
    setattr(owner, name, value)


def main(fault: str, options: str, mountpoint: str) -> int:
    """Mount until the end of the mount."""
    FAULTS[fault]()
    return foreground.mount(f"{options},engine=kernel", mountpoint)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
