"""Permission checks: each is one act of one user on its own object, on plain ext4 and on a mount."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.support.acl import ACCESS, acl
from tests.support.spec import Dir, File, Short
from tests.support.users import ALICE, BOB, ROOT, User, run_as

OWNER, OTHER = ALICE, BOB
USERS: Mapping[str, User] = {"root": ROOT, "owner": OWNER, "other": OTHER}
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
_MODES = (0o000, 0o400, 0o644, 0o660, 0o666, 0o777)
_DIR_MODES = (0o000, 0o400, 0o311, 0o755, 0o777, 0o1777)

Act = Callable[[str], object]
"""Does something to the object with this path."""


class Check(NamedTuple):
    """One act of one user on an object."""

    role: str
    object: str
    act: str


def _opened(flags: int, act: Callable[[int], object] = lambda fd: None) -> Act:
    def open_and_act(path: str) -> None:
        fd = os.open(path, flags)
        try:
            act(fd)
        finally:
            os.close(fd)

    return open_and_act


def _accessible(path: str) -> None:
    if not os.access(path, os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be executed")


ON_A_FILE: dict[str, Act] = {
    "read": _opened(os.O_RDONLY, lambda fd: os.read(fd, 10)),
    "write": _opened(os.O_WRONLY, lambda fd: os.write(fd, b"new")),
    "append": _opened(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"new")),
    "truncate": lambda path: os.truncate(path, 1),
    "ftruncate": _opened(os.O_WRONLY, lambda fd: os.ftruncate(fd, 2)),
    "open with O_TRUNC": _opened(os.O_WRONLY | os.O_TRUNC),
    "access": _accessible,
    "chmod": lambda path: os.chmod(path, 0o640),
    "chmod set-id": lambda path: os.chmod(path, 0o6755),
    "chown to oneself": lambda path: os.chown(path, os.getuid(), -1),
    "chown to another": lambda path: os.chown(path, OTHER.uid, -1),
    "chgrp to one's own": lambda path: os.chown(path, -1, os.getgid()),
    "chgrp to another": lambda path: os.chown(path, -1, 4242),
    "utime, now": os.utime,
    "utime": lambda path: os.utime(path, ns=(10**18, 10**18)),
    "setxattr": lambda path: os.setxattr(path, "user.k", b"v"),
    "removexattr": lambda path: os.removexattr(path, "user.there"),
    "setxattr trusted": lambda path: os.setxattr(path, "trusted.k", b"v"),
    "set capability": lambda path: os.setxattr(path, "security.capability", CAPABILITY),
    "set an ACL": lambda path: os.setxattr(path, ACCESS, acl(6, 4, 4, users={OTHER.uid: 6}, mask=6)),
    "link": lambda path: os.link(path, f"{path}.linked"),
    "rename": lambda path: os.rename(path, f"{path}.moved"),
    "unlink": os.unlink,
}
IN_A_DIRECTORY: dict[str, Act] = {
    "list": os.listdir,
    "stat in it": lambda path: os.stat(f"{path}/mine"),
    "create": lambda path: _opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL)(f"{path}/new"),
    "mkdir": lambda path: os.mkdir(f"{path}/new", 0o2777),
    "mkfifo": lambda path: os.mkfifo(f"{path}/new"),
    "symlink": lambda path: os.symlink("target", f"{path}/new"),
    "unlink the owner's": lambda path: os.unlink(f"{path}/mine"),
    "unlink another's": lambda path: os.unlink(f"{path}/yours"),
    "rename the owner's": lambda path: os.rename(f"{path}/mine", f"{path}/moved"),
    "rename over another's": lambda path: os.rename(f"{path}/mine", f"{path}/yours"),
    "link": lambda path: os.link(f"{path}/yours", f"{path}/linked"),
    "rmdir another's": lambda path: os.rmdir(f"{path}/d"),
    "chmod": lambda path: os.chmod(path, 0o2770),
    "rename itself": lambda path: os.rename(path, f"{path}.moved"),
    "rmdir itself": os.rmdir,
}


def _file(mode: int, **xattrs: bytes) -> File:
    every = {"user.there": b"v", **{name.replace("__", "."): value for name, value in xattrs.items()}}
    return File(b"content", mode=mode, uid=OWNER.uid, gid=OWNER.gid, xattrs=every)


def _directory(mode: int) -> Dir:
    mine = File(b"", uid=OWNER.uid, gid=OWNER.gid, mode=0o666)
    yours = File(b"", uid=OTHER.uid, gid=OTHER.gid, mode=0o666)
    empty = Dir({}, mode=0o755, uid=OTHER.uid, gid=OTHER.gid)
    return Dir({"mine": mine, "yours": yours, "d": empty}, mode=mode, uid=OWNER.uid, gid=OWNER.gid)


FILES = {f"file {mode:04o}": _file(mode) for mode in _MODES}
DIRECTORIES = {f"directory {mode:05o}": _directory(mode) for mode in _DIR_MODES}
_NOT_RUN = "set-id file 02666"
SET_ID = {
    **{f"set-id file {mode:05o}": _file(mode) for mode in (0o6777, 0o4755, 0o2755)},
    _NOT_RUN: _file(0o2666),
    "file with capabilities": _file(0o777, security__capability=CAPABILITY),
}
OBJECTS: dict[str, Short] = {**FILES, **DIRECTORIES, **SET_ID}


def checks(objects: Iterable[str] = OBJECTS) -> list[Check]:
    """Every act of every user on each of these objects, except where FUSE itself decides (docs/deviations.md)."""
    every = [Check(role, each, act) for each in objects for role in USERS for act in _acts(each)]
    return [check for check in every if (check.role, check.object) != ("other", _NOT_RUN)]


def _acts(name: str) -> dict[str, Act]:
    return IN_A_DIRECTORY if name in DIRECTORIES else ON_A_FILE


def tree(wanted: Iterable[Check]) -> Dir:
    """Objects for checks, each in its own directory, which all users may write to."""
    return Dir({str(number): Dir({"o": OBJECTS[check.object]}, mode=0o777) for number, check in enumerate(wanted)})


def results(top: Path, wanted: list[Check]) -> list[str]:
    """Run the checks in a tree; return the result of each."""
    found = [""] * len(wanted)
    for role, user in USERS.items():
        own = [number for number, check in enumerate(wanted) if check.role == role]
        results = run_as(user, partial(_results, top, [(number, wanted[number]) for number in own]))
        for number, answer in zip(own, results, strict=True):
            found[number] = answer
    return found


def _results(top: Path, wanted: list[tuple[int, Check]]) -> list[str]:
    return list(_answers(top, wanted))


def _answers(top: Path, wanted: list[tuple[int, Check]]) -> Iterator[str]:
    for number, check in wanted:
        try:
            _acts(check.object)[check.act](f"{top}/{number}/o")
        except OSError as error:
            yield errno.errorcode.get(error.errno or 0, str(error))
        else:
            yield "success"
