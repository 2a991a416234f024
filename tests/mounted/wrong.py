"""A mount in the foreground whose engine is wrong in one chosen way: tests of it must fail.

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
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.kernel import passthrough
from overlayfs.fuse.kernel.connection import Connection
from overlayfs.fuse.kernel.handlers import files
from overlayfs.fuse.kernel.protocol import LAYOUTS, Notify
from tests.support import foreground

_Files, _OpenFiles = files.FileHandlers, passthrough.OpenFiles


def _backing_is_kept_across_copy_up() -> None:
    """Readers of layers go past us, and whoever comes after copy-up joins them."""
    worth = _OpenFiles._is_worth_it

    def is_worth_it(self: passthrough.OpenFiles, target: passthrough.Target) -> bool:
        return worth(self, target._replace(in_upper=True))

    _replace(_OpenFiles, "_is_worth_it", is_worth_it)
    _joins_readers_of_layers()


def _joins_readers_of_layers() -> None:
    _replace(_OpenFiles, "is_replaced", lambda *_: False)
    _replace(_Files, "_must_be_found_anew", lambda *_: False)


def _cached_and_passed_through_at_once() -> None:
    """Each open is decided for itself."""
    backing = _OpenFiles._backing

    def decide(self: passthrough.OpenFiles, way: passthrough.IoMode | None, target: passthrough.Target) -> int:
        return backing(self, way if way is not None and way.backing else None, target)

    _replace(_OpenFiles, "_backing", decide)


def _a_backing_for_each_open() -> None:
    backing = _OpenFiles._backing
    _replace(_OpenFiles, "_backing", lambda self, way, target: backing(self, None, target))


def _pages_survive_writes_past_us() -> None:
    give_backing = _OpenFiles._passthrough

    def keep(self: passthrough.OpenFiles, target: passthrough.Target, *rest: Any) -> Any:
        complete = target.nodeid in self._complete
        found = give_backing(self, target, *rest)
        if complete:
            self._complete.add(target.nodeid)
        self._outdated.discard(target.nodeid)
        through, flags, number = found
        return through, flags | passthrough.KEEP_CACHE, number

    _replace(_OpenFiles, "_passthrough", keep)


def _set_id_bits_stay() -> None:
    """Nobody drops them, though the kernel was told that we do."""
    _replace(Overlay, "strip_set_id", lambda *_: None)
    change = Overlay.set_attributes
    _replace(
        Overlay,
        "set_attributes",
        lambda self, node, changes, *rest: change(self, node, changes._replace(strip=False), *rest),
    )
    opens = Overlay.open
    _replace(Overlay, "open", lambda self, node, flags, caller, strip=None: opens(self, node, flags, caller, False))


def _the_capability_is_kept() -> None:
    _replace(sysio, "WithoutCapability", lambda _: contextlib.nullcontext())


def _attributes_are_remembered() -> None:
    """Also those that change past us."""
    _replace(_OpenFiles, "changes_unseen", lambda *_: False)


def _stale_every_time() -> None:
    _replace(_Files, "_stale", lambda *_: oserror(errno.ESTALE))


def _entries_are_dropped_from_the_loop() -> None:
    """Each removed name is told to the kernel, by the thread that is to answer the request that holds its lock."""
    unlink = Overlay.unlink

    def tell(self: Overlay, parent: Any, name: bytes) -> None:
        unlink(self, parent, name)
        header = LAYOUTS["inval_entry"].pack(parent.number, len(name), 0)
        CONNECTIONS[0]._notify(Notify.INVAL_ENTRY, header, name + b"\0")

    _replace(Overlay, "unlink", tell)
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
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: this fault does nothing any more"
    setattr(owner, name, value)


def main(fault: str, options: str, mountpoint: str) -> int:
    """Mount until the end of the mount."""
    FAULTS[fault]()
    return foreground.mount(f"{options},engine=kernel", mountpoint)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
