"""Which engine serves a mount. Each is imported only when it is chosen: imports are most of the time to mount."""

import os

from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.caching_policy import caching
from overlayfs.fuse.engine import Engine
from overlayfs.mount.options import MountOptions

_OLDEST = (5, 4)  # Linux with FUSE 7.31


def build(options: MountOptions, overlay: Overlay) -> Engine:
    """Return the engine that the options ask for; `auto` is the kernel engine wherever the kernel is new enough."""
    policy = caching(options.timeout, options.writeback)
    if options.engine == "pyfuse3" or (options.engine == "auto" and _kernel() < _OLDEST):
        from overlayfs.fuse.pyfuse3_engine import Pyfuse3Engine

        return Pyfuse3Engine(overlay, policy)
    from overlayfs.fuse.kernel.engine import KernelEngine
    from overlayfs.fuse.kernel.passthrough import Io
    from overlayfs.mount.attach import attach

    # A commit of a mounted image holds exactly what was written before it: nothing may be written past us.
    io = Io.CACHED if options.io == "auto" and options.lodging is not None else Io(options.io)
    return KernelEngine(overlay, policy, attach, io, options.spin)


def _kernel() -> tuple[int, ...]:
    """Return the version of the running kernel, two numbers."""
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(filter(str.isdigit, minor)))
