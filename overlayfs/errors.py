"""The exceptions of the package, and text helpers for their messages.

There are two families.  An `OSError` is used inside: it has an errno and becomes the reply to one request.  A
`UserError` is a sentence for the person who typed a command, with the exit code of the process; it is raised by the
start of a mount, by the store and by the command line.
"""

import os
from collections.abc import Iterable

_LONGEST_SHOWN, _MOST_SHOWN = 80, 10


class UserError(Exception):
    """A command that cannot be carried out; `str()` is one sentence, `exit_code` is that of the process."""

    exit_code = 1


class UsageError(UserError):
    """The command line itself is wrong: an unknown option, a missing or contradictory argument."""

    exit_code = 2


class MountError(UserError):
    """The mount cannot be made; 32 is what mount(8) documents for a mount failure."""

    exit_code = 32


def one_line(text: str) -> str:
    """Return text that is safe on a terminal: line ends, control characters, bidi marks and stray bytes are escaped.

    Sentences contain names from layers and archives.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Iterable[str], empty: str = "") -> str:
    """Return up to ten names, each cut to 80 characters, for a sentence; `empty` replaces an empty name."""
    shown = sorted(name[:_LONGEST_SHOWN] or empty for name in names)
    rest = [f"{len(shown) - _MOST_SHOWN} more"] if len(shown) > _MOST_SHOWN else []
    return ", ".join(shown[:_MOST_SHOWN] + rest) or "none"


def oserror(errno: int, path: bytes | str | None = None) -> OSError:
    """Return the `OSError` (of the fitting subclass) for an errno, as the interpreter would raise it."""
    if path is None:
        return OSError(errno, os.strerror(errno))
    return OSError(errno, os.strerror(errno), path)


class InUseError(MountError):
    """An upper or work directory is in use by another mount; `pid` is that of its daemon, or None if unknown."""

    def __init__(self, what: str, path: bytes, pid: int | None) -> None:
        self.what = what
        self.path = path
        self.pid = pid
        holder = f"pid {pid}" if pid is not None else "another process"
        super().__init__(f"{what} {os.fsdecode(path)} is in use by {holder}; unmount it first")
