"""What a load does, step by step: each is one change, or one call that makes changes durable.

A step is performed on a mount and on a reference, a plain directory that shows what the mount should hold.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import syscalls

AT_FDCWD = -100


@dataclass(frozen=True)
class Step:
    """One call: `verb` on `path`, relative to the load's directory; `other` is a second path.

    at, size: bytes, or permission bits for chmod; tag: the byte that is written, or the value of an attribute.
    """

    verb: str
    path: str
    other: str = ""
    at: int = 0
    size: int = 0
    tag: int = 0

    def __str__(self) -> str:
        words = [self.verb, self.path or "/", self.other, f"{self.at}+{self.size}" if self.at or self.size else ""]
        return " ".join(filter(None, words))


Held = dict[str, int]
"""Descriptors that a load keeps open, by path."""


def perform(base: Path, step: Step, held: Held) -> None:
    """Do one step below `base`."""
    _VERBS[step.verb](base, step, held)


def close_all(held: Held) -> None:
    """Close what a load has kept open."""
    while held:
        _, fd = held.popitem()
        os.close(fd)


def _opened(flags: int, act: Callable[[int, Step], object]) -> Callable[[Path, Step, Held], None]:
    def perform(base: Path, step: Step, _held: Held) -> None:
        fd = os.open(base / step.path, flags, 0o640)
        try:
            act(fd, step)
        finally:
            os.close(fd)

    return perform


def _named(act: Callable[[Path, Step], object]) -> Callable[[Path, Step, Held], None]:
    return lambda base, step, _held: (act(base / step.path, step), None)[1]


def _paired(act: Callable[[Path, Path], object]) -> Callable[[Path, Step, Held], None]:
    return lambda base, step, _held: (act(base / step.path, base / step.other), None)[1]


def _pwrite(fd: int, step: Step) -> None:
    os.pwrite(fd, bytes([step.tag]) * step.size, step.at)


def _append(fd: int, step: Step) -> None:
    os.write(fd, bytes([step.tag]) * step.size)


def _exchange(old: Path, new: Path) -> None:
    syscalls.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), syscalls.EXCHANGE)


def _hold(base: Path, step: Step, held: Held) -> None:
    held[step.path] = os.open(base / step.path, os.O_RDONLY)


def _fsync_held(_base: Path, step: Step, held: Held) -> None:
    os.fsync(held[step.path])


def _punch(fd: int, step: Step) -> None:
    syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, step.at, step.size)


def _unset(path: Path, _step: Step) -> None:
    with suppress(OSError):
        os.removexattr(path, "user.mark")


def _nothing(_base: Path, _step: Step, _held: Held) -> None:
    """The process that runs the load syncs the whole disk."""


_VERBS: dict[str, Callable[[Path, Step, Held], None]] = {
    "create": _opened(os.O_CREAT | os.O_EXCL | os.O_RDWR, lambda fd, step: None),
    "write": _opened(os.O_WRONLY, _pwrite),
    "append": _opened(os.O_WRONLY | os.O_APPEND, _append),
    "cut": _opened(os.O_WRONLY | os.O_TRUNC, lambda fd, step: None),
    "punch": _opened(os.O_RDWR, _punch),
    "truncate": _named(lambda path, step: os.truncate(path, step.size)),
    "chmod": _named(lambda path, step: os.chmod(path, step.size)),
    "setxattr": _named(lambda path, step: os.setxattr(path, "user.mark", bytes([step.tag]) * 10)),
    "unsetxattr": _named(_unset),
    "mkdir": _named(lambda path, step: os.mkdir(path, 0o750)),
    "symlink": _named(lambda path, step: os.symlink(f"to {step.tag}", path)),
    "unlink": _named(lambda path, step: os.unlink(path)),
    "rmdir": _named(lambda path, step: os.rmdir(path)),
    "rename": _paired(os.rename),
    "exchange": _paired(_exchange),
    "link": _paired(os.link),
    "hold": _hold,
    "fsync-held": _fsync_held,
    "fsync": _opened(os.O_RDONLY, lambda fd, step: os.fsync(fd)),
    "fsync-writer": _opened(os.O_RDWR, lambda fd, step: os.fsync(fd)),
    "fdatasync": _opened(os.O_RDWR, lambda fd, step: os.fdatasync(fd)),
    "fsync-dir": _opened(os.O_RDONLY | os.O_DIRECTORY, lambda fd, step: os.fsync(fd)),
    "sync": _nothing,
}
