"""How a system call is made: announced to `sysio.fault_hook` and `sysio.stall_watch`, repeated after a signal."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

# The hooks are attributes of the package, because tests and the engine assign them there.
from overlayfs import sysio

Call = TypeVar("Call", bound=Callable[..., Any])


class StallWatch(Protocol):
    """Notified when a changing call begins and ends, in any thread; `end` may block before the caller goes on."""

    def begin(self) -> None:
        """A call is about to be made."""

    def end(self) -> None:
        """The call has returned."""


def changing(call: Call, announced: str = "") -> Call:
    """Announce a changing call, and repeat it when a signal has interrupted it. The arguments are positional only."""
    name = announced or call.__name__

    @functools.wraps(call)
    def announce(*args: Any) -> Any:
        watch = sysio.stall_watch
        if watch is not None:
            watch.begin()
        try:
            while True:
                try:
                    if sysio.fault_hook is not None:
                        sysio.fault_hook(name)
                    return call(*args)
                except InterruptedError:
                    continue
        finally:
            if watch is not None:
                watch.end()

    return cast(Call, announce)


def restarted(call: Call) -> Call:
    """Repeat a call when a signal has interrupted it. The arguments are positional only.

    Local disks never report that, but a layer may be stored on FUSE or CIFS.
    """

    @functools.wraps(call)
    def restart(*args: Any) -> Any:
        while True:
            try:
                return call(*args)
            except InterruptedError:
                continue

    return cast(Call, restart)
