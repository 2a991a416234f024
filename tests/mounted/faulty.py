"""A mount in the foreground whose verbs fail on demand: while the file FAULT contains `verb error`, that verb fails.

With `verb delay` the verb is slow instead.

Run as `python -m tests.mounted.faulty FAULT OPTIONS MOUNTPOINT`.
"""

import errno
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overlayfs.fs.copyup import CopyUp
from overlayfs.fs.dir_offsets import DirOffsets
from overlayfs.fs.files import Files
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.metadata import Metadata
from overlayfs.fs.names import Names
from overlayfs.fs.nodes import NodeTable
from overlayfs.fs.overlay import Overlay
from overlayfs.fs.requirements import VerbRequirements
from overlayfs.fs.space import Space
from tests.support import foreground

# The classes that engines call, each with a prefix for names that are in two of them
GROUPS: dict[type, str] = {
    **dict.fromkeys((Overlay, Lookup, Files, Space, Names, Metadata, CopyUp), ""),
    VerbRequirements: "requirements.",
    DirOffsets: "dir_offsets.",
}

ERRORS: dict[str, Callable[[], Exception]] = {
    "EDQUOT": lambda: OSError(errno.EDQUOT, "disk quota"),
    "ENOSYS": lambda: OSError(errno.ENOSYS, "not implemented"),
    "NONE": lambda: OSError("no number"),
    "MemoryError": MemoryError,
    "KeyError": lambda: KeyError(1),
    "RecursionError": RecursionError,
}


def main(fault: str, options: str, mountpoint: str) -> int:
    """Mount until the end of the mount."""
    verbs = [(owner, name) for owner in GROUPS for name in _verbs(owner)]
    for owner, name in (*verbs, (NodeTable, "forget"), (NodeTable, "remember")):
        setattr(owner, name, _failing(getattr(owner, name), GROUPS.get(owner, "") + name, Path(fault)))
    return foreground.mount(options, mountpoint)


def _verbs(owner: type) -> list[str]:
    apart = {"close", "sync"}
    return [name for name, value in vars(owner).items() if name[0] != "_" and callable(value) and name not in apart]


def _failing(verb: Callable[..., Any], name: str, fault: Path) -> Callable[..., Any]:
    @functools.wraps(verb)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        if fault.exists():
            wanted, error = fault.read_text().split()
            if wanted == name and error == "delay":
                time.sleep(0.3)
            elif wanted == name:
                raise ERRORS[error]()
        return verb(*args, **keywords)

    return wrapped


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
