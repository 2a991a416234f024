"""Errors with a meaning of their own, and the maker of `OSError`.

Two families never mix.  An `OSError` is the language inside: it carries an errno, becomes the reply to one
request, and ends nothing.  A `UserError` is a sentence for the person who typed a command, with the exit
code of the process; only the start of a mount and the command line raise it.
"""

import os
from collections.abc import Iterable

_LONGEST_SHOWN, _MOST_SHOWN = 80, 10


class UserError(Exception):
    """A request of the user that cannot be met; `str()` is one sentence, `exit_code` ends the process."""

    exit_code = 1


class UsageError(UserError):
    """The command line itself is wrong: an unknown option, a missing or contradictory argument."""

    exit_code = 2


class MountError(UserError):
    """The mount cannot be made; 32 is what mount(8) documents for a mount failure."""

    exit_code = 32


def one_line(text: str) -> str:
    """Return text as a terminal may show it: line ends, controls, marks of direction and bytes that are none escaped.

    A sentence may hold names that come from a layer or an archive.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Iterable[str], empty: str = "") -> str:
    """Return names for a sentence: no more of them, and of each, than a person reads; `empty` tells an empty one."""
    told = sorted(name[:_LONGEST_SHOWN] or empty for name in names)
    rest = [f"{len(told) - _MOST_SHOWN} more"] if len(told) > _MOST_SHOWN else []
    return ", ".join(told[:_MOST_SHOWN] + rest) or "none"


def oserror(errno: int, path: bytes | str | None = None) -> OSError:
    """Return the `OSError` (of the fitting subclass) for an errno, as the interpreter itself would raise it."""
    if path is None:
        return OSError(errno, os.strerror(errno))
    return OSError(errno, os.strerror(errno), path)


class InUseError(MountError):
    """An upper or work directory serves another mount; `pid` is its daemon's where the kernel tells it."""

    def __init__(self, what: str, path: bytes, pid: int | None) -> None:
        self.what = what
        self.path = path
        self.pid = pid
        holder = f"pid {pid}" if pid is not None else "another process"
        super().__init__(f"{what} {os.fsdecode(path)} is in use by {holder}; unmount it first")
