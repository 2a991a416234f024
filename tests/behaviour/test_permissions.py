"""Permissions: the same answers as on any file system, for several users, before and after copy-up."""

import os
import stat
import subprocess
from collections.abc import Callable
from errno import EACCES, ENODATA, EPERM
from functools import partial
from typing import Any

import pytest

from tests.support.acl import ACCESS, acl
from tests.support.drivers import Tree
from tests.support.outcome import errno_of, name_of
from tests.support.spec import Dir, File, Special, Symlink
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker
from tests.support.users import ALICE, BOB, ROOT, User, run_as

pytestmark = pytest.mark.on("plain", "fuse", "kernel")

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
OWN: dict[str, Any] = {"uid": 1000, "gid": 1000}
MEMBER = User(1001, 1001, groups=(1000,))

LAYER: Spec = {
    "private": File(b"x", mode=0o600, **OWN),
    "group": File(b"x", mode=0o660, **OWN),
    "readable": File(b"x", mode=0o644, **OWN),
    "public": File(b"x", mode=0o666, **OWN),
    "nobody": File(b"x", mode=0o000, **OWN),
    "shut": Dir({"f": "x"}, mode=0o700, **OWN),
    "pass": Dir({"f": "x"}, mode=0o711, **OWN),
    "open": Dir({"mine": File(**OWN), "yours": File(uid=1001, gid=1001)}, mode=0o777),
    "sticky": Dir({"mine": File(**OWN), "yours": File(uid=1001), "d": Dir({}, uid=1001)}, mode=0o1777),
    "acl": File(b"x", mode=0o600, xattrs={ACCESS: acl(6, 0, 0, users={1001: 6}, mask=6)}, **OWN),
    "masked": File(b"x", mode=0o600, xattrs={ACCESS: acl(6, 0, 0, users={1001: 6}, mask=4)}, **OWN),
    "link": Symlink(target="readable", **OWN),
}

Action = Callable[[Any], object]


def reads(name: str) -> Action:
    return lambda tree: tree.read(name)


def writes(name: str) -> Action:
    return lambda tree: tree.write(name, b"y")


def looks_at(name: str) -> Action:
    return lambda tree: tree.stat(name)


def lists(name: str) -> Action:
    return lambda tree: tree.names(name)


ACTIONS: dict[str, Action] = {
    **{f"read {name}": reads(name) for name in ("private", "group", "readable", "nobody", "acl", "masked")},
    **{f"write {name}": writes(name) for name in ("private", "group", "readable", "public", "acl", "masked")},
    **{f"stat {name}": looks_at(name) for name in ("shut/f", "pass/f")},
    **{f"list {name}": lists(name) for name in ("shut", "pass", "open")},
    "create open/n": lambda tree: tree.create("open/n"),
    "create pass/n": lambda tree: tree.create("pass/n"),
    "chmod readable": lambda tree: tree.chmod("readable", 0o600),
    "chmod public": lambda tree: tree.chmod("public", 0o666),
    "chown readable": lambda tree: tree.chown("readable", 1001, -1),
    "chgrp to own group": lambda tree: tree.chown("readable", -1, 1000),
    "chgrp to foreign group": lambda tree: tree.chown("readable", -1, 4242),
    "utime public": lambda tree: tree.utime("public", 1, 2),
    "touch public": lambda tree: os.utime(tree.stack.mountpoint / "public"),
    "touch readable": lambda tree: os.utime(tree.stack.mountpoint / "readable"),
    "setxattr readable": lambda tree: tree.setxattr("readable", "user.k", b"v"),
    "setxattr public": lambda tree: tree.setxattr("public", "user.k", b"v"),
    "set trusted": lambda tree: tree.setxattr("public", "trusted.k", b"v"),
    "set capability": lambda tree: tree.setxattr("public", "security.capability", CAPABILITY),
    "set acl": lambda tree: tree.setxattr("readable", ACCESS, acl(6, 4, 4, users={1001: 6}, mask=6)),
    "user xattr on symlink": lambda tree: tree.setxattr("link", "user.k", b"v"),
    "truncate readable": lambda tree: tree.truncate("readable", 0),
    "truncate public": lambda tree: tree.truncate("public", 0),
    "unlink open/mine": lambda tree: tree.unlink("open/mine"),
    "unlink pass/f": lambda tree: tree.unlink("pass/f"),
    "unlink sticky/mine": lambda tree: tree.unlink("sticky/mine"),
    "unlink sticky/yours": lambda tree: tree.unlink("sticky/yours"),
    "rmdir sticky/d": lambda tree: tree.rmdir("sticky/d"),
    "rename sticky/yours": lambda tree: tree.rename("sticky/yours", "sticky/z"),
    "rename over sticky/yours": lambda tree: tree.rename("open/mine", "sticky/yours"),
    "rename out of pass": lambda tree: tree.rename("pass/f", "open/f"),
    "mknod device": lambda tree: tree.mknod("open/dev", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "mkfifo": lambda tree: tree.mkfifo("open/p"),
}  # fmt: skip

# Who -> the actions that fail, with their errno; all others succeed. Taken from POSIX and checked on a plain directory.
REFUSED: dict[str, tuple[User, dict[str, int]]] = {
    "root": (ROOT, {"user xattr on symlink": EPERM}),
    "owner": (
        ALICE,
        {
            "read nobody": EACCES, "chown readable": EPERM, "chgrp to foreign group": EPERM, "set trusted": EPERM,
            "set capability": EPERM, "user xattr on symlink": EPERM, "unlink sticky/yours": EPERM,
            "rmdir sticky/d": EPERM,
            "rename sticky/yours": EPERM, "rename over sticky/yours": EPERM, "mknod device": EPERM,
        },
    ),
    "other": (
        BOB,
        {
            **{f"read {name}": EACCES for name in ("private", "group", "nobody")},
            **{f"write {name}": EACCES for name in ("private", "group", "readable", "masked")},
            "stat shut/f": EACCES, "list shut": EACCES, "list pass": EACCES, "create pass/n": EACCES,
            "chmod readable": EPERM, "chmod public": EPERM, "chown readable": EPERM, "chgrp to own group": EPERM,
            "chgrp to foreign group": EPERM, "utime public": EPERM, "touch readable": EACCES,
            "setxattr readable": EACCES,
            "set trusted": EPERM, "set capability": EPERM, "set acl": EPERM, "user xattr on symlink": EPERM,
            "truncate readable": EACCES, "unlink pass/f": EACCES, "unlink sticky/mine": EPERM,
            "rename out of pass": EACCES, "mknod device": EPERM,
        },
    ),
    "member": (
        MEMBER,
        {
            "read private": EACCES, "read nobody": EACCES, "write private": EACCES, "write readable": EACCES,
            "write masked": EACCES,
            "stat shut/f": EACCES, "list shut": EACCES, "list pass": EACCES, "create pass/n": EACCES,
            "chmod readable": EPERM, "chmod public": EPERM, "chown readable": EPERM, "chgrp to own group": EPERM,
            "chgrp to foreign group": EPERM, "utime public": EPERM, "touch readable": EACCES,
            "setxattr readable": EACCES,
            "set trusted": EPERM, "set capability": EPERM, "set acl": EPERM, "user xattr on symlink": EPERM,
            "truncate readable": EACCES, "unlink pass/f": EACCES, "unlink sticky/mine": EPERM,
            "rename out of pass": EACCES, "mknod device": EPERM,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("who", REFUSED)
def test_who_may_do_what(stack: StackMaker, who: str, where: str) -> None:
    """Each action on a tree of its own, all in one mount; a refused action must not copy anything up."""
    user, refused = REFUSED[who]
    cases: Spec = {str(number): Dir(LAYER, mode=0o755) for number in range(len(ACTIONS))}
    tree = stack(cases if where == "lower" else {}, upper=cases if where == "upper" else {})
    wrong = []
    for number, (name, action) in enumerate(ACTIONS.items()):
        got = run_as(user, partial(errno_of, action, Below(tree, str(number))))
        if got != refused.get(name):
            wrong.append(f"{name}: wanted {name_of(refused.get(name))}, got {name_of(got)}")
        elif got is not None and where == "lower" and tree.name in ("fuse", "pyfuse3"):
            wrong += [f"{name}: refused, but copied up"] * os.path.exists(tree.stack.base / "u" / str(number))
    assert not wrong, "\n" + "\n".join(wrong)


class Below:
    """The operations of a tree inside one of its directories."""

    def __init__(self, tree: Tree, top: str) -> None:
        self._tree = tree
        self._top = top
        self.stack = type("Place", (), {"mountpoint": tree.stack.mountpoint / top})

    def __getattr__(self, name: str) -> Callable[..., object]:
        operation = getattr(self._tree, name)
        names = ("rename", "link")

        def call(path: str, *args: object) -> object:
            if name in names:
                args = (f"{self._top}/{args[0]}", *args[1:])
            return operation(f"{self._top}/{path}", *args)

        return call


SPECIAL: Spec = {
    "f": File(b"program", mode=0o6777, **OWN),
    "cap": File(b"program", mode=0o777, xattrs={"security.capability": CAPABILITY}, **OWN),
}


def has_capability(tree: Tree, path: str) -> bool:
    return errno_of(tree.getxattr, path, "security.capability") != ENODATA


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("who", ["owner", "other"])
def test_a_write_clears_suid_sgid_and_capabilities(stack: StackMaker, who: str, where: str) -> None:
    tree = stack(SPECIAL if where == "lower" else {}, upper=SPECIAL if where == "upper" else {})
    assert has_capability(tree, "cap")
    user = ALICE if who == "owner" else BOB
    tree.run_as(user, lambda: tree.write("f", b"evil"))
    tree.run_as(user, lambda: tree.write("cap", b"evil"))
    assert tree.mode("f") == 0o777
    assert not has_capability(tree, "cap")
    tree.remount()
    assert tree.mode("f") == 0o777
    assert not has_capability(tree, "cap")


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_root_keeps_suid_when_it_writes(stack: StackMaker, where: str) -> None:
    tree = stack(SPECIAL if where == "lower" else {}, upper=SPECIAL if where == "upper" else {})
    tree.write("f", b"fine")
    assert tree.mode("f") == 0o6777


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("how", ["truncate", "O_TRUNC", "ftruncate"])
def test_truncating_clears_suid_and_capabilities(stack: StackMaker, how: str, where: str) -> None:
    tree = stack(SPECIAL if where == "lower" else {}, upper=SPECIAL if where == "upper" else {})

    def act() -> None:
        for path in ("f", "cap"):
            if how == "truncate":
                tree.truncate(path, 3)
            elif how == "O_TRUNC":
                tree.open(path, os.O_WRONLY | os.O_TRUNC).close()
            else:
                handle = tree.open(path, os.O_WRONLY)
                handle.truncate(2)
                handle.close()

    tree.run_as(BOB, act)
    assert tree.mode("f") == 0o777
    assert not has_capability(tree, "cap")


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_chown_clears_suid_sgid_and_capabilities(stack: StackMaker, where: str) -> None:
    tree = stack(SPECIAL if where == "lower" else {}, upper=SPECIAL if where == "upper" else {})
    tree.run_as(User(1000, 1000, groups=(1000, 1005)), lambda: tree.chown("f", -1, 1005))
    assert (tree.mode("f"), tree.stat("f").gid) == (0o777, 1005)
    tree.chown("cap", 1001, 1001)
    assert not has_capability(tree, "cap")


def test_sgid_without_group_execution_survives(stack: StackMaker) -> None:
    """Then the bit has nothing to do with running the file: a write by the owner's group leaves it."""
    tree = stack({"f": File(b"x", mode=0o2666, **OWN)})
    tree.run_as(ALICE, lambda: tree.write("f", b"y"))
    assert tree.mode("f") == 0o2666


@pytest.mark.on("fuse")
@pytest.mark.parametrize("how", ["write", "truncate"])
def test_sgid_without_group_execution_survives_a_stranger(stack: StackMaker, how: str) -> None:
    """By FUSE's own rule (docs/deviations.md); a local file system clears the bit."""
    tree = stack({"f": File(b"x", mode=0o2666, **OWN)})
    tree.run_as(BOB, lambda: tree.write("f", b"y") if how == "write" else tree.truncate("f", 0))
    assert tree.mode("f") == 0o2666


def test_chmod_by_a_non_member_drops_sgid(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x", mode=0o755, uid=1000, gid=7)})
    tree.run_as(ALICE, lambda: tree.chmod("f", 0o2755))
    assert tree.mode("f") == 0o755
    tree.run_as(User(1000, 1000, groups=(7,)), lambda: tree.chmod("f", 0o2755))
    assert tree.mode("f") == 0o2755


def test_suid_of_a_copied_up_file_stays(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x", mode=0o4755, uid=1000, gid=7)})
    tree.utime("f", 1, 2)
    tree.rename("f", "g")
    tree.link("g", "h")
    assert tree.mode("h") == 0o4755
    tree.remount()
    assert tree.mode("g") == 0o4755


@pytest.mark.on("command")
def test_suid_programs_do_not_gain_rights(stack: StackMaker) -> None:
    """A mount by the command is nosuid by default."""
    with open("/usr/bin/id", "rb") as program:
        tree = stack({"id": File(program.read(), mode=0o4755)})

    def act() -> str:
        return subprocess.run([tree.stack.mountpoint / "id", "-u"], capture_output=True, text=True, check=True).stdout

    assert tree.run_as(ALICE, act).strip() == "1000"


@pytest.mark.on("command")
def test_devices_do_not_open(stack: StackMaker) -> None:
    """A mount by the command is nodev by default."""
    tree = stack({"null": Special(kind="c", major=1, minor=3, mode=0o666)})
    tree.read("null", err=EACCES)


def test_a_file_made_private_is_private_at_once(stack: StackMaker) -> None:
    tree = stack({"f": File(b"secret", mode=0o644, **OWN)})
    assert tree.run_as(BOB, lambda: tree.read("f")) == b"secret"
    tree.chmod("f", 0o600)
    tree.run_as(BOB, lambda: tree.read("f", err=EACCES))
    tree.chown("f", 1001, 1001)
    assert tree.run_as(BOB, lambda: tree.read("f")) == b"secret"


def test_acls_decide_after_copy_up(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x", mode=0o600, xattrs={ACCESS: acl(6, 0, 0, users={1001: 6}, mask=6)}, **OWN)})
    tree.run_as(BOB, lambda: tree.write("f", b"y"))
    assert tree.getxattr("f", ACCESS) == acl(6, 0, 0, users={1001: 6}, mask=6)
    tree.setxattr("f", ACCESS, acl(6, 0, 0, users={1002: 6}, mask=6))
    tree.run_as(BOB, lambda: tree.read("f", err=EACCES))
    tree.run_as(User(1002, 1002), lambda: tree.write("f", b"z"))
    tree.chmod("f", 0o640)
    assert tree.getxattr("f", ACCESS) == acl(6, 0, 0, users={1002: 6}, mask=4)
    tree.removexattr("f", ACCESS)
    assert tree.mode("f") == 0o600 or tree.mode("f") == 0o640


def test_setting_an_acl_sets_the_mode(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x", mode=0o644)})
    tree.setxattr("f", ACCESS, acl(7, 5, 1))
    assert tree.mode("f") == 0o751
    tree.setxattr("f", ACCESS, acl(6, 4, 0, users={1234: 7}, mask=7))
    assert tree.mode("f") == 0o670
    tree.remount()
    assert tree.mode("f") == 0o670
    assert tree.getxattr("f", ACCESS) == acl(6, 4, 0, users={1234: 7}, mask=7)


def test_protected_directories_of_others(stack: StackMaker) -> None:
    tree = stack({"d": Dir({"s": Dir({"f": ""}, mode=0o777)}, mode=0o755, **OWN)})
    tree.run_as(BOB, lambda: tree.create("d/n", err=EACCES))
    tree.run_as(BOB, lambda: tree.create("d/s/n"))
    tree.run_as(BOB, lambda: tree.rmdir("d/s", err=EACCES))
    assert tree.stat("d/s/n").uid == 1001
    assert tree.stat("d").uid == 1000
    tree.run_as(ALICE, lambda: tree.chmod("d", 0o700))
    tree.run_as(BOB, lambda: tree.stat("d/s", err=EACCES))


def test_eacces_takes_precedence_over_errors_below(stack: StackMaker) -> None:
    tree = stack({"d": Dir({"f": ""}, mode=0o600, **OWN)})
    tree.run_as(ALICE, lambda: tree.stat("d/f", err=EACCES))
    assert tree.run_as(ALICE, lambda: tree.names("d")) == ["f"]
    tree.run_as(ALICE, lambda: tree.chmod("d/f", 0o600, err=EACCES))
    assert tree.run_as(ALICE, lambda: errno_of(os.chown, tree.stack.mountpoint / "d", 1000, 1)) == EPERM
