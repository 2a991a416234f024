"""The facts of a mount for a bug report: what runs, what was asked for, what happened lately.

A report is posted in public, so nothing in it may name a file or quote one. Options therefore appear by type: values
that are bytes (paths, the source, SELinux contexts) are left out, and messages are reported without their arguments.
"""

import dataclasses
import enum
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from overlayfs import __version__
from overlayfs.fuse.engine import Engine
from overlayfs.mount import log
from overlayfs.mount.control_protocol import Negotiated, ReportReply
from overlayfs.mount.options import MountOptions

_PATH = re.compile(r"/\S*")
_FILE_SYSTEMS = {  # f_type of statfs(2), from include/uapi/linux/magic.h
    0x0102_1994: "tmpfs",
    0x2FC1_2FC1: "zfs",
    0x5846_5342: "xfs",
    0x0102_1997: "9p",
    0x6573_5546: "fuse",
    0x6969: "nfs",
    0x7371_7368: "squashfs",
    0x794C_7630: "overlay",
    0x8584_58F6: "ramfs",
    0x9123_683E: "btrfs",
    0xE0F5_E1E2: "erofs",
    0xEF53: "ext4",
    0xF2F5_2010: "f2fs",
}


def report(engine: Engine, options: MountOptions, uptime: float) -> ReportReply:
    """Return the facts of a mount that has been served by `engine` for `uptime` seconds."""
    upper, *lower = _types(engine)
    return ReportReply(
        version=__version__,
        python=platform.python_version(),
        kernel=os.uname().release,
        engine=engine.name,
        protocol=Negotiated(engine.protocol_minor, list(engine.features)),
        options=dict(_choices(options)),
        layers=len(lower),
        upper_type=upper,
        lower_types=dict(Counter(lower)),
        image_mount=options.image_mount is not None,
        notices=[_PATH.sub("PATH", notice) for notice in engine.overlay.notices],
        requests=dict(sorted(engine.counters.items())),
        uptime=uptime,
        log=log.recent(),
    )


def _types(engine: Engine) -> Iterator[Any]:
    """Give the type of the upper's file system, None without an upper, and of each lower layer's."""
    types = [_FILE_SYSTEMS.get(number, f"{number:#x}") for number in engine.overlay.file_system_types()]
    if engine.overlay.read_only and engine.overlay.config.upper is None:
        yield None
    yield from types


def _choices(options: MountOptions) -> Iterator[tuple[str, Any]]:
    """Give the options that are not at their defaults and name nothing."""
    for chosen in (options.stack, options):
        for field in dataclasses.fields(chosen):
            value = getattr(chosen, field.name)
            if value != field.default and _is_harmless(value):
                yield field.name, value.name if isinstance(value, enum.Enum) else value


def _is_harmless(value: object) -> bool:
    """Return whether a value names nothing: a number, a choice of words, or a map of ids."""
    if isinstance(value, tuple):
        return all(map(_is_harmless, value))
    return value is None or isinstance(value, bool | int | float | str | enum.Enum)
